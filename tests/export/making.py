"""Int4 folders of every layout for the tests of export, and slow, obvious readers of each layout in numpy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight
from tests.support.artifacts import GROUP_SIZE, change_config, rounded

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is output AWQ_COLUMNS[i] of its eight


def quantized(weight: torch.Tensor, bits: int, *, sym: bool, act_order: bool = False) -> QuantizedWeight:
    """Rounding of [out, in] in groups of 32; with act_order the groups are scattered over the columns."""
    if not act_order:
        return rounded(weight, bits, sym=sym)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
    grouped = rounded(weight[:, order], bits, sym=sym)
    codes, g_idx = torch.empty_like(grouped.codes), torch.empty_like(grouped.g_idx)
    codes[:, order], g_idx[order] = grouped.codes, grouped.g_idx
    return QuantizedWeight(codes, grouped.scales, grouped.zeros, g_idx)


def gptq_folder(
    source: Path,
    folder: Path,
    *,
    bits: int = 4,
    sym: bool = True,
    act_order: bool = False,
    checkpoint_format: str = "gptq",
) -> dict[str, torch.Tensor]:
    """A GPTQ folder of any family by plain rounding; returns linear -> FP32 dequantized weight."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    reader, linears = CheckpointReader(source), set(read_model_spec(source).linear_names())
    dense, tensors = {}, {}
    for name in reader.names:
        base = name.removesuffix(".weight")
        if base not in linears:
            tensors[name] = reader.read(name)
            continue
        weight = quantized(reader.read(name), bits, sym=sym, act_order=act_order)
        dense[base] = weight.dequantized()
        for suffix, packed in pack_weight(weight, bits, checkpoint_format).items():
            tensors[f"{base}.{suffix}"] = packed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP_SIZE, "sym": sym, "desc_act": act_order}
    change_config(folder, quantization_config={**settings, "checkpoint_format": checkpoint_format})
    return dense


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; dots are written as __ in the keywords."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nibbles(words: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 [rows, n] -> fields [rows, n * 32 / bits], low end first, one shift at a time."""
    unsigned, count = words.astype(np.int64) & 0xFFFFFFFF, 32 // bits
    fields = [(unsigned >> bits * k) & (2**bits - 1) for k in range(count)]
    return np.stack(fields, axis=-1).reshape(words.shape[0], -1)


def read_gptq(tensors: dict[str, Any], base: str, bits: int, version: int) -> np.ndarray:
    """FP32 [out, in] of a GPTQ linear with 2, 4 or 8 bits."""
    codes = nibbles(tensors[f"{base}.qweight"].numpy().T, bits)
    zeros = nibbles(tensors[f"{base}.qzeros"].numpy(), bits)
    zeros = (zeros + 1) % 2**bits if version == 1 else zeros
    scales, index = tensors[f"{base}.scales"].numpy().astype(np.float32), tensors[f"{base}.g_idx"].numpy()
    return ((codes - zeros.T[:, index]) * scales.T[:, index]).astype(np.float32)


def read_awq(tensors: dict[str, Any], base: str) -> np.ndarray:
    """FP32 [out, in] of an AWQ linear."""
    codes, zeros = (_awq_columns(tensors[f"{base}.{part}"].numpy()) for part in ("qweight", "qzeros"))
    scales = tensors[f"{base}.scales"].numpy().astype(np.float32)
    repeat = codes.shape[0] // scales.shape[0]
    return ((codes - zeros.repeat(repeat, 0)) * scales.repeat(repeat, 0)).T.astype(np.float32)


def _awq_columns(words: np.ndarray) -> np.ndarray:
    fields = nibbles(words)
    found = np.empty_like(fields)
    for k in range(fields.shape[1]):
        found[:, k // 8 * 8 + AWQ_COLUMNS[k % 8]] = fields[:, k]
    return found


def read_compressed(tensors: dict[str, Any], base: str, bits: int) -> np.ndarray:
    """FP32 [out, in] of a pack-quantized linear: signed codes and zeros, as the library has them."""
    out_features, in_features = (int(k) for k in tensors[f"{base}.weight_shape"])
    codes = nibbles(tensors[f"{base}.weight_packed"].numpy(), bits)[:, :in_features] - 2 ** (bits - 1)
    scales = tensors[f"{base}.weight_scale"].float().numpy()
    zeros = np.zeros(scales.shape, dtype=np.int64)
    if f"{base}.weight_zero_point" in tensors:
        packed = nibbles(tensors[f"{base}.weight_zero_point"].numpy().T, bits)[:, :out_features]
        zeros = packed.T - 2 ** (bits - 1)
    repeat = in_features // scales.shape[1]
    return ((codes - zeros.repeat(repeat, 1)) * scales.repeat(repeat, 1)).astype(np.float32)
