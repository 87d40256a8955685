"""OpenVINO IR of models with routed experts or linear attention: what is refused, stacks of experts, logits, states."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_quant.errors import AuditError
from qwen_quant.export import openvino
from qwen_quant.export.behind import Behind
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import ExportOptions
from qwen_quant.export.openvino_spool import STACKS, Spool
from qwen_quant.export.source import ExportSource
from qwen_quant.export.stacks import Place, place_of
from qwen_quant.export.verify import verify
from qwen_quant.progress import no_progress
from qwen_quant.runtime.loading import load_model
from tests.export.making import gptq_folder
from tests.export.openvino_running import compiled, logits, needs_openvino, two_steps
from tests.support.moe import make_family_checkpoint

SMALL = {"num_hidden_layers": 2, "vocab_size": 288}
HYBRID = {**SMALL, "layer_types": ["linear_attention", "full_attention"]}
LAST_EXPERT = "model.layers.1.mlp.experts.7.up_proj"


def artifact(folder: Path, family: str, changes: dict[str, Any], **how: Any) -> Path:
    """An Int4 folder of a family with two blocks."""
    make_family_checkpoint(folder / "model", family, **changes)
    gptq_folder(folder / "model", folder / "q", **how)
    return folder / "q"


def kinds(folder: Path) -> Counter[str]:
    """How many nodes of each kind the CPU runs."""
    nodes = compiled(folder).get_runtime_model().get_ops()
    return Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)


def test_act_order_is_refused_for_experts_alone(tmp_path: Path) -> None:
    for family, refused in (("qwen3_moe", True), ("qwen3_5_text", False)):
        changes = SMALL if refused else HYBRID
        source = ExportSource(artifact(tmp_path / family, family, changes, act_order=True))
        reasons = openvino.OPENVINO.check(source)
        assert [reason.what for reason in reasons] == ["act-order (desc_act) of routed experts"] * refused
        assert all(reason.linears == 24 and reason.max_error is None for reason in reasons)


def test_a_vision_tower_is_left_out_and_said(tmp_path: Path) -> None:
    source = ExportSource(artifact(tmp_path, "qwen3_5", HYBRID))
    assert openvino.OPENVINO.check(source) == []
    dropped = openvino.OPENVINO.plan(source, ExportOptions()).dropped
    assert dropped and all(name.startswith("model.visual.") for name in dropped)


def test_experts_of_a_block_share_their_constants(tmp_path: Path) -> None:
    source = ExportSource(artifact(tmp_path, "qwen3_moe", SMALL))
    assert place_of(source.spec, LAST_EXPERT, STACKS) == Place("model.layers.1.mlp.experts.up_proj", 7, 8)
    assert place_of(source.spec, "model.layers.0.self_attn.q_proj", STACKS).stack == 0
    handle = os.open(tmp_path / "spool", os.O_RDWR | os.O_CREAT)
    with Behind() as behind:
        spool = Spool(tmp_path / "spool", handle, behind)
        spool.place("first", "u8", (3,))
        for k in (1, 0):
            spool.place("stack", "u4", (2, 4))
            spool.fill("stack", [torch.full((2,), k + 1, dtype=torch.uint8)], (k, 2))
        with pytest.raises(AuditError, match="'stack' has 1 bytes"):
            spool.fill("stack", [torch.zeros(1, dtype=torch.uint8)], (0, 2))
        spool.sync()
    os.close(handle)
    assert (tmp_path / "spool").read_bytes()[64:] == bytes([0, 1, 2, 2]) and spool.written == 4


@needs_openvino
@pytest.mark.parametrize(
    ("family", "changes", "how"),
    [
        ("qwen3_moe", {**SMALL, "decoder_sparse_step": 1, "mlp_only_layers": [0]}, {}),
        ("qwen3_moe", {**SMALL, "norm_topk_prob": False}, {"sym": False}),
        ("qwen2_moe", {**SMALL, "norm_topk_prob": True, "mlp_only_layers": []}, {"bits": 8}),
        ("qwen3_next", HYBRID, {"sym": False}),
        ("qwen3_5_text", HYBRID, {"act_order": True}),
        ("qwen3_5_moe", HYBRID, {}),
    ],
)
def test_logits_are_those_of_the_dequantized_model_and_the_large_parts_are_fused(
    tmp_path: Path, family: str, changes: dict[str, Any], how: dict[str, Any]
) -> None:
    folder = artifact(tmp_path, family, changes, **how)
    result, source = export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress), ExportSource(folder)
    assert result.proof.exact and result.proof.equal_linears == len(source.linears)
    difference, size = two_steps(tmp_path / "out", load_model(folder))
    assert difference <= 2e-5 * size, f"largest difference of logits {difference:.2g}"
    found, sparse = kinds(tmp_path / "out"), sum("experts.0.gate_proj" in name for name in source.linears)
    assert found["GatherMatmul"] == 3 * sparse and found["GatedDeltaNet"] == int("layer_types" in changes)
    planned = openvino.OPENVINO.plan(source, ExportOptions()).weight_bytes
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("openvino_model.*")) <= 1.1 * planned


@needs_openvino
def test_states_of_both_kinds_follow_their_sequences(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "qwen3_5_text", HYBRID)
    export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(2))
    request, mask = compiled(tmp_path / "out").create_infer_request(), torch.ones(2, 9, dtype=torch.int64)
    logits(request, ids[:, :6], mask[:, :6], 0)
    found = logits(request, ids[:, 6:], mask, 6, beams=[1, 0])
    crossed = torch.cat([ids[[1, 0], :6], ids[:, 6:]], 1)
    with torch.no_grad():
        expected = load_model(folder)(crossed).logits[:, 6:]
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    request.reset_state()
    with torch.no_grad():
        again = load_model(folder)(ids).logits
    assert (logits(request, ids, mask, 0) - again).abs().max() <= 2e-5 * again.abs().max()


@needs_openvino
def test_an_export_killed_among_the_experts_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, "qwen3_moe", {**SMALL, "decoder_sparse_step": 1}, sym=False)
    monkeypatch.setattr(openvino, "COMMIT_BYTES", 1)
    export_artifact(ExportJob(folder, tmp_path / "whole", "openvino"), no_progress)
    real, read = openvino._tensors, []

    def dies(source: ExportSource, name: str) -> dict[str, torch.Tensor]:
        read.append(name)
        if len(read) == 12:
            raise KeyboardInterrupt
        return real(source, name)

    monkeypatch.setattr(openvino, "_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    assert ".experts." in read[-1]
    export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    assert len(read) == len(ExportSource(folder).linears) + 1
    bins = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("whole", "out")]
    assert bins[0] == bins[1]


@needs_openvino
def test_a_changed_code_of_an_expert_is_found(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "qwen3_moe", SMALL)
    export_artifact(ExportJob(folder, tmp_path / "out", "openvino"), no_progress)
    path, source = tmp_path / "out" / "openvino_model.bin", ExportSource(folder)
    data = bytearray(path.read_bytes())
    place = bytes(data).find(source.packed(LAST_EXPERT).stream.numpy().tobytes())
    assert place >= 0
    data[place + 7] ^= 0x10
    path.write_bytes(data)
    plan = openvino.OPENVINO.plan(source, ExportOptions())
    proof = verify(source, openvino._read_back(tmp_path / "out", source), plan, no_progress)
    assert proof.equal_linears == len(source.linears) - 1 and proof.worst_linear == LAST_EXPERT
