"""MLX folders against a slow reader of their layout; the real library reads them back where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_quant.errors import InputError
from qwen_quant.export import mlx
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import ExportOptions, Target
from qwen_quant.export.source import ExportSource
from qwen_quant.progress import no_progress
from tests.export.making import gptq_folder
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import make_family_checkpoint

HAS_MLX = importlib.util.find_spec("mlx") is not None


def written(artifact: Path, out: Path) -> tuple[ExportSource, dict[str, torch.Tensor]]:
    """The files of the format alone, without reading back."""
    source = ExportSource(artifact)
    out.mkdir()
    assert mlx.MLX.check(source) == []
    plan = mlx.MLX.plan(source, ExportOptions())
    mlx.MLX.write(source, ExportOptions(), Target(out), no_progress)
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == plan.weight_bytes
    return source, load_file(out / "model.safetensors")


def affine(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """code * scale + bias, one bit of the stream at a time."""
    rows, stream = weight.shape[0], np.unpackbits(weight.view(np.uint8), axis=1, bitorder="little")
    codes = (stream.reshape(rows, -1, bits) << np.arange(bits)).sum(2).astype(np.float32)
    return codes * scales.repeat(group_size, 1) + biases.repeat(group_size, 1)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layout_means_the_weights_of_the_source(tmp_path: Path, bits: int, sym: bool) -> None:
    make_checkpoint(tmp_path / "model", "qwen3", tied=False)
    dense = gptq_folder(tmp_path / "model", tmp_path / "q", bits=bits, sym=sym)
    source, tensors = written(tmp_path / "q", tmp_path / "out")
    for name, expected in dense.items():
        parts = [tensors[f"{name}.{suffix}"].numpy() for suffix in mlx.SUFFIXES]
        assert parts[0].dtype == np.uint32
        assert np.array_equal(affine(*parts, bits, source.facts.group_size), expected.numpy()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert set(tensors) - {f"{n}.{s}" for n in dense for s in mlx.SUFFIXES} == set(source.kept)


def test_linear_attention_is_stored_as_mlx_lm_runs_it(tmp_path: Path) -> None:
    make_family_checkpoint(tmp_path / "model", "qwen3_5_moe")
    dense = gptq_folder(tmp_path / "model", tmp_path / "q")
    source, tensors = written(tmp_path / "q", tmp_path / "out")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    block = "model.language_model.layers.0"
    for name in (f"{block}.input_layernorm.weight", "model.language_model.norm.weight"):
        assert torch.equal(tensors[name], 1 + stored[name].float())  # what the model multiplies by, in FP32
    inner, conv = f"{block}.linear_attn.norm.weight", f"{block}.linear_attn.conv1d.weight"
    assert torch.equal(tensors[inner], stored[inner])
    assert torch.equal(tensors[conv], stored[conv].moveaxis(2, 1)) and tensors[conv].shape[2] == 1
    parts = [tensors[f"{block}.linear_attn.in_proj_qkv.{suffix}"].numpy() for suffix in mlx.SUFFIXES]
    assert np.array_equal(affine(*parts, 4, 32), dense[f"{block}.linear_attn.in_proj_qkv"].numpy())
    left_out = mlx.MLX.plan(source, ExportOptions()).dropped
    assert left_out and all("visual" in name for name in left_out) and not any("visual" in name for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert config["full_attention_interval"] == 4 and config["num_experts"] == source.spec.expert_count
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_models_that_mlx_lm_builds_otherwise_are_refused(tmp_path: Path) -> None:
    def refused(family: str, **changes: Any) -> list[str]:
        folder = tmp_path / f"{family}{len(changes)}"
        gptq_folder(make_family_checkpoint(folder, family, **changes), folder / "q")
        return [reason.what for reason in mlx.MLX.check(ExportSource(folder / "q"))]

    assert refused("qwen2_moe") == ["blocks without experts"]
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    assert refused("qwen3_5_text", layer_types=kinds) == ["the order of attention kinds"]
    assert refused("qwen4_exp_text") == ["family qwen4_exp_text"]


def test_experts_are_stacked_as_mlx_lm_names_them(tmp_path: Path) -> None:
    make_family_checkpoint(tmp_path / "model", "qwen3_moe")
    dense = gptq_folder(tmp_path / "model", tmp_path / "q")
    source, tensors = written(tmp_path / "q", tmp_path / "out")
    assert not any(".experts." in name for name in tensors)
    experts = [name for name in dense if ".experts." in name]
    assert len(experts) >= 6
    for name in experts:
        head, _, tail = name.partition(".experts.")
        index, _, linear = tail.partition(".")
        parts = [tensors[f"{head}.switch_mlp.{linear}.{suffix}"][int(index)].numpy() for suffix in mlx.SUFFIXES]
        assert np.array_equal(affine(*parts, 4, source.facts.group_size), dense[name].numpy()), name


def test_what_mlx_cannot_hold_is_refused_with_a_way_out(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen2")
    gptq_folder(tmp_path / "model", tmp_path / "act", act_order=True)
    assert [reason.what for reason in mlx.MLX.check(ExportSource(tmp_path / "act"))] == ["act-order (desc_act)"]


@pytest.mark.skipif(HAS_MLX, reason="mlx is installed")
def test_a_missing_library_names_the_extra_before_anything_is_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen2")
    gptq_folder(tmp_path / "model", tmp_path / "q")
    with pytest.raises(InputError, match="needs the package mlx") as error:
        export_artifact(ExportJob(tmp_path / "q", tmp_path / "out", "mlx"), no_progress)
    assert "qwen-quant[mlx]" in error.value.next_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "q"]


@pytest.mark.skipif(not HAS_MLX, reason="needs mlx: pip install 'qwen-quant[mlx]'")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"])
def test_mlx_itself_reads_back_every_weight(tmp_path: Path, family: str) -> None:
    (make_checkpoint if family in ("qwen2", "qwen3") else make_family_checkpoint)(tmp_path / "m", family)
    gptq_folder(tmp_path / "m", tmp_path / "q", sym=False)
    result = export_artifact(ExportJob(tmp_path / "q", tmp_path / "out", "mlx"), no_progress)
    assert result.proof.exact and result.proof.linears == len(ExportSource(tmp_path / "q").linears)
