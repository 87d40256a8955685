"""Reading published Int4 folders: what is measured, what is dropped, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_quant.errors import InputError
from qwen_quant.export.source import ExportSource
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight
from tests.export.making import edit, gptq_folder
from tests.support.artifacts import change_config
from tests.support.checkpoints import make_checkpoint

LINEAR = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def artifact(checkpoint: Path, tmp_path: Path) -> Path:
    gptq_folder(checkpoint, tmp_path / "artifact")
    return tmp_path / "artifact"


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**settings, **changes})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_what_is_measured(checkpoint: Path, tmp_path: Path, bits: int, checkpoint_format: str) -> None:
    dense = gptq_folder(checkpoint, tmp_path / "a", bits=bits, sym=False, checkpoint_format=checkpoint_format)
    source = ExportSource(tmp_path / "a")
    facts = source.facts
    assert (facts.bits, facts.group_size, facts.sym, source.layout.kind) == (bits, 32, False, checkpoint_format)
    assert not facts.act_order and not facts.ragged and not facts.zero_zeros and not facts.wide_scales
    assert set(source.linears) == set(dense) and not source.unquantized_linears and not source.dropped
    for name, weight in dense.items():
        assert torch.equal(source.dequantized(name), weight)
        assert torch.equal(source.dequantized(name, 3, 9), weight[3:9])
    assert {name for name, _ in source.packed_linears()} == set(dense)


def test_kept_tensors_are_read_by_rows(checkpoint: Path, artifact: Path) -> None:
    source, stored = ExportSource(artifact), load_file(checkpoint / "model.safetensors")
    for name in source.kept:
        assert torch.equal(source.kept_rows(name), stored[name])
    assert torch.equal(source.kept_rows("model.embed_tokens.weight", 7, 19), stored["model.embed_tokens.weight"][7:19])


def test_act_order_is_seen_in_g_idx_and_not_in_the_settings(checkpoint: Path, tmp_path: Path) -> None:
    gptq_folder(checkpoint, tmp_path / "a", act_order=True)
    change_settings(tmp_path / "a", desc_act=False)
    facts = ExportSource(tmp_path / "a").facts
    assert len(facts.act_order) == 14 and facts.group_size == 32


def test_one_group_a_row_is_minus_one(checkpoint: Path, artifact: Path) -> None:
    source, changes = ExportSource(artifact), {}
    for name in source.linears:
        whole = source.quantized(name)
        single = QuantizedWeight(whole.codes, whole.scales[:, :1], whole.zeros[:, :1], torch.zeros_like(whole.g_idx))
        for suffix, tensor in pack_weight(single, 4, "gptq").items():
            changes[f"{name}.{suffix}".replace(".", "__")] = tensor
    edit(artifact, **changes)
    facts = ExportSource(artifact).facts
    assert facts.group_size == -1 and not facts.act_order


def test_wide_scales_zero_zeros_and_minimums(artifact: Path) -> None:
    scales = load_file(artifact / "model.safetensors")
    changes = {name.replace(".", "__"): value.float() for name, value in scales.items() if name.endswith(".scales")}
    key = f"{LINEAR}.scales".replace(".", "__")
    changes[key] = changes[key] * (1 + 2**-13)
    zeros = f"{LINEAR}.qzeros".replace(".", "__")
    edit(artifact, **changes, **{zeros: torch.full_like(scales[f"{LINEAR}.qzeros"], -1)})  # 15 is a zero of 0 in v1
    source = ExportSource(artifact)
    facts, grid = source.facts, source.grid(LINEAR)
    assert facts.wide_scales == (LINEAR,) and facts.zero_zeros == (LINEAR,) and facts.scale_dtype == torch.float32
    error = (grid.scales.half().float() - grid.scales).abs().max() * 15
    assert facts.wide_scale_error == pytest.approx(float(error), rel=1e-6)
    assert not facts.wide_minimums  # zeros of 0, and powers of two elsewhere


def test_zero_biases_of_old_tools_and_tied_heads_are_dropped(artifact: Path) -> None:
    embedding = load_file(artifact / "model.safetensors")["model.embed_tokens.weight"]
    edit(artifact, model__layers__0__mlp__up_proj__bias=torch.zeros(224).half(), lm_head__weight=embedding)
    source = ExportSource(artifact)
    assert set(source.dropped) == {"model.layers.0.mlp.up_proj.bias", "lm_head.weight"}
    assert not set(source.dropped) & set(source.kept)


def test_linears_left_plain_are_kept(checkpoint: Path, artifact: Path) -> None:
    plain = load_file(checkpoint / "model.safetensors")[f"{LINEAR}.weight"]
    parts = {f"{LINEAR}.{suffix}".replace(".", "__"): None for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    edit(artifact, **parts, **{f"{LINEAR}.weight".replace(".", "__"): plain})
    source = ExportSource(artifact)
    assert source.unquantized_linears == (LINEAR,) and f"{LINEAR}.weight" in source.kept


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        _ = ExportSource(folder).facts
    assert caught.value.next_step
    return str(caught.value)


def test_folders_that_are_no_int4_artifact(checkpoint: Path, artifact: Path) -> None:
    assert "16-bit checkpoint" in refused(checkpoint)
    change_settings(artifact, quant_method="bitsandbytes")
    assert "bitsandbytes" in refused(artifact)
    change_config(artifact, quantization_config={"quant_method": "awq", "version": "gemv", "bits": 4})
    assert "gemv" in refused(artifact)
    change_config(artifact, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})
    assert "config_groups" in refused(artifact)
    change_config(artifact, quantization_config={"quant_method": "awq", "version": "gemm", "bits": 4})
    assert "do not fit together" in refused(artifact) or "unexpected" in refused(artifact)


def test_mixed_widths(artifact: Path) -> None:
    change_settings(artifact, dynamic={"+:.*q_proj": {"bits": 8}})
    assert "settings of their own" in refused(artifact)
    rows = {f"g{k}": {"weights": {"num_bits": k}, "format": "pack-quantized"} for k in (4, 8)}
    change_config(artifact, quantization_config={"quant_method": "compressed-tensors", "config_groups": rows})
    assert "different bits" in refused(artifact)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{LINEAR}.scales": None}, "lacks the tensor"),
        ({f"{LINEAR}.g_idx": torch.full((128,), 99, dtype=torch.int32)}, "outside 0..3"),
        ({f"{LINEAR}.scales": torch.full((4, 128), torch.inf).half()}, "NaN or Inf"),
        ({f"{LINEAR}.qzeros": torch.zeros(4, 3, dtype=torch.int32)}, "is needed at 4 bits"),
        ({"model.norm.weight": None}, "lacks the tensor"),
        ({"model.stray.weight": torch.zeros(2)}, "unexpected tensor"),
        ({f"{LINEAR}.weight": torch.zeros(128, 128)}, "both packed and plain"),
    ],
)
def test_damaged_folders(artifact: Path, changes: dict[str, torch.Tensor | None], words: str) -> None:
    edit(artifact, **{name.replace(".", "__"): value for name, value in changes.items()})
    assert words in refused(artifact)
