"""bitsandbytes' 4-bit (NF4, FP4) and 8-bit weights as dense FP32 matrices, without bitsandbytes.

4 bit.  The weight [out, in] is flattened row by row; every `blocksize` consecutive values (64 by default, the last
block may be short) share one absmax. A value is an index into a table of 16 (`quant_map`), and two indices make a
byte, the first in the high four bits:

    packed      uint8 [ceil(out * in / 2), 1], or those bytes viewed as another dtype (bnb_4bit_quant_storage)
    absmax      FP32  [blocks]
    quant_map   FP32  [16]
    value     = quant_map[index] * absmax[block]

Double quantization stores the absmax as 8-bit indices too, in blocks of their own (256 by default):

    absmax        uint8 [blocks]
    nested map    FP32  [256],  nested absmax  FP32 [ceil(blocks / 256)],  offset  FP32, one for the tensor
    absmax[b]   = nested_map[absmax[b]] * nested_absmax[b // 256] + offset

8 bit.  codes int8 [out, in] and SCB FP32 [out], the largest magnitude of each row: value = code * SCB / 127.

Every product is a single FP32 multiplication in bitsandbytes' own order, so the result equals what bitsandbytes 0.50
dequantizes to FP32 (tests/golden/bnb, bit for bit but for the sign of zero: its FP4 kernel writes code 8 as -0.0, where
the saved quant_map says 0.0); its 16-bit kernels round these same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 23
# bitsandbytes multiplies by this literal instead of dividing by 127.
_INT8_STEP = 7.874015718698502e-3


@dataclass(frozen=True)
class NestedAbsmax:
    """How a double-quantized absmax is decoded.

    Attributes:
        absmax: FP32 [ceil(blocks / blocksize)], scales of the scales.
        quant_map: FP32 [256].
        blocksize: entries of the outer absmax that share one scale.
        offset: added to every decoded value (the mean that was taken off before).
    """

    absmax: Tensor
    quant_map: Tensor
    blocksize: int
    offset: float


def blocks_of(shape: tuple[int, int], blocksize: int) -> int:
    """Blocks of a weight [out, in]; the last one may be short."""
    return math.ceil(shape[0] * shape[1] / blocksize)


def _scaled(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """FP32 [n] in blocks of `blocksize` (the last may be short) times FP32 [ceil(n / blocksize)], in place."""
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scales[:whole, None])
    if whole < scales.numel():
        values[whole * blocksize :].mul_(scales[whole])
    return values


def decode_absmax(absmax: Tensor, nested: NestedAbsmax | None) -> Tensor:
    """FP32 [blocks] of a stored absmax: uint8 indices with `nested`, floats without."""
    if nested is None:
        return absmax.flatten().float()
    values = nested.quant_map.float()[absmax.flatten().int()]
    return _scaled(values, nested.absmax.flatten().float(), nested.blocksize) + torch.tensor(nested.offset)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    blocksize: int,
    shape: tuple[int, int],
    *,
    nested: NestedAbsmax | None = None,
) -> Tensor:
    """The FP32 weight [out, in] of the tensors that the module's docstring lays out.

    Args:
        packed: the bytes, any shape and dtype.
        absmax: FP32 [blocks], or uint8 [blocks] together with `nested`.
        quant_map: FP32 [16].
        blocksize: values that share one absmax, even.
        shape: (out, in) of the weight.
        nested: the state of double quantization, None without.
    """
    count = shape[0] * shape[1]
    data = packed.contiguous().flatten().view(torch.uint8)
    scales = decode_absmax(absmax, nested)
    table = quant_map.float()
    result = torch.empty(count)
    step = max(1, _CHUNK_VALUES // blocksize) * blocksize
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = data[start // 2 : (stop + 1) // 2]
        indices = torch.stack((part >> 4, part & 15), 1).flatten()[: stop - start]
        result[start:stop] = table[indices.int()]
        _scaled(result[start:stop], scales[start // blocksize : math.ceil(stop / blocksize)], blocksize)
    return result.view(shape)


def dequantize_int8(codes: Tensor, scb: Tensor) -> Tensor:
    """FP32 [out, in] of codes int8 [out, in] and SCB FP32 [out]: code * SCB / 127."""
    return codes.float().mul_(scb.float()[:, None]).mul_(_INT8_STEP)
