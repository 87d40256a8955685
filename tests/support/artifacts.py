"""GPTQ folders made by plain rounding, without the solver, so that loading and validation are tested on their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight

GROUP_SIZE = 32


def rounded(weight: torch.Tensor, bits: int, *, sym: bool) -> QuantizedWeight:
    """Min-max rounding of [out, in] in groups of 32, written without the package's grid."""
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    top = 2**bits - 1
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((groups.abs().amax(2) * 2 if sym else high - low) / top).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales.float()).round().clamp(1, top)
    codes = (groups / scales.float().unsqueeze(2)).round().add(zeros.unsqueeze(2)).clamp(0, top).flatten(1)
    g_idx = (torch.arange(weight.shape[1]) // GROUP_SIZE).to(torch.int32)
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros.to(torch.uint8), g_idx)


def make_artifact(
    source: Path, folder: Path, *, bits: int = 4, sym: bool = True, checkpoint_format: str = "gptq"
) -> dict[str, torch.Tensor]:
    """Write a GPTQ folder from a one-file checkpoint; returns name -> FP32 dequantized weight of its linears."""
    shutil.copytree(source, folder)
    dense: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = value
            continue
        weight = rounded(value, bits, sym=sym)
        dense[name] = weight.dequantized()
        for suffix, packed in pack_weight(weight, bits, checkpoint_format).items():
            tensors[name.removesuffix("weight") + suffix] = packed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP_SIZE, "sym": sym, "desc_act": False}
    change_config(folder, quantization_config={**settings, "checkpoint_format": checkpoint_format})
    return dense


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
