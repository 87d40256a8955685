"""What every kernel offers, and the product by dequantized tiles that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qwen_quant.models.skeleton import compute_dtype

TILE_VALUES = 1 << 21  # weights dequantized at a time: 8 MiB in FP32, about what a core's share of the caches holds
UNEVEN = "its groups differ in size"


@dataclass(frozen=True)
class LinearFacts:
    """What a kernel is chosen by.

    Attributes:
        out_features, in_features: shape of the weight.
        bits: 2, 3, 4 or 8.
        group_size: columns of a group; 0 when groups differ in size (only the reference takes those).
        exact_scales: whether every scale is an FP16 value.
        device, dtype: where the linear runs, and the dtype of its inputs.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    exact_scales: bool
    device: torch.device
    dtype: torch.dtype


class Kernel(ABC):
    """Weights of one linear in a kernel's own layout.

    Attributes:
        name: of the kernel, for reports.
        arithmetic: in words, what its products are computed in.
        prefill_rows: from this many rows on, dequantized tiles and an ordinary product are faster (see
            benchmarks/int4.py, which measures it).
        width: inputs it takes (with filling).
        out_features: outputs.
    """

    name: ClassVar[str]
    arithmetic: ClassVar[str]
    prefill_rows: ClassVar[int]
    width: int
    out_features: int

    @abstractmethod
    def product(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out] in the dtype of the inputs, for few rows."""

    @abstractmethod
    def dense_rows(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, width]: rows of the weight; `start` is a multiple of `row_step`."""

    @property
    def row_step(self) -> int:
        """Row ranges of `dense_rows` start at multiples of this."""
        return 1

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds, all of which one product reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(self) -> Tensor:
        """FP32 [out, width]: the whole weight."""
        return self.dense_rows(0, self.out_features)

    def by_tiles(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out] in the dtype of the inputs, for many rows; differentiable in the inputs."""
        return by_tiles(inputs, self.dense_rows, self.out_features, self.row_step)


def by_tiles(inputs: Tensor, dense_rows: Callable[[int, int], Tensor], out_features: int, row_step: int) -> Tensor:
    """Product with a weight that is dequantized some rows at a time, so that its dense form never exists whole.

    BF16 and FP16 inputs are multiplied in FP32 on processors that have no BF16 instructions: it is faster there.
    """
    slow_bf16 = inputs.device.type == "cpu" and compute_dtype(inputs.device) == torch.float32
    dtype = torch.float32 if slow_bf16 else inputs.dtype
    values = inputs.to(dtype)
    step = max(1, TILE_VALUES // max(1, inputs.shape[1]) // row_step) * row_step
    bounds = [(start, min(start + step, out_features)) for start in range(0, out_features, step)]
    parts = [functional.linear(values, dense_rows(*bound).to(dtype)) for bound in bounds]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(inputs.dtype)
