"""The quantization grid: scales and zeros per group, and the only rounding code of the package.

A weight w of group g is stored as a code c in 0..2^bits-1 and read back as (c - zero_g) * scale_g.

Symmetric grids fix zero at 2^(bits-1) and so reach one step further below than above; the search therefore also tries
negative scales, which turn that longer side to where the group's largest weight is (every runtime multiplies by the
scale, so its sign costs nothing).  Asymmetric zeros stay in 1..2^bits-1, because zero 0 is undefined in the "gptq"
layout.  Scales are rounded to FP16 BEFORE any code is chosen, so what is solved is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_CANDIDATES = 20
MIN_SHRINK = 0.5
_TINY = 6e-5  # about the smallest normal FP16: a scale below it would lose its precision
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a weight matrix.

    Attributes:
        scales: FP32 [groups, out], every value exactly representable in FP16.
        zeros: FP32 [groups, out], whole numbers.
        max_code: 2^bits - 1.
    """

    scales: Tensor
    zeros: Tensor
    max_code: int


def round_codes(values: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Codes (FP32 whole numbers in 0..max_code) nearest to `values`; all arguments broadcast together."""
    return torch.div(values, scales).round_().add_(zeros).clamp_(0, max_code)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(codes - zeros) * scales in FP32; all arguments broadcast together."""
    return (codes - zeros) * scales


def _fp16(scales: Tensor) -> Tensor:
    """Scales rounded to FP16 (kept in FP32), bounded away from zero and from infinity, signs kept."""
    size = scales.abs().clamp_(_TINY, _FP16_MAX)
    return torch.where(scales < 0, -size, size).half().float()


def group_bounds(columns: int, group_size: int) -> list[tuple[int, int]]:
    """[start, stop) of each group of consecutive columns; -1 is one group; the last may be short."""
    size = columns if group_size == -1 else group_size
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def _range_grid(group: Tensor, bits: int, sym: bool, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero [out] that span `shrink` of the range of `group` [columns, out]."""
    max_code = 2**bits - 1
    if sym:
        scale = _fp16(group.abs().amax(0) * (2 * shrink / max_code))
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low = group.amin(0).clamp_(max=0) * shrink
    high = group.amax(0).clamp_(min=0) * shrink
    scale = _fp16((high - low) / max_code)
    return scale, (-low / scale).round_().clamp_(1, max_code)


def _candidates(group: Tensor, bits: int, sym: bool) -> list[tuple[Tensor, Tensor]]:
    """The grids that the search compares for one group [columns, out]."""
    shrinks = [1 - (1 - MIN_SHRINK) * i / SHRINK_CANDIDATES for i in range(SHRINK_CANDIDATES)]
    grids = [_range_grid(group, bits, sym, shrink) for shrink in shrinks]
    if sym:
        grids += [(-scale, zero) for scale, zero in grids]
    return grids


def find_grid(weight: Tensor, importance: Tensor | None, bits: int, group_size: int, sym: bool) -> Grid:
    """Choose scales and zeros per group of consecutive columns.

    Args:
        weight: FP32 [in, out] (transposed: one column of the layer is one row here).
        importance: FP32 [in], weight of each column's squared error in the search; None spans the plain range.
        bits, group_size, sym: as in `GPTQConfig`.

    Returns:
        Grid with [groups, out] scales and zeros.
    """
    scales, zeros = [], []
    max_code = 2**bits - 1
    for start, stop in group_bounds(weight.shape[0], group_size):
        group = weight[start:stop]
        best_scale, best_zero = _range_grid(group, bits, sym, 1.0)
        if importance is not None:
            weights = importance[start:stop]
            best_error = torch.full_like(best_scale, torch.inf)
            for scale, zero in _candidates(group, bits, sym):
                error = dequantize(round_codes(group, scale, zero, max_code), scale, zero).sub_(group).square_()
                loss = weights @ error
                better = loss < best_error
                best_error = torch.where(better, loss, best_error)
                best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scales.append(best_scale)
        zeros.append(best_zero)
    return Grid(torch.stack(scales), torch.stack(zeros), max_code)
