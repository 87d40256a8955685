"""Whole exports: exact in every direction, refused with a reason, proven by consumers, nothing half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_quant import cli
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.errors import AuditError, InputError, UsageError
from qwen_quant.export import export as driver
from qwen_quant.export import folder as folders
from qwen_quant.export.export import ExportJob, ExportResult, export_artifact, offers
from qwen_quant.export.formats import LOCATIONS, Piece, all_formats, find_format, require
from qwen_quant.export.source import ExportSource
from qwen_quant.progress import no_progress
from qwen_quant.recipe import RunConfig
from qwen_quant.runtime.loading import load_model
from tests.export.making import edit, gptq_folder, read_awq, read_compressed, read_gptq
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import FAMILY_CONFIGS, make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint

PACKED = ("gptq", "gptq_v2", "awq", "compressed-tensors")
LINEAR = "model.layers.1.self_attn.q_proj"


def run(artifact: Path, out: Path, name: str, **settings: Any) -> ExportResult:
    own = {key: settings.pop(key) for key in ("rest", "allow_inexact") if key in settings}
    return export_artifact(ExportJob(artifact, out, name, run=RunConfig(**settings), **own), no_progress)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("export") / "tiny", "qwen3", tied=False)


@pytest.fixture
def artifact(checkpoint: Path, tmp_path: Path) -> Path:
    gptq_folder(checkpoint, tmp_path / "artifact")
    return tmp_path / "artifact"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def slow_read(folder: Path, name: str, linear: str, bits: int) -> np.ndarray:
    tensors = weights(folder)
    if name == "awq":
        return read_awq(tensors, linear)
    if name == "compressed-tensors":
        return read_compressed(tensors, linear, bits)
    return read_gptq(tensors, linear, bits, 1 if name == "gptq" else 2)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_format_holds_the_same_weights(checkpoint: Path, tmp_path: Path, bits: int, sym: bool) -> None:
    dense = gptq_folder(checkpoint, tmp_path / "artifact", bits=bits, sym=sym)
    for name in PACKED:
        if name == "awq" and bits == 8:
            continue
        result = run(tmp_path / "artifact", tmp_path / name, name)
        assert result.exact and result.proof.equal_linears == len(dense) == result.proof.linears
        for linear, weight in dense.items():
            assert np.array_equal(slow_read(tmp_path / name, name, linear, bits), weight.numpy())


@pytest.mark.parametrize("sym", [True, False])
def test_every_pair_of_formats_and_back(checkpoint: Path, tmp_path: Path, sym: bool) -> None:
    gptq_folder(checkpoint, tmp_path / "gptq", sym=sym)
    original = weights(tmp_path / "gptq")
    for name in PACKED[1:]:
        run(tmp_path / "gptq", tmp_path / name, name)
    for first in PACKED:
        for second in PACKED:
            out = tmp_path / f"{first}-{second}"
            assert run(tmp_path / first, out, second).source_kind == first
            assert same(weights(out), weights(tmp_path / second))
    assert same(weights(tmp_path / "awq-gptq"), original)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_keeps_odd_widths_and_act_order(checkpoint: Path, tmp_path: Path, bits: int, act_order: bool) -> None:
    gptq_folder(checkpoint, tmp_path / "a", bits=bits, sym=False, act_order=act_order)
    result = run(tmp_path / "a", tmp_path / "b", "gptq_v2")
    assert result.exact and result.act_order == act_order
    settings = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (settings["desc_act"], settings["bits"], settings["checkpoint_format"]) == (act_order, bits, "gptq_v2")
    run(tmp_path / "b", tmp_path / "c", "gptq")
    assert same(weights(tmp_path / "c"), weights(tmp_path / "a"))


@pytest.mark.parametrize("family", [*FAMILY_CONFIGS, "qwen"])
def test_every_family_through_all_formats(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    if family == "qwen":
        copy_checkpoint(source)
    else:
        make_family_checkpoint(source, family)
    gptq_folder(source, tmp_path / "gptq", sym=False)
    run(tmp_path / "gptq", tmp_path / "awq", "awq")
    run(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    result = run(tmp_path / "ct", tmp_path / "again", "gptq")
    assert result.exact and same(weights(tmp_path / "again"), weights(tmp_path / "gptq"))
    skipped = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    plain = {name.removesuffix(".weight") for name in weights(tmp_path / "awq")}
    assert set(skipped or ()) <= plain
    if "moe" in family or family == "qwen3_next":
        assert sum(name.endswith("mlp.gate") for name in skipped) >= 2
    ignore = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore[0] == "lm_head" and len(ignore) == 1 + len(ExportSource(tmp_path / "ct").spec.family.skips)


def test_ours_in_transformers(artifact: Path, tmp_path: Path) -> None:
    """transformers with our quantizer gives the logits of the dequantized artifact from every folder that it reads."""
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        expected = load_model(artifact)(ids).logits
        for name in ("gptq", "gptq_v2", "f32"):
            run(artifact, tmp_path / name, name)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
            assert float((model(ids).logits - expected).abs().max()) < 1e-4
        for name in ("awq", "compressed-tensors"):
            run(artifact, tmp_path / name, name)
            run(tmp_path / name, tmp_path / f"{name}-f32", "f32")
            assert torch.equal(load_model(tmp_path / f"{name}-f32")(ids).logits, expected)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_rounding_is_refused_or_reported(artifact: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="significant bits") as caught:
        run(artifact, tmp_path / "out", name)
    assert "f32" in caught.value.next_step and "--allow-inexact" in caught.value.next_step
    result = run(artifact, tmp_path / "out", name, allow_inexact=True)
    source, dtype = ExportSource(artifact), torch.bfloat16 if name == "bf16" else torch.float16
    errors = [float((source.dequantized(n).to(dtype) - source.dequantized(n)).abs().max()) for n in source.linears]
    assert not result.exact and result.proof.max_abs_difference == max(errors) > 0
    assert result.inexact[0].max_error is not None and max(errors) <= result.inexact[0].max_error
    manifest = read_manifest(tmp_path / "out")
    assert manifest["proof"]["max_abs_difference"] == max(errors) and manifest["exact"] is False
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def reasons(folder: Path, name: str) -> str:
    with pytest.raises(InputError) as caught:
        run(folder, folder.parent / "never", name, allow_inexact=True)
    assert not (folder.parent / "never").exists() and not (folder.parent / ".never.partial").exists()
    return f"{caught.value} {caught.value.next_step}"


def test_what_cannot_be_exact_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    gptq_folder(checkpoint, tmp_path / "order", act_order=True)
    for name in ("awq", "compressed-tensors"):
        text = reasons(tmp_path / "order", name)
        assert "act-order" in text and "14 linears" in text and "gptq_v2" in text
    gptq_folder(checkpoint, tmp_path / "eight", bits=8)
    assert "8 bit codes" in reasons(tmp_path / "eight", "awq")
    gptq_folder(checkpoint, tmp_path / "three", bits=3)
    assert "3 bit codes" in reasons(tmp_path / "three", "compressed-tensors")
    gptq_folder(checkpoint, tmp_path / "zero", sym=False, checkpoint_format="gptq_v2")
    edit(tmp_path / "zero", **{f"{LINEAR}.qzeros".replace(".", "__"): torch.zeros(4, 16, dtype=torch.int32)})
    assert "zeros of 0" in reasons(tmp_path / "zero", "gptq")
    assert run(tmp_path / "zero", tmp_path / "awq", "awq").exact
    assert run(tmp_path / "awq", tmp_path / "v2", "gptq_v2").exact


def test_wide_scales_are_rounded_only_when_allowed(artifact: Path, tmp_path: Path) -> None:
    run(artifact, tmp_path / "ct", "compressed-tensors")
    scales = {n: v.float() * (1 + 2**-13) for n, v in weights(tmp_path / "ct").items() if n.endswith("weight_scale")}
    edit(tmp_path / "ct", **{name.replace(".", "__"): value for name, value in scales.items()})
    (tmp_path / "ct" / "qwen-quant.json").unlink()  # it records other bytes
    with pytest.raises(InputError, match="beyond FP16") as caught:
        run(tmp_path / "ct", tmp_path / "out", "gptq")
    assert "compressed-tensors" in caught.value.next_step
    result = run(tmp_path / "ct", tmp_path / "out", "gptq", allow_inexact=True)
    bound = result.inexact[0].max_error
    assert bound is not None and 0 < result.proof.max_abs_difference <= bound
    assert run(tmp_path / "ct", tmp_path / "same", "compressed-tensors").exact


def test_group_sizes_that_runtimes_lack(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.artifacts.GROUP_SIZE", 16)
    gptq_folder(checkpoint, tmp_path / "sixteen")
    for name in PACKED:
        assert "group_size 16" in reasons(tmp_path / "sixteen", name)
    assert run(tmp_path / "sixteen", tmp_path / "f32", "f32").exact


def test_offers_of_this_artifact(checkpoint: Path, tmp_path: Path) -> None:
    gptq_folder(checkpoint, tmp_path / "a", act_order=True)
    rows = {row.name: row for row in offers(ExportSource(tmp_path / "a"), all_formats())}
    assert rows["gptq"].exact and not rows["awq"].possible and rows["awq"].weight_bytes is None
    assert rows["bf16"].possible and not rows["bf16"].exact
    for name in ("gptq_v2", "f32"):
        run(tmp_path / "a", tmp_path / name, name)
        size = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        assert rows[name].weight_bytes == size


def test_manifest_companions_and_shards(artifact: Path, tmp_path: Path) -> None:
    (artifact / "modeling_stray.py").write_text("raise SystemExit")
    result = run(artifact, tmp_path / "out", "awq", max_shard_size_bytes=40_000)
    out = tmp_path / "out"
    manifest = read_manifest(out)
    assert manifest["source"]["weights_sha256"] == weights_sha256(artifact) == result.source_sha256
    assert (manifest["method"], manifest["format"], manifest["exact"]) == ("export", "awq", True)
    assert set(manifest["output"]["sha256"]) == {p.name for p in out.iterdir()} - {"qwen-quant.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (artifact / name).read_bytes()
    assert "modeling_stray.py" in result.left_behind and not (out / "modeling_stray.py").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == {path.name for path in shards}
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["quantization_config"]["group_size"] == 32


def test_rest_changes_only_what_is_not_quantized(artifact: Path, tmp_path: Path) -> None:
    result = run(artifact, tmp_path / "out", "gptq", rest="f32")
    assert result.exact  # every BF16 value is an FP32 value
    assert weights(tmp_path / "out")["model.norm.weight"].dtype == torch.float32
    edit(artifact, model__norm__weight=torch.full((128,), 1e-8).bfloat16())
    result = run(artifact, tmp_path / "small", "gptq", rest="f16")
    assert result.proof.max_abs_difference == 0 < result.proof.kept_max_abs_difference < 1e-7 and not result.exact
    edit(artifact, model__norm__weight=torch.full((128,), 1e6).bfloat16())
    with pytest.raises(InputError, match="cannot hold"):
        run(artifact, tmp_path / "large", "gptq", rest="f16")
    with pytest.raises(UsageError, match="q8_0"):
        run(artifact, tmp_path / "large", "gptq", rest="q8_0")


def test_a_killed_export_continues(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(artifact, tmp_path / "whole", "awq", max_shard_size_bytes=40_000)
    monkeypatch.setattr(folders, "COMMIT_BYTES", 20_000)
    written: list[str] = []
    real = folders.PlannedWriter.write

    def write(self: folders.PlannedWriter, name: str, tensor: torch.Tensor) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, tensor)

    monkeypatch.setattr(folders.PlannedWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(artifact, tmp_path / "out", "awq", max_shard_size_bytes=40_000)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    with pytest.raises(InputError, match="other settings"):
        run(artifact, tmp_path / "out", "gptq", max_shard_size_bytes=40_000)
    monkeypatch.setattr(
        folders.PlannedWriter, "write", lambda self, name, t: (written.append(name), real(self, name, t))
    )
    assert run(artifact, tmp_path / "out", "awq", max_shard_size_bytes=40_000).exact
    assert written.count(written[0]) == 1 and written[10] in written[:9]  # only what was not committed is repeated
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "model.norm.weight"])
def test_one_wrong_value_is_found(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    real = folders.PlannedWriter.finish

    def finish(self: folders.PlannedWriter) -> None:
        name = part if "." in part else f"{LINEAR}.{part}"
        shard, _ = self._place[name]
        with open(self.folder / shard.file_name, "r+b") as file:
            file.seek(shard.offsets[name] + 1)
            byte = file.read(1)
            file.seek(shard.offsets[name] + 1)
            file.write(bytes([byte[0] ^ 0x10]))
        real(self)

    monkeypatch.setattr(folders, "COMMIT_BYTES", 1)  # what failed counted as written
    monkeypatch.setattr(folders.PlannedWriter, "finish", finish)
    with pytest.raises(AuditError, match="difference"):
        run(artifact, tmp_path / "out", "awq", allow_inexact=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(folders.PlannedWriter, "finish", real)
    assert run(artifact, tmp_path / "out", "awq").exact


def fake_format(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """`f32` with its pieces passed through `change`."""
    row = find_format("f32")

    def read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
        return change(list(row.read_back(folder, source)))

    monkeypatch.setattr(driver, "find_format", lambda name: replace(row, read_back=read_back))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pieces: iter(pieces[1:]), "did not come back whole"),
        (lambda pieces: iter(pieces[:-1]), "did not come back whole"),
        (lambda pieces: iter([*pieces, pieces[0]]), "rows come in order"),
        (lambda pieces: iter([*pieces, Piece("stray", pieces[0].values)]), "does not have"),
        (lambda pieces: iter([replace(pieces[0], values=pieces[0].values * math.nan), *pieces[1:]]), "inf"),
        (lambda pieces: iter([replace(pieces[0], values=pieces[0].values[:, 1:]), *pieces[1:]]), "columns"),
        (lambda pieces: iter([replace(pieces[0], values=pieces[0].values[:-1]), *pieces[1:]]), "whole"),
    ],
)
def test_reading_back_is_checked_itself(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    fake_format(monkeypatch, change)
    with pytest.raises(AuditError, match=words):
        run(artifact, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing(artifact: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError) as caught:
        run(artifact, out, "compressed_tensor")
    assert "compressed-tensors" in caught.value.next_step
    with pytest.raises(InputError, match="16-bit checkpoint"):
        run(checkpoint, out, "awq")
    with pytest.raises(InputError, match="holds MODEL"):
        run(artifact, artifact, "awq", force=True)
    out.mkdir()
    with pytest.raises(InputError, match="exists"):
        run(artifact, out, "awq")
    out.rmdir()
    monkeypatch.setattr("qwen_quant.resume.free_disk_bytes", lambda path: 1000)
    with pytest.raises(InputError, match="full"):
        run(artifact, out, "awq")
    with pytest.raises(InputError) as missing:
        require("no_such_package_here", "gguf", "gguf")
    assert "pip install 'qwen-quant[gguf]'" in missing.value.next_step
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}


def test_every_row_of_the_table() -> None:
    for name, row in zip(LOCATIONS, all_formats(), strict=True):
        assert row.name == name and row.summary and row.runtimes


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(artifact), str(tmp_path / "out"), "--format", "awq"]) == 0
    text = capsys.readouterr().out
    assert "14 of 14" in text and "vLLM" in text
    arguments = ["export", str(tmp_path / "out"), str(tmp_path / "ct"), "--format", "compressed-tensors", "--json"]
    assert cli.run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["exact"] is True and document["proof"]["max_abs_difference"] == 0
    assert cli.run(["export", str(artifact), "--list"]) == 0
    text = capsys.readouterr().out
    assert "exactly" in text and "bf16" in text and "use --format f32" in text
    assert cli.run(["export", str(artifact), "--list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["formats"]}
    assert rows["gptq"]["exact"] and not rows["f16"]["exact"] and rows["f16"]["reasons"][0]["max_error"] > 0
    assert cli.run(["export", str(artifact), str(tmp_path / "x"), "--format", "awk"]) == 2
    assert "did you mean awq?" in capsys.readouterr().err
    assert cli.run(["export", str(artifact), str(tmp_path / "x")]) == 2
    assert "--format is missing" in capsys.readouterr().err
    assert cli.run(["export", str(artifact), str(tmp_path / "x"), "--format", "bf16"]) == 3
    assert not (tmp_path / "x").exists()
