"""A quantized weight as kernels take it: columns of a group side by side, every group of one size.

GPTQ artifacts name the group of each column (g_idx). With act-order, columns of a group are scattered; sorted by group
they are consecutive, and the inputs are permuted the same way when the linear runs. The last group may be short; it
is filled up with columns that only ever meet inputs of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.gptq import QuantizedWeight


@dataclass(frozen=True)
class GroupedWeight:
    """Columns in order of their groups.

    Attributes:
        codes: uint8 [out, width], width = groups * group_size, at least in_features.
        scales: float [out, groups], as stored; negative ones are ordinary.
        zeros: uint8 [out, groups].
        group_size: columns of each group.
        in_features: inputs of the linear; codes beyond are filling.
        order: int64 [in_features], the input of each column; None when it is the column itself.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    in_features: int
    order: Tensor | None

    @property
    def width(self) -> int:
        """Columns with the filling."""
        return self.codes.shape[1]

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    def dequantized(self) -> Tensor:
        """FP32 [out, width], filling included."""
        groups = self.codes.float().unflatten(1, (-1, self.group_size))
        return ((groups - self.zeros.float().unsqueeze(2)) * self.scales.float().unsqueeze(2)).flatten(1)

    def resized(self, group_size: int) -> GroupedWeight:
        """The same weight in smaller groups (a divisor of the group size): scales and zeros are repeated, exactly."""
        times = self.group_size // group_size
        scales, zeros = (part.repeat_interleave(times, 1) for part in (self.scales, self.zeros))
        return GroupedWeight(self.codes, scales, zeros, group_size, self.in_features, self.order)

    def filled(self, multiple: int) -> GroupedWeight:
        """The same weight with its width a multiple of `multiple` (of which the group size is a multiple or divisor).

        What is added are groups with scales of 0 and zeros of 8, so that a symmetric weight stays one.
        """
        missing = -self.width % multiple
        if not missing:
            return self
        groups = missing // self.group_size
        codes, scales, zeros = (
            torch.nn.functional.pad(part, (0, size), value=value)
            for part, size, value in ((self.codes, missing, 8), (self.scales, groups, 0), (self.zeros, groups, 8))
        )
        return GroupedWeight(codes, scales, zeros, self.group_size, self.in_features, self.order)


def grouped_weight(weight: QuantizedWeight) -> GroupedWeight | None:
    """The weight with consecutive groups of one size, or None when its groups have sizes of their own.

    Codes are shared with `weight` where neither a permutation nor filling is needed.
    """
    g_idx, groups = weight.g_idx.long(), weight.scales.shape[1]
    counts = torch.bincount(g_idx, minlength=groups)
    size = int(counts.max())
    if bool((counts[:-1] != size).any()) or not int(counts[-1]):
        return None
    in_order = bool((g_idx[1:] >= g_idx[:-1]).all())
    order = None if in_order else torch.argsort(g_idx, stable=True)
    codes = weight.codes if order is None else weight.codes[:, order]
    filling = groups * size - g_idx.numel()
    if filling:
        codes = torch.nn.functional.pad(codes, (0, filling))
    return GroupedWeight(codes, weight.scales, weight.zeros, size, g_idx.numel(), order)


def largest_divisor(size: int, candidates: tuple[int, ...]) -> int:
    """The largest of `candidates` that divides `size`, 0 when none does."""
    return max((c for c in candidates if size % c == 0), default=0)
