"""inspect: counts against the tensors themselves, accounting of odd ones, shape limits worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.inspection import Linear, inspect_path, shape_limits
from tests.support.checkpoints import edit_tensors


@pytest.mark.parametrize("name", ["qwen2_folder", "qwen3_folder"])
def test_counts_equal_the_files(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    reader, result = CheckpointReader(folder), inspect_path(folder)
    assert result.kind == "checkpoint" and result.quantization is None and result.provenance is None
    assert result.weight_bytes == reader.nbytes == sum(row.nbytes for row in result.classes)
    assert result.parameters == sum(math.prod(reader.info(n).shape) for n in reader.names)
    assert sum(row.tensors for row in result.classes) == len(reader.names)
    assert {row.dtype for row in result.classes} == {"BF16"}
    audit = result.accounting
    assert (audit.quantized_linears, audit.unquantized_linears) == (0, 14)
    assert audit.missing == audit.unaccounted == ()
    assert sum(audit.kept.values()) + 14 == len(reader.names)


def packed_copy(source: Path, folder: Path, bits: int = 4) -> Path:
    """`source` with its first MLP's up_proj replaced by packed tensors of group_size 32, as an artifact has them."""
    shutil.copytree(source, folder)
    name = "model.layers.0.mlp.up_proj"
    out_features, in_features = CheckpointReader(folder).info(f"{name}.weight").shape
    packed = {
        "weight": None,
        "qweight": torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32),
        "qzeros": torch.zeros(in_features // 32, out_features * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(in_features // 32, out_features, dtype=torch.float16),
        "g_idx": torch.zeros(in_features, dtype=torch.int32),
    }
    edit_tensors(folder, **{f"{name}.{part}".replace(".", "__"): tensor for part, tensor in packed.items()})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_linears_keep_their_logical_size(tmp_path: Path, qwen2_folder: Path, bits: int) -> None:
    result = inspect_path(packed_copy(qwen2_folder, tmp_path / "packed", bits))
    assert result.kind == "artifact" and result.group_size == 32
    assert result.parameters == inspect_path(qwen2_folder).parameters
    assert result.quantized_parameters == 128 * 224
    assert (result.accounting.quantized_linears, result.accounting.unquantized_linears) == (1, 13)


def test_what_no_rule_explains_is_named(tmp_path: Path, qwen2_folder: Path) -> None:
    folder = packed_copy(qwen2_folder, tmp_path / "odd")
    changes = {"model__layers__0__mlp__up_proj__scales": None, "model__surprise": torch.zeros(2)}
    edit_tensors(folder, **changes)
    audit = inspect_path(folder).accounting
    assert audit.missing == ("model.layers.0.mlp.up_proj",)
    assert "model.surprise" in audit.unaccounted
    assert "model.layers.0.mlp.up_proj.qweight" in audit.unaccounted


def test_manifest_gives_provenance_and_layers(tmp_path: Path, qwen2_folder: Path) -> None:
    folder = packed_copy(qwen2_folder, tmp_path / "made")
    manifest = {"source": {"id": "org/name", "revision": "abc"}, "layers": [{"name": "x", "relative_error": 0.1}]}
    (folder / "qwen-quant.json").write_text(json.dumps(manifest))
    result = inspect_path(folder)
    assert result.provenance == {"source": manifest["source"]}
    assert result.layers == ({"name": "x", "relative_error": 0.1},)
    (folder / "qwen-quant.json").write_text("{")
    with pytest.raises(InputError, match=r"qwen-quant\.json cannot be read"):
        inspect_path(folder)


def limits_of(folder: Path, name: str, shape: tuple[int, int], group_size: int) -> dict[str, str]:
    """target -> reason for one linear of `shape` (in_features, out_features) at 4 bits."""
    linear = Linear(f"model.layers.0.{name}", *shape, quantized=False, tensors=())
    return {limit.target: limit.reason for limit in shape_limits(read_model_spec(folder), (linear,), 4, group_size)}


def test_shape_limits_worked_by_hand(qwen2_folder: Path) -> None:
    # Qwen2.5-0.5B at group_size 128: 4864 = 38 * 128 splits in 2 but not in 4 or 8; 896 = 7 * 128 does not split.
    assert set(limits_of(qwen2_folder, "mlp.down_proj", (4864, 896), 128)) == {
        "tensor parallelism 4",
        "tensor parallelism 8",
    }
    assert len(limits_of(qwen2_folder, "self_attn.o_proj", (896, 896), 128)) == 3
    # 896 = 14 * 64: in two parts of whole groups at 64.
    assert "tensor parallelism 2" not in limits_of(qwen2_folder, "self_attn.o_proj", (896, 896), 64)
    # Outputs split on whole words of eight 4-bit zeros: 128 / 8 = 16 does, 32 / 8 = 4 does not.
    assert limits_of(qwen2_folder, "self_attn.k_proj", (896, 128), 128) == {}
    assert "tensor parallelism 8" in limits_of(qwen2_folder, "self_attn.k_proj", (896, 32), 128)
    # One group per row: inputs must fall on whole words only.
    assert limits_of(qwen2_folder, "mlp.down_proj", (4864, 896), -1) == {}
    # Marlin: 576 is 4.5 * 128.
    assert limits_of(qwen2_folder, "mlp.up_proj", (576, 1536), 64) == {
        "Marlin": "in_features 576 is not a multiple of 128"
    }


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        inspect_path(tmp_path / "nosuch")
    with pytest.raises(InputError, match=r"config\.json"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "fp4", "int8"])
def test_bitsandbytes_folders_are_accounted_for(kind: str) -> None:
    result = inspect_path(Path(__file__).parent / "golden" / "bnb" / kind)
    assert result.accounting.quantized_linears == 7 * result.num_layers
    assert (result.accounting.missing, result.accounting.unaccounted, result.limits) == ((), (), ())
    assert result.quantized_parameters > 0
