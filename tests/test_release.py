"""`release` on a tiny random checkpoint: what runs again after a change, what stops it, what a kill costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import GateError, InputError
from qwen_quant.evaluation.report import read_report
from qwen_quant.profile import profile_models
from qwen_quant.profiling.protocol import Cell
from qwen_quant.progress import no_progress
from qwen_quant.release import ReleaseJob, ReleaseResult, plan_release, run_release
from qwen_quant.releasing import measuring
from qwen_quant.releasing.settings import load_release
from tests.support.checkpoints import text_file
from tests.test_profile import FakeChild

RECIPE = """
model = "{model}"
[release]
{release}
[gptq]
group_size = 32
[calibration]
source = "{text}"
num_samples = {samples}
seq_len = 64
[validation]
texts = ["{text}"]
window_tokens = 64
max_windows = 4
smoke = false
{profile}
[gates]
max_kl = {max_kl}
"""
PROFILE = "[profile]\nnew_tokens = [4]\nruns = 1\nwarmup_tokens = 0\n"


def write_recipe(folder: Path, model: Path | str, **changes: Any) -> Path:
    """A recipe for a tiny checkpoint; `changes` replaces what stands in braces in RECIPE."""
    values = {"release": 'profile = "none"', "samples": 8, "profile": "", "max_kl": 100.0, **changes}
    text = folder / "text.txt"
    if not text.exists():
        text_file(text)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(model=model, text=text, **values))
    return path


Release = Callable[..., ReleaseResult]


@pytest.fixture
def release(tmp_path: Path, qwen2_folder: Path) -> Release:
    """Run a release without a push in tmp_path/work, with changes of the recipe."""

    def run(**changes: Any) -> ReleaseResult:
        recipe = load_release(write_recipe(tmp_path, qwen2_folder, **changes))
        job = ReleaseJob(recipe, tmp_path / "work", "org/name", push=False)
        return run_release(job, no_progress, lambda text: None)

    return run


def statuses(result: ReleaseResult) -> dict[str, str]:
    """What became of each stage that the recipe has."""
    return {row.name: row.status for row in result.stages if row.status != "left out"}


def test_a_release_makes_everything_and_then_nothing(release: Release, tmp_path: Path) -> None:
    first = release()
    assert first.complete and first.error is None
    assert statuses(first) == dict.fromkeys(("download", "gptq", "validate", "gate", "card"), "done")
    artifact = Path(first.artifact)
    report = read_report(artifact / "report.json")
    assert report.quantized_sha256 == weights_sha256(artifact) and report.gates[0].passed
    assert report.quantized == artifact.name and str(artifact.parent) not in (artifact / "report.json").read_text()
    hashes = read_manifest(artifact)["output"]["sha256"]
    assert {path.name for path in artifact.iterdir()} == {*hashes, "qwen-quant.json"}
    assert all(file_sha256(artifact / name) == value for name, value in hashes.items())
    document = json.loads((tmp_path / "work" / "release.json").read_text())
    assert document["schema"] == "qwen-quant/release/1" and document["complete"]
    rows = {row["name"]: row for row in document["stages"]}
    assert rows["gptq"]["outputs"]["config.json"] == hashes["config.json"]
    assert rows["validate"]["figures"]["texts"] and rows["push"]["status"] == "left out"
    before = {path.name: path.stat().st_mtime_ns for path in artifact.iterdir()}
    again = release()
    assert set(statuses(again).values()) == {"unchanged"} and again.seconds < first.seconds
    assert {path.name: path.stat().st_mtime_ns for path in artifact.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "rerun"),
    [
        ({"max_kl": 50.0}, {"gate", "card"}),
        ({"release": 'profile = "none"\ncard_language = "zh"'}, {"card"}),
        ({"samples": 9}, {"gptq", "validate", "gate", "card"}),
    ],
    ids=("a limit", "the card's language", "the calibration set"),
)
def test_a_changed_key_runs_what_depends_on_it(release: Release, changes: dict[str, Any], rerun: set[str]) -> None:
    first = release()
    second = release(**changes)
    assert {name for name, status in statuses(second).items() if status == "done"} == rerun
    assert second.complete
    reasons = {row.name: row.reason for row in second.stages}
    assert " was " in reasons[min(rerun, key=list(statuses(second)).index)]
    assert (Path(first.artifact) == Path(second.artifact)) == ("gptq" not in rerun)
    assert Path(first.artifact).exists() == ("gptq" not in rerun), "an artifact goes when its successor stands"


def test_a_failed_gate_stops_the_release_and_is_in_its_record(release: Release, tmp_path: Path) -> None:
    result = release(max_kl=0.0)
    assert isinstance(result.error, GateError) and result.error.exit_code == 4 and not result.complete
    assert statuses(result)["gate"] == "failed" and statuses(result)["card"] == "not reached"
    document = json.loads((tmp_path / "work" / "release.json").read_text())
    assert document["error"]["exit_code"] == 4
    gate = next(row for row in document["stages"] if row["name"] == "gate")
    assert gate["figures"]["gates"][0]["passed"] is False
    assert not read_report(tmp_path / "work" / "report" / "report.json").gates[0].passed
    assert isinstance(release(max_kl=0.0).error, GateError), "a failed gate is asked again"
    reason = 'profile = "none"\noverride_gates = "a test"'
    overridden = release(max_kl=0.0, release=reason)
    assert overridden.complete and statuses(overridden)["validate"] == "unchanged"
    assert "a test" in (Path(overridden.artifact) / "README.md").read_text()


def test_exports_are_made_once_and_their_cards_follow_the_artifacts(release: Release, tmp_path: Path) -> None:
    formats = 'profile = "none"\nformats = ["awq", "gptq_v2=org/second"]'
    first = release(release=formats)
    assert first.complete and statuses(first)["export"] == "done"
    assert first.formats == {"awq": "", "gptq_v2": ""}, "nothing is pushed"
    parent = next((tmp_path / "work").glob("exports-*"))
    folder = parent / f"{Path(first.artifact).name}-awq"
    card = (folder / "README.md").read_text()
    assert "quant_method" in (folder / "config.json").read_text() and "huggingface.co/org/second)" in card
    assert "huggingface.co/org/name-AWQ)" in (Path(first.artifact) / "README.md").read_text()
    report = (folder / "report.json").read_bytes()
    assert report == (Path(first.artifact) / "report.json").read_bytes()
    assert set(statuses(release(release=formats)).values()) == {"unchanged"}
    marked = next(line for line in card.splitlines() if line.startswith("<!-- ") and "begin" in line)
    (folder / "README.md").write_text(card.replace(marked, f"{marked}\nwritten by hand"))
    (folder / "model.safetensors").write_bytes(b"")
    again = release(release=formats, max_kl=50.0)
    assert {name for name, status in statuses(again).items() if status == "done"} == {"gate", "export", "card"}
    assert again.complete and "written by hand" in (folder / "README.md").read_text()
    plan = plan_release(ReleaseJob(load_release(tmp_path / "recipe.toml"), tmp_path / "work", "org/name", push=False))
    assert {row.name: row.status for row in plan.stages}["export"] == "unchanged"
    assert "[export]" not in str(plan) and release().complete


def test_damage_is_repaired_and_text_written_by_hand_stays(release: Release) -> None:
    artifact = Path(release().artifact)
    card = artifact / "README.md"
    marked = next(line for line in card.read_text().splitlines() if line.startswith("<!-- ") and "begin" in line)
    card.write_text(card.read_text().replace(marked, f"{marked}\nwritten by hand"))
    weights = weights_sha256(artifact)
    (artifact / "config.json").write_text("{}")
    result = release()
    assert statuses(result)["gptq"] == "done" and statuses(result)["validate"] == "unchanged"
    assert result.complete and weights_sha256(Path(result.artifact)) == weights
    assert "written by hand" in (Path(result.artifact) / "README.md").read_text()
    other = release(samples=9)
    assert other.artifact != result.artifact
    assert "written by hand" in (Path(other.artifact) / "README.md").read_text()


def test_a_kill_between_the_rename_and_the_record_costs_nothing(release: Release, tmp_path: Path) -> None:
    first = release()
    (tmp_path / "work" / "stages" / "gptq.json").unlink()
    left = Path(first.artifact).parent / f".{Path(first.artifact).name}.partial" / "state"
    left.mkdir(parents=True)
    before = (Path(first.artifact) / "model.safetensors").stat().st_mtime_ns
    again = release()
    assert statuses(again)["gptq"] == "done" and statuses(again)["validate"] == "unchanged"
    assert (Path(again.artifact) / "model.safetensors").stat().st_mtime_ns == before
    assert not left.exists()


def test_a_source_that_changed_is_quantized_again(tmp_path: Path, qwen2_folder: Path) -> None:
    model = shutil.copytree(qwen2_folder, tmp_path / "model")
    job = ReleaseJob(load_release(write_recipe(tmp_path, model)), tmp_path / "work", push=False, until="gptq")
    first = run_release(job, no_progress, lambda text: None)
    (model / "generation_config.json").write_text('{"do_sample": true}\n')
    second = run_release(job, no_progress, lambda text: None)
    assert statuses(second)["gptq"] == "done" and first.artifact != second.artifact
    assert "do_sample" in (Path(second.artifact) / "generation_config.json").read_text()


def test_bnb_with_a_profile(tmp_path: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = FakeChild(failed=Cell(1, 4))
    monkeypatch.setattr(measuring, "profile_models", partial(profile_models, ask_child=child))
    settings = 'kind = "bnb"\nprofile = "both"'
    job = ReleaseJob(
        load_release(write_recipe(tmp_path, qwen2_folder, release=settings, profile=PROFILE)),
        tmp_path / "work",
        push=False,
    )
    failed = run_release(job, no_progress, lambda text: None)
    assert failed.error is not None and failed.error.exit_code == 1 and statuses(failed)["profile"] == "failed"
    child.failed = None
    result = run_release(job, no_progress, lambda text: None)
    assert result.complete and statuses(result)["bnb"] == "unchanged" and statuses(result)["profile"] == "done"
    models = json.loads((Path(result.artifact) / "profile.json").read_text())["models"]
    assert [model["folder"] for model in models] == ["tiny-qwen2", "tiny-qwen2-bnb-nf4"]


def test_another_licence_than_the_recipe_expects_stops_the_release(release: Release) -> None:
    refused = release(release='profile = "none"\nlicence = "apache-2.0"')
    assert isinstance(refused.error, InputError) and "the recipe expects apache-2.0" in str(refused.error)
    assert statuses(refused)["card"] == "failed"
