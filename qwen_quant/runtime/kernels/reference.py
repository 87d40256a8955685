"""The kernel that always works: codes stay as files pack them, and each product dequantizes them tile by tile."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight, unpack_weight
from qwen_quant.runtime.kernels.base import Kernel

_LAYOUT = "gptq_v2"  # its zeros have no special value


class ReferenceKernel(Kernel):
    """Any bits, any groups, any device, through `packing.py` and `QuantizedWeight.dequantized`.

    Args:
        weight: the quantized weight; columns stay in their order, whatever their groups.
        bits: 2, 3, 4 or 8.
        device: where the product runs.

    Errors: InputError when in or out do not fill whole 32-bit words (packing.py).
    """

    name: ClassVar[str] = "reference"
    arithmetic: ClassVar[str] = "the inputs' dtype"
    prefill_rows: ClassVar[int] = 0  # tiles are all it has

    def __init__(self, weight: QuantizedWeight, bits: int, device: torch.device) -> None:
        self.bits = bits
        self.out_features, self.width = weight.codes.shape
        packed = pack_weight(weight, bits, _LAYOUT)
        # Words of one output side by side in memory, so that a tile of outputs is one piece.
        packed["qweight"] = packed["qweight"].mT.contiguous()
        self.packed = {name: value.to(device) for name, value in packed.items()}

    @property
    def row_step(self) -> int:
        """Zeros of 32 outputs fill whole words at any number of bits."""
        return 32

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Words of codes and zeros, scales, groups."""
        return tuple(self.packed.values())

    def product(self, inputs: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        return self.by_tiles(inputs)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, in]; `start` is a multiple of 32."""
        words = slice(start * self.bits // 32, stop * self.bits // 32)
        tile = {
            "qweight": self.packed["qweight"][start:stop].mT,
            "qzeros": self.packed["qzeros"][:, words],
            "scales": self.packed["scales"][:, start:stop],
            "g_idx": self.packed["g_idx"],
        }
        return unpack_weight(tile, self.bits, _LAYOUT).dequantized()
