"""What export refuses before or after writing, and what --list says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_quant import cli
from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import folder as folders
from qwen_quant.export.export import ExportJob, ExportResult, export_artifact
from qwen_quant.export.formats import Piece, find_format
from qwen_quant.export.source import ExportSource
from qwen_quant.export.verify import rounded_to
from qwen_quant.progress import no_progress
from tests.export.making import gptq_folder
from tests.support.artifacts import change_config
from tests.support.checkpoints import make_checkpoint
from tests.support.pushable import make_pushable


def run(artifact: Path, out: Path, name: str, **settings: Any) -> ExportResult:
    return export_artifact(ExportJob(artifact, out, name, **settings), no_progress)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("refusals") / "tiny", "qwen3", tied=False)


@pytest.fixture
def artifact(checkpoint: Path, tmp_path: Path) -> Path:
    gptq_folder(checkpoint, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_folder_inside_the_artifact_is_refused(artifact: Path) -> None:
    with pytest.raises(InputError, match="lies inside ARTIFACT"):
        run(artifact, artifact / "awq", "awq")
    assert not (artifact / "awq").exists() and not list(artifact.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_an_artifact_that_changed_after_its_manifest_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_pushable(tmp_path / "ours")
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} has changed"):
        run(folder, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_only_written_says_what_it_is(artifact: Path, tmp_path: Path) -> None:
    run(artifact, tmp_path / "plain", "f32")
    with pytest.raises(InputError, match="is an export to f32") as refused:
        run(tmp_path / "plain", tmp_path / "out", "awq")
    assert "artifact that it was made from" in refused.value.next_step


@pytest.mark.parametrize("rest", ["f16", "bf16", "f32"])
def test_what_a_rest_does_not_explain_is_found(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    run(artifact, tmp_path / "good", "awq", rest=rest)
    written = folders.PlannedWriter.write_bytes

    def damaged(self: Any, name: str, start: int, part: torch.Tensor) -> None:
        wrong = name == "model.norm.weight"
        written(self, name, start, torch.nextafter(part, part * 2) if wrong else part)

    monkeypatch.setattr(folders.PlannedWriter, "write_bytes", damaged)
    with pytest.raises(AuditError, match=f"model.norm.weight.*--rest {rest} does not explain"):
        run(artifact, tmp_path / "bad", "awq", rest=rest)
    assert not (tmp_path / "bad").exists()


def test_what_q8_0_may_change() -> None:
    kept = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    blocks = kept.double().unflatten(-1, (-1, 32))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).half().double()
    stored = ((blocks / step).round() * step).flatten(-2).to(kept.dtype)
    assert rounded_to("q8_0", Piece("x", stored), kept) and not torch.equal(stored, kept)
    wrong = stored.clone()
    wrong[2, 5] += step.flatten()[4].item() * 1.5
    assert not rounded_to("q8_0", Piece("x", wrong), kept) and not rounded_to("bf16", Piece("x", stored), kept)


@pytest.mark.parametrize(
    ("kind", "gguf", "mlx"), [("dynamic", False, False), ("yarn", True, True), ("llama3", False, True)]
)
def test_rotations_that_a_runtime_lacks(artifact: Path, kind: str, gguf: bool, mlx: bool) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **(more if kind == "llama3" else {})}
    change_config(artifact, rope_parameters=rope)
    source = ExportSource(artifact)
    for name, has in (("gguf", gguf), ("mlx", mlx)):
        refused = [reason for reason in find_format(name).check(source) if "rotation" in reason.what]
        assert bool(refused) is not has and all(reason.max_error is None for reason in refused)


def test_a_list_with_what_it_would_ignore(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(artifact), "--list", "--format", "awq"]) == 2
    assert "--list does not go with --format" in capsys.readouterr().err
    sizes = []
    for options in ([], ["--rest", "q8_0"]):
        assert cli.run(["export", str(artifact), "--list", "--json", *options]) == 0
        sizes.append({row["name"]: row["weight_bytes"] for row in json.loads(capsys.readouterr().out)["formats"]})
    assert sizes[1]["awq"] == sizes[0]["awq"] and sizes[1]["gguf"] < sizes[0]["gguf"]


def test_a_format_that_cannot_be_asked_hides_no_other(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "tokenizer.json").write_text("{")
    assert cli.run(["export", str(artifact), "--list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["formats"]}
    assert rows["awq"]["exact"] and not rows["gguf"]["possible"]
    assert "tokenizer" in rows["gguf"]["reasons"][0]["what"]
