"""ONNX graphs of families with routed experts or linear attention: their logits, states and stacks."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_quant.export import onnx, onnx_data
from qwen_quant.export.decoder import packed_zeros, read_decoder
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import ExportOptions, Target
from qwen_quant.export.graph_parts import left_out, read_parts
from qwen_quant.export.onnx_experts import takes_qmoe
from qwen_quant.export.source import ExportSource
from qwen_quant.export.verify import verify
from qwen_quant.progress import no_progress
from qwen_quant.runtime.loading import load_model
from tests.export.making import edit, gptq_folder
from tests.support.moe import EXPERTS, TOP_K, make_family_checkpoint

HAS_ONNX = importlib.util.find_spec("onnx") is not None
HAS_RUNTIME = HAS_ONNX and importlib.util.find_spec("onnxruntime") is not None
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx: pip install 'qwen-quant[onnx]'")
needs_runtime = pytest.mark.skipif(not HAS_RUNTIME, reason="needs onnx and onnxruntime")


def artifact(folder: Path, family: str, changes: dict[str, Any] | None = None, **how: Any) -> Path:
    make_family_checkpoint(folder / "model", family, **(changes or {}))
    gptq_folder(folder / "model", folder / "q", **how)
    return folder / "q"


def test_the_parts_of_each_family_are_those_of_its_config(tmp_path: Path) -> None:
    for family in ("qwen2_moe", "qwen3_moe"):
        source = ExportSource(artifact(tmp_path / family, family))
        assert onnx.ONNX.check(source) == []
        parts = read_parts(source.spec)
        assert parts.experts is not None and parts.mixer is None and not parts.one_plus
        assert (parts.experts.count, parts.experts.top_k, parts.experts.width) == (EXPERTS, TOP_K, 64)
        assert parts.experts.shared == parts.sparse[0] == (family == "qwen2_moe")
        assert parts.experts.normalized == (family == "qwen3_moe")
        assert parts.sparse == ((True, False, True, True) if family == "qwen2_moe" else (False, True, False, True))
        assert takes_qmoe(source.facts, parts.experts, 128)
        for change in ({"bits": 8}, {"sym": False, "group_size": 64}):  # 64: a single group in the rows of down
            assert not takes_qmoe(replace(source.facts, **change), parts.experts, 128)


def test_linear_attention_is_described_and_the_rest_of_the_file_left_out(tmp_path: Path) -> None:
    for family in ("qwen3_next", "qwen3_5"):
        source = ExportSource(artifact(tmp_path / family, family, sym=False))
        assert onnx.ONNX.check(source) == []
        parts = read_parts(source.spec)
        assert parts.mixer is not None and parts.gated and parts.one_plus
        assert parts.linear == (True, True, True, False) and parts.mixer.fused == (family == "qwen3_next")
        assert (parts.mixer.channels, parts.mixer.kernel) == (2 * 2 * 32 + 4 * 32, 4)
        assert bool(left_out(source)) == (family == "qwen3_5")
        assert set(left_out(source)) <= set(onnx.ONNX.plan(source, ExportOptions()).dropped)
        decoder = read_decoder(source)
        config = onnx.genai_config(source, decoder, parts, tmp_path)["model"]
        assert config["decoder"]["inputs"]["past_recurrent_names"] == "past.%d.recurrent"
        assert config["type"] == ("qwen3_5_text" if family == "qwen3_5" else "qwen3_5_moe_text")


def test_the_newest_family_is_refused_with_its_own_reason(tmp_path: Path) -> None:
    (reason,) = onnx.ONNX.check(ExportSource(artifact(tmp_path, "qwen4_exp_text")))
    assert reason.what == "family qwen4_exp_text" and "onnxruntime-genai 0.18" in reason.why


def test_experts_that_are_not_quantized_are_refused(tmp_path: Path) -> None:
    folder, name = artifact(tmp_path, "qwen3_moe"), "model__layers__1__mlp__experts__3__up_proj"
    parts: dict[str, Any] = {f"{name}__{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}
    edit(folder, **parts, **{f"{name}__weight": torch.zeros(64, 128, dtype=torch.bfloat16)})
    (reason,) = onnx.ONNX.check(ExportSource(folder))
    assert (reason.what, reason.max_error, reason.linears) == ("experts that are not quantized", None, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_stacks_hold_the_codes_of_every_expert(tmp_path: Path, bits: int) -> None:
    source = ExportSource(artifact(tmp_path, "qwen3_moe", {"num_hidden_layers": 2}, bits=bits, sym=False))
    (tmp_path / "out").mkdir()
    decoder, target = read_decoder(source), Target(tmp_path / "out")
    places = onnx_data.write_data(source, ExportOptions(), target, decoder, no_progress)
    data, mlp = np.fromfile(tmp_path / "out" / onnx_data.DATA_FILE, np.uint8), "model.layers.1.mlp"

    def stack(name: str) -> np.ndarray[Any, Any]:
        place = places[f"{mlp}.experts.{name}"]
        kind = np.float32 if place.dtype == torch.float32 else np.uint8
        return data[place.start : place.start + place.nbytes].view(kind).reshape(place.shape)

    for expert in (0, EXPERTS - 1):
        for role, part, rows in (("gate", "gate_up", (0, 2)), ("up", "gate_up", (1, 2)), ("down", "down", (0, 1))):
            packed = source.packed(f"{mlp}.experts.{expert}.{role}_proj")
            mine = slice(rows[0], None, rows[1])
            assert np.array_equal(stack(f"{part}.codes")[expert, mine], packed.stream.numpy())
            assert np.array_equal(stack(f"{part}.scales")[expert, mine], packed.grid.scales.float().numpy())
            zeros = packed_zeros(packed.grid.zeros, bits).numpy()
            assert np.array_equal(stack(f"{part}.zeros")[expert, mine], zeros)
    assert all(place.start % 64 == 0 for place in places.values())


class Session:
    """onnxruntime on an exported folder; keeps what the graph returns between steps."""

    def __init__(self, folder: Path, batch: int) -> None:
        import onnxruntime

        path = folder / onnx.MODEL_FILE
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.states = {
            entry.name: np.zeros([batch, *(0 if isinstance(k, str) else k for k in entry.shape[1:])], np.float32)
            for entry in self.session.get_inputs()[2:]
        }

    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of new tokens [B, L]; mask [B, past + L]."""
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **self.states}
        first, *present = self.session.run(None, feed)
        self.states = dict(zip(self.states, present, strict=True))
        return torch.from_numpy(first)


