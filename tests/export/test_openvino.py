"""OpenVINO IR: refusals without the library; with it, weights, logits and the KV cache of the saved graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import openvino
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import ExportOptions, Target
from qwen_quant.export.pivot import PackedRows, unpack_codes
from qwen_quant.export.source import ExportSource
from qwen_quant.export.verify import judge, verify
from qwen_quant.progress import no_progress
from qwen_quant.runtime.loading import load_model
from tests.export.making import gptq_folder
from tests.export.openvino_running import HAS_OPENVINO, needs_openvino, two_steps
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint


def artifact(folder: Path, family: str = "qwen2", *, tied: bool = True, **how: Any) -> Path:
    if family == "qwen":
        copy_checkpoint(folder / "model", "tiny7b")
    else:
        make_checkpoint(folder / "model", family, tied=tied)
    gptq_folder(folder / "model", folder / "q", **how)
    return folder / "q"


def test_what_the_graph_cannot_hold_is_refused(tmp_path: Path) -> None:
    assert openvino.OPENVINO.check(ExportSource(artifact(tmp_path))) == []
    for family, bits in (("qwen4_exp_text", 4), ("qwen2", 3)):
        folder = tmp_path / f"{family}{bits}"
        make_family_checkpoint(folder, family) if "exp" in family else make_checkpoint(folder, family)
        gptq_folder(folder, tmp_path / f"{family}{bits}-q", bits=bits)
        reasons = openvino.OPENVINO.check(ExportSource(tmp_path / f"{family}{bits}-q"))
        assert len(reasons) == 1 and reasons[0].max_error is None
        assert reasons[0].what in ("family qwen4_exp_text", "3 bit codes")


def test_columns_are_sorted_by_group_and_the_order_leads_back(tmp_path: Path) -> None:
    source = ExportSource(artifact(tmp_path, act_order=True, sym=False))
    assert openvino.OPENVINO.check(source) == []
    for name, packed in source.packed_linears():
        stream, order = openvino.sorted_columns(packed)
        assert order is not None and sorted(order.tolist()) == list(range(packed.shape[1]))
        assert bool((packed.grid.g_idx[order].diff() >= 0).all())
        plain = unpack_codes(packed.stream, 4)
        assert torch.equal(unpack_codes(stream, 4), plain[:, order]), name
        ordered = PackedRows(
            packed.stream, 4, type(packed.grid)(packed.grid.scales, packed.grid.zeros, packed.grid.g_idx.sort().values)
        )
        assert openvino.sorted_columns(ordered)[1] is None


@pytest.mark.skipif(HAS_OPENVINO, reason="openvino is installed")
def test_a_missing_library_names_the_extra_before_anything_is_written(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    with pytest.raises(InputError, match="needs the package openvino") as error:
        export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    assert "qwen-quant[openvino]" in error.value.next_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "q"]


@needs_openvino
@pytest.mark.parametrize(
    ("family", "tied", "how"),
    [
        ("qwen2", True, {}),
        ("qwen3", False, {"sym": False}),
        ("qwen2", False, {"sym": False, "act_order": True}),
        ("qwen3", True, {"bits": 8}),
        ("qwen", False, {}),
    ],
)
def test_the_graph_gives_the_logits_of_the_dequantized_model(
    tmp_path: Path, family: str, tied: bool, how: dict[str, Any]
) -> None:
    folder = artifact(tmp_path, family, tied=tied, **how)
    result = export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    assert result.proof.exact and result.proof.equal_linears == len(ExportSource(folder).linears)
    assert not any(name.startswith(".") for name in result.files)
    size = (tmp_path / "out" / "openvino_model.bin").stat().st_size
    planned = openvino.OPENVINO.plan(ExportSource(folder), ExportOptions()).weight_bytes
    assert size <= planned - 2 * openvino._XML_BYTES_PER_LAYER + 8192
    assert (tmp_path / "out" / "openvino_model.xml").stat().st_size <= 2.2 * openvino._XML_BYTES_PER_LAYER
    difference, size = two_steps(tmp_path / "out", load_model(folder))
    assert difference <= 2e-5 * size, f"largest difference of logits {difference:.2g}"


def test_a_disk_without_room_for_the_temporary_copy_is_an_error_in_advance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ExportSource(artifact(tmp_path))
    size = openvino.OPENVINO.plan(source, ExportOptions()).weight_bytes
    monkeypatch.setattr("qwen_quant.resume.free_disk_bytes", lambda folder: 2 * size - 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="is full"):
        openvino.OPENVINO.write(source, ExportOptions(), Target(tmp_path / "out"), no_progress)
    assert list((tmp_path / "out").iterdir()) == []


@needs_openvino
def test_a_killed_export_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, "qwen2", sym=False, act_order=True)
    monkeypatch.setattr(openvino, "COMMIT_BYTES", 1)
    export_artifact(ExportJob(folder, tmp_path / "whole", "openvino"), no_progress)
    real, read = openvino._tensors, []

    def dies(source: ExportSource, name: str) -> dict[str, torch.Tensor]:
        read.append(name)
        if len(read) == 6:
            raise KeyboardInterrupt
        return real(source, name)

    monkeypatch.setattr(openvino, "_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    assert len(read) == 15 and read[5] == read[6]  # 14 linears, the sixth twice
    bins = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("whole", "out")]
    assert bins[0] == bins[1] and not (tmp_path / "out" / openvino.SPOOL_FILE).exists()


@needs_openvino
def test_a_changed_constant_is_found(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    path = tmp_path / "out" / "openvino_model.bin"
    data = bytearray(path.read_bytes())
    stream = ExportSource(folder).packed("model.layers.1.mlp.up_proj").stream.numpy().tobytes()
    place = bytes(data).find(stream)
    assert place >= 0
    data[place + 7] ^= 0x10
    path.write_bytes(data)
    source = ExportSource(folder)
    proof = verify(
        source,
        openvino._read_back(tmp_path / "out", source),
        openvino.OPENVINO.plan(source, ExportOptions()),
        no_progress,
    )
    assert proof.equal_linears == 13 and proof.worst_linear == "model.layers.1.mlp.up_proj"
    with pytest.raises(AuditError):
        judge(proof, [], None)
