"""`push --format`, and `push` of an export: every format to a repository of its own, protected as any push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qwen_quant import cli
from qwen_quant.checkpoint.manifest import write_manifest
from qwen_quant.errors import InputError, UsageError
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import LOCATIONS
from qwen_quant.hub import push_formats
from qwen_quant.hub.card import card_problems, make_card
from qwen_quant.hub.card_state import CardRequest
from qwen_quant.hub.export_rules import check_reencoded
from qwen_quant.hub.export_table import HUB_FORMATS, repository_of
from qwen_quant.hub.gguf_head import gguf_files
from qwen_quant.hub.push_checks import upload_files
from qwen_quant.hub.push_formats import export_place, is_unchanged, make_export, parse_targets
from qwen_quant.hub.push_prepare import PushJob
from qwen_quant.hub.reencoded import read_reencoded
from qwen_quant.progress import no_progress
from qwen_quant.recipe import RunConfig
from qwen_quant.verify import verify_folder
from tests.loophub import Fault, FaultPlan, Hub, serve_hub
from tests.support.pushable import FAILED, make_pushable, seal_again, write_report_for
from tests.support.zygote import Zygote
from tests.test_push import Pusher

REPO, GGUF, AWQ = "loop/tiny-Int4", "loop/tiny-Int4-GGUF", "loop/tiny-Int4-AWQ"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its exports to AWQ and GGUF beside it. Read only."""
    folder = make_pushable(tmp_path_factory.mktemp("formats") / "tiny-Int4")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {**tokenizer["model"]["vocab"], "he": 259}, "merges": [["h", "e"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))  # llama.cpp loads none without merges
    seal_again(folder)
    for name in ("awq", "gguf"):
        make_export(folder, name, export_place(folder, name), no_progress)
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy of it, so that each test starts from exports that are up to date."""
    for name in ("", "-awq", "-gguf"):
        shutil.copytree(f"{made}{name}", tmp_path / f"tiny-Int4{name}")
    return tmp_path / "tiny-Int4"


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def push(zygote: Zygote, artifact: Path) -> Pusher:
    return Pusher(zygote, artifact)


def assert_pushed(hub: Hub, folder: Path, repo: str, revision: str = "main") -> None:
    """Every file of the folder is there byte for byte, and nothing else but .gitattributes."""
    names = {path.name for path in folder.iterdir()}
    assert set(hub.commits(repo, revision)[0].files) - {".gitattributes"} == names
    for name in names:
        assert hub.file_bytes(repo, revision, name) == (folder / name).read_bytes(), name


def test_each_format_goes_to_its_own_repository_and_a_second_push_is_none(
    push: Pusher, artifact: Path, tmp_path: Path
) -> None:
    options = ("--format", "gguf,awq=loop/other", "--private", "--tag", "v1", "--card-language", "both")
    places = {"": (REPO, artifact)}
    places |= {"gguf": (GGUF, export_place(artifact, "gguf")), "awq": ("loop/other", export_place(artifact, "awq"))}
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, *options)
        rows = {row["format"]: row for row in document["repositories"]}
        assert list(rows) == ["", "gguf", "awq"] and all(row["error"] is None for row in rows.values())
        for name, (repo, folder) in places.items():
            assert (rows[name]["repo_id"], rows[name]["outcome"]) == (repo, "committed")
            assert_pushed(hub, folder, repo)
            assert hub.repository(repo).private and hub.repository(repo).tags == {"v1": rows[name]["commit"]}
            assert card_problems(folder) == [] and not verify_folder(folder).problems
            for other, _ in places.values():
                assert (f"huggingface.co/{other})" in (folder / "README.md").read_text()) == (other != repo)
        assert hub.commits(GGUF)[0].title == "gguf 4 bit of Qwen/Qwen2-tiny@ab12ab12ab12"
        card = ModelCard((export_place(artifact, "gguf") / "README.md").read_text())
        assert (card.data.library_name, card.data.base_model) == ("gguf", "Qwen/Qwen2-tiny")
        assert card.data.base_model_relation == "quantized" and card.data.license_name == "tongyi-qianwen"
        assert "--hf-repo loop/tiny-Int4-GGUF --hf-file model.gguf" in card.text
        assert "max\\_kl on text" in card.text and "largest difference 0" in card.text
        again, _ = push(hub, *options)
        assert [row["outcome"] for row in again["repositories"]] == ["unchanged"] * 3
        assert [row["commit"] for row in again["repositories"]] == [row["commit"] for row in rows.values()]


def test_an_export_is_pushed_by_itself(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    folder = export_place(artifact, "gguf")
    alone = Pusher(push.zygote, folder)
    with serve_hub(tmp_path / "hub", mode="xet") as hub:
        assert "has no report.json" in alone(hub, code=3, repo=GGUF)[1]
        shutil.copyfile(artifact / "report.json", folder / "report.json")
        document, _ = alone(hub, "--create-pr", repo=GGUF)
        assert document["pull_request"] and document["weights_sha256"] == read_reencoded(folder).weights_sha256
        assert_pushed(hub, folder, GGUF, "refs/pr/1")


def test_an_exports_report_and_gates(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export_place(artifact, "awq")
    for changes, code, word in (
        ({"gates": (FAILED,)}, 4, "max_kl on text"),
        ({"gates": ()}, 4, "has no gates"),
        ({"quantized_sha256": "ab" * 32}, 3, "is the report of another artifact"),
    ):
        write_report_for(artifact, **changes)
        shutil.copyfile(artifact / "report.json", folder / "report.json")
        assert cli.run(["push", str(folder), AWQ]) == code
        assert word in capsys.readouterr().err
    assert cli.run(["push", str(folder), AWQ, "--format", "gguf"]) == 3
    assert "is an export itself" in capsys.readouterr().err


def test_numbers_that_are_not_exact_need_a_reason(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    export_artifact(ExportJob(artifact, folder, "bf16", allow_inexact=True, source_id="tiny-Int4"), no_progress)
    shutil.copyfile(artifact / "report.json", folder / "report.json")
    alone = Pusher(push.zygote, folder)
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = alone(hub, code=4)
        assert "not exactly the artifact" in document["error"]["what"] and hub.requests == []
        document, _ = alone(hub, "--override-gates", "for old runtimes")
        assert document["override_reason"] == "for old runtimes"
        card = hub.file_bytes(REPO, "main", "README.md").decode()
        assert "not exactly the numbers" in card and "for old runtimes" in card and "largest difference 0)" not in card


def test_a_dry_run_changes_nothing_and_says_what_would_be_exported(
    push: Pusher, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, "--dry-run", "--format", "gguf", HF_TOKEN="")
        assert [row["outcome"] for row in document["repositories"]] == ["dry run", "dry run"]
        assert not any(hub.exists(repo) for repo in (REPO, GGUF))
    shutil.rmtree(export_place(artifact, "awq"))
    asked: list[str] = []
    monkeypatch.setattr(push_formats, "send", lambda checked, progress: None)
    monkeypatch.setattr(push_formats, "survey", lambda job, files, name: asked.append(job.repo_id))
    job = PushJob(artifact, REPO, dry_run=True)
    rows = push_formats.push_formats(job, parse_targets(["gguf", "awq"], REPO, 4), no_progress)
    assert [row.note for row in rows] == ["", "", "would be exported first"] and asked == [AWQ]
    assert not export_place(artifact, "awq").exists()
    assert all(path.read_bytes() == data for path, data in before.items() if "-awq" not in path.parent.name)


def test_what_one_repository_refuses_stops_all_before_anything_is_sent(
    push: Pusher, artifact: Path, tmp_path: Path
) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo(GGUF, {"somebody-Q4_K_M.gguf": b"GGUF"})
        assert "somebody-Q4_K_M.gguf" in push(hub, "--format", "gguf", code=3)[1]
        assert not hub.exists(REPO) and not any(method == "POST" for method, _ in hub.requests)
        hub.add_repo(REPO, {path.name: path for path in artifact.iterdir()})
        only = Pusher(push.zygote, export_place(artifact, "awq"))
        shutil.copyfile(artifact / "report.json", only.artifact / "report.json")
        _, err = only(hub, code=3)
        assert "holds gptq of an earlier push" in err and "repository of its own" in err
        assert len(hub.commits(REPO)) == 1


def test_one_that_fails_hides_none_that_is_there(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    faults = FaultPlan((Fault("401", rf"POST /api/models/{GGUF}/commit/", times=99),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        document, err = push(hub, "--format", "gguf,awq", code=5)
        rows = document["repositories"]
        assert [row.get("outcome") for row in rows] == ["committed", None, "committed"]
        assert rows[1]["error"]["exit_code"] == 5 and document["error"]["exit_code"] == 5 and GGUF in err
        hub.clock.heal()
        document, _ = push(hub, "--format", "gguf,awq")
        assert [row["outcome"] for row in document["repositories"]] == ["unchanged", "committed", "unchanged"]


def test_an_export_is_made_again_only_after_a_change(artifact: Path) -> None:
    folder = export_place(artifact, "awq")
    assert is_unchanged(artifact, "awq", folder) and not is_unchanged(artifact, "mlx", export_place(artifact, "mlx"))
    (folder / "README.md").write_text("<!-- kept -->")
    write_report_for(artifact, seconds=3.0)  # evidence is none of an export's inputs
    assert is_unchanged(artifact, "awq", folder)
    (artifact / "generation_config.json").write_text('{"do_sample": true}\n')
    seal_again(artifact)
    assert not is_unchanged(artifact, "awq", folder)
    make_export(artifact, "awq", folder, no_progress)
    assert is_unchanged(artifact, "awq", folder) and "do_sample" in (folder / "generation_config.json").read_text()
    assert (folder / "README.md").read_text() == "<!-- kept -->"
    shutil.rmtree(folder)
    run = RunConfig()
    export_artifact(ExportJob(artifact, folder, "awq", rest="f32", run=run, source_id="tiny-Int4"), no_progress)
    with pytest.raises(InputError, match="in the way"):
        is_unchanged(artifact, "awq", folder)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (["gguff"], "did you mean gguf"),
        (["gguf,gguf"], "given twice"),
        (["gguf=loop/a,awq=Loop/A"], "is given for gguf and for awq"),
        ([f"gguf={REPO}"], "is given for the artifact itself"),
        (["gguf=nonsense"], "is not a repository"),
        (["gguf,"], "unknown format"),
    ],
)
def test_usage(values: list[str], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_targets(values, REPO, 4)
    assert word in f"{caught.value} {caught.value.next_step}"


def test_a_format_that_cannot_be_made_stops_all(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert cli.run(["push", str(artifact), REPO, *arguments]) == 3
        return capsys.readouterr().err

    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    shutil.rmtree(export_place(artifact, "gguf"))
    assert "qwen-quant[gguf]" in refused("--format", "gguf")
    assert "cannot hold this artifact exactly" in refused("--format", "bf16", "--dry-run")
    foreign = export_place(artifact, "gguf")
    foreign.mkdir()
    assert "in the way" in refused("--format", "gguf")


def test_table_names_every_format() -> None:
    assert set(HUB_FORMATS) == set(LOCATIONS)
    assert repository_of("me/X", "mlx", 4) == "me/X-MLX-4bit" and repository_of("me/X", "gguf", 8) == "me/X-GGUF"
    suffixes = {row.suffix.format(bits=4).casefold() for row in HUB_FORMATS.values()}
    assert len(suffixes) == len(HUB_FORMATS)


def test_rules_of_a_gguf_folder(artifact: Path) -> None:
    folder = export_place(artifact, "gguf")
    made = read_reencoded(folder)
    assert [row.rule for row in check_reencoded(folder, made) if row.severity == "error"] == []
    path = folder / "model.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "ends before its last tensor" in str(check_reencoded(folder, made))
    path.write_bytes(b"GGML" + whole[4:])
    assert "not GGUF" in str(check_reencoded(folder, made))
    (folder / "LICENSE").unlink()
    assert "licence" in {row.rule for row in check_reencoded(folder, made)}


def test_rules_of_folders_with_a_graph(artifact: Path, tmp_path: Path) -> None:
    """The files of openvino and onnx, made up: what belongs together, and what of them may be pushed."""
    graph = '<net><layer><data offset="4" size="8"/></layer></net>'
    files = {"openvino_model.xml": graph, "openvino_model.bin": "x" * 12, "tokenizer.json": "{}", "LICENSE": "x"}
    assert rules_of(artifact, tmp_path / "ov", "openvino", files) == {"openvino-tokenizer"}
    assert "openvino-graph" in rules_of(artifact, tmp_path / "ov2", "openvino", {**files, "openvino_model.bin": "x"})
    config = json.dumps({"model": {"decoder": {"filename": "model.onnx"}}})
    files = {"model.onnx": "x", "model.onnx.data": "x", "genai_config.json": config, "tokenizer.json": "{}"}
    assert rules_of(artifact, tmp_path / "onnx", "onnx", files) == {"licence"}
    assert "onnx-config" in rules_of(artifact, tmp_path / "onnx2", "onnx", {**files, "genai_config.json": "{}"})


def test_a_split_gguf(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    job = ExportJob(artifact, folder, "gguf", source_id="tiny-Int4", split_bytes=200_000)
    export_artifact(job, no_progress)
    names = gguf_files(path.name for path in folder.iterdir())
    shutil.copyfile(artifact / "report.json", folder / "report.json")
    made = read_reencoded(folder)
    make_card(folder, CardRequest("en", GGUF))
    card = (folder / "README.md").read_text()
    assert len(names) > 1 and f"--hf-file {names[0]}" in card and "--max-shard-size 200000" in card
    assert [row.rule for row in check_reencoded(folder, made) if row.severity == "error"] == []
    upload_files(folder, HUB_FORMATS["gguf"].own)
    (folder / names[-1]).unlink()
    assert f"is one of {len(names)} files" in str(check_reencoded(folder, made))


def rules_of(artifact: Path, folder: Path, name: str, files: dict[str, str]) -> set[str]:
    """Broken rules of an export with these files, whose manifest is otherwise that of the GGUF export."""
    folder.mkdir()
    manifest: dict[str, Any] = json.loads((export_place(artifact, "gguf") / "qwen-quant.json").read_text())
    for file, text in files.items():
        (folder / file).write_text(text)
    write_manifest(folder, {**manifest, "format": name})
    return {row.rule for row in check_reencoded(folder, read_reencoded(folder))}