def reference(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(folder)(ids).logits
    return logits


SPARSE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_moe", {}, {}),
    ("qwen2_moe", {}, {"sym": False}),
    ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": []}, {"bits": 8, "sym": False}),
    ("qwen3_moe", {"norm_topk_prob": False, "moe_intermediate_size": 32}, {"sym": False}),
    ("qwen3_5", {}, {"sym": False}),
    ("qwen3_5_moe_text", {}, {}),
    ("qwen3_next", {}, {"bits": 8}),
]


@needs_runtime
@pytest.mark.parametrize(("family", "changes", "how"), SPARSE)
def test_logits_are_those_of_the_dequantized_model(
    tmp_path: Path, family: str, changes: dict[str, Any], how: dict[str, Any]
) -> None:
    folder = artifact(tmp_path, family, changes, **how)
    result = export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    assert result.proof.exact and result.proof.equal_linears == len(ExportSource(folder).linears)
    ids = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(1))
    expected, session, ones = reference(folder, ids), Session(tmp_path / "out", 2), torch.ones_like(ids)
    steps = [session.step(ids[:, :10], ones[:, :10])]
    steps += [session.step(ids[:, k : k + 1], ones[:, : k + 1]) for k in (10, 11, 12)]
    difference = (torch.cat(steps, 1) - expected).abs().max()
    assert difference <= 2e-5 * expected.abs().max(), f"largest difference of logits {difference:.2g}"
    session = Session(tmp_path / "out", 1)  # several tokens onto a cache: of one sequence only, says the operator
    pieces = [session.step(ids[:1, a:b], ones[:1, :b]) for a, b in ((0, 2), (2, 8), (8, 13))]
    assert (torch.cat(pieces, 1) - expected[:1]).abs().max() <= 2e-5 * expected.abs().max()


@needs_runtime
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_text"])
def test_padding_on_the_right_changes_nothing(tmp_path: Path, family: str) -> None:
    folder = artifact(tmp_path, family)
    export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(2))
    mask, session = torch.ones(2, 11, dtype=torch.int64), Session(tmp_path / "out", 2)
    mask[1, 5:9] = 0  # the second has five tokens; the two that follow are generated ones
    first, second = session.step(ids[:, :9], mask[:, :9]), session.step(ids[:, 9:10], mask[:, :10])
    last = session.step(ids[:, 10:], mask)
    for row, length in ((0, 9), (1, 5)):
        expected = reference(folder, torch.cat([ids[row, :length], ids[row, 9:]])[None])[0]
        found = torch.cat([first[row, :length], second[row], last[row]])
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@needs_onnx
def test_a_killed_export_of_experts_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, "qwen3_moe", {"num_hidden_layers": 2}, sym=False)
    monkeypatch.setattr(onnx_data, "COMMIT_BYTES", 1)
    export_artifact(ExportJob(folder, tmp_path / "whole", "onnx"), no_progress)
    real, read = onnx_data._tensors, []

    def dies(source: ExportSource, name: str) -> dict[str, torch.Tensor]:
        read.append(name)
        if name.endswith("experts.4.up_proj") and read.count(name) == 1:
            raise KeyboardInterrupt
        return real(source, name)

    monkeypatch.setattr(onnx_data, "_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    repeated = [name for name in set(read) if read.count(name) > 1]
    assert repeated == ["model.layers.1.mlp.experts.4.up_proj"]
    for name in (onnx.MODEL_FILE, onnx_data.DATA_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@needs_onnx
def test_a_changed_byte_of_a_stack_is_found(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "qwen3_moe", {"num_hidden_layers": 2})
    export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    source, path = ExportSource(folder), tmp_path / "out" / onnx_data.DATA_FILE
    name = "model.layers.1.mlp.experts.3.up_proj"
    data = bytearray(path.read_bytes())
    place = bytes(data).find(source.packed(name).stream[5].numpy().tobytes())
    data[place + 7] ^= 0x10
    path.write_bytes(data)
    plan = onnx.ONNX.plan(source, ExportOptions())
    proof = verify(source, onnx._read_back(tmp_path / "out", source), plan, no_progress)
    assert proof.equal_linears == proof.linears - 1 and proof.worst_linear == name
