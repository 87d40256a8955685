"""An exported OpenVINO model, compiled and stepped, for the tests of export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="needs openvino: pip install 'qwen-quant[openvino]'")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def compiled(folder: Path) -> Any:
    """The CompiledModel of a folder, in FP32."""
    import openvino

    return openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", EXACT)


def logits(
    request: Any, ids: torch.Tensor, mask: torch.Tensor, past: int, beams: list[int] | None = None
) -> torch.Tensor:
    """One step: new tokens `ids`, `mask` over past and new; positions count the real tokens."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    rows = np.array(range(ids.shape[0]) if beams is None else beams, dtype=np.int32)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    return torch.from_numpy(np.array(request.infer({**feed, "beam_idx": rows})["logits"]))


def two_steps(folder: Path, model: Any) -> tuple[float, float]:
    """(largest difference from `model` over two sequences, one of them padded, in two steps; its largest logit)."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(0, 256, (2, 12), generator=generator), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0  # padding on the left
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    request = compiled(folder).create_infer_request()
    found = torch.cat([logits(request, ids[:, :9], mask[:, :9], 0), logits(request, ids[:, 9:], mask, 9)], 1)
    return float((found - expected)[mask.bool()].abs().max()), float(expected.abs().max())
