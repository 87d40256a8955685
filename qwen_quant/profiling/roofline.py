"""The memory roofline: what one decoding step must read, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_quant.profiling.protocol import Cell
from qwen_quant.profiling.results import Roofline

BUFFER_BYTES = 512 << 20  # far beyond any processor's cache
_REPEATS = 7


@dataclass(frozen=True)
class MeanCache:
    """Bytes that a cache holds on average: over the whole generation, and over the steps that were timed."""

    whole_bytes: float
    seen_bytes: float


def read_bandwidth(device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that this device reads from its memory with torch's threads: best of a sum and a copy.

    The sum of an FP32 buffer reads each byte once; a copy reads one half and writes the other.
    """
    buffer = torch.ones(buffer_bytes // 4, device=device)
    half = buffer.numel() // 2
    best = 0.0
    for work in (lambda: buffer.sum(), lambda: buffer[:half].copy_(buffer[half : 2 * half])):
        for _ in range(_REPEATS):
            best = max(best, buffer.nbytes / _seconds(work, device))
    return best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def roofline(
    cell: Cell, weights_bytes: int, cache: MeanCache, bandwidth: float, step_seconds: float | None
) -> Roofline | None:
    """The roofline of a cell; None where nothing is decoded."""
    if step_seconds is None or step_seconds <= 0 or bandwidth <= 0:
        return None
    step_bytes = weights_bytes + cache.whole_bytes
    best = cell.batch_size * bandwidth / step_bytes
    share = (weights_bytes + cache.seen_bytes) / bandwidth / step_seconds
    return Roofline(round(step_bytes), bandwidth, best, share)
