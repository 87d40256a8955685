"""One quantized linear on its way from format to format.

`gptq.QuantizedWeight` (codes unpacked, one byte each) is the pivot that every format can start from.  `PackedRows` is
the same with the codes still packed, row by row: in each row [in] the codes follow one another, least significant bit
first, so that at 4 bits byte k holds column 2k in its low and 2k+1 in its high nibble.  GPTQ's qweight is its transpose
in 32-bit words, and compressed-tensors, MLX, ONNX and OpenVINO store exactly these bytes: those formats need no
unpacking, which is what makes an export about as fast as a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_rows, unpack_rows

_CHUNK_CODES = 1 << 20


@dataclass(frozen=True)
class LinearGrid:
    """What a linear's codes mean: weight[o, i] = (code[o, i] - zeros[o, g]) * scales[o, g] with g = g_idx[i].

    Attributes:
        scales: [out, groups] in the dtype of the source (FP16 in our artifacts).
        zeros: uint8 [out, groups].
        g_idx: int32 [in].
    """

    scales: Tensor
    zeros: Tensor
    g_idx: Tensor


@dataclass(frozen=True)
class PackedRows:
    """One linear with packed codes.

    Attributes:
        stream: uint8 [out, in * bits / 8], contiguous; see the module's docstring.
        bits: 2, 3, 4 or 8.
        grid: its scales, zeros and g_idx.
    """

    stream: Tensor
    bits: int
    grid: LinearGrid

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.stream.shape[0], self.grid.g_idx.shape[0]

    def unpacked(self) -> QuantizedWeight:
        """The pivot."""
        return QuantizedWeight(unpack_codes(self.stream, self.bits), self.grid.scales, self.grid.zeros, self.grid.g_idx)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] -> uint8 stream [rows, n * bits / 8]; n * bits must be a multiple of 32."""
    stream = torch.empty(codes.shape[0], codes.shape[1] * bits // 8, dtype=torch.uint8)
    for rows in row_slices(*codes.shape):
        if bits == 4:
            stream[rows] = codes[rows, 0::2] | codes[rows, 1::2] << 4
        else:
            stream[rows] = pack_rows(codes[rows], bits).view(torch.uint8)
    return stream


def unpack_codes(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [rows, n]. At 8 bits it is `stream` itself."""
    if bits == 8:
        return stream
    count = stream.shape[1] * 8 // bits
    codes = torch.empty(stream.shape[0], count, dtype=torch.uint8)
    for rows in row_slices(stream.shape[0], count):
        if bits == 4:
            # As 16-bit words: low nibble to the low byte, high nibble to the high byte, two codes a step.
            words = stream[rows].to(torch.int16)
            codes[rows] = ((words | words << 4) & 0x0F0F).view(torch.uint8)
        else:
            codes[rows] = unpack_rows(stream[rows].view(torch.int32), bits)
    return codes


def row_slices(rows: int, columns: int) -> list[slice]:
    """Slices of rows of about a million values each, so that temporaries are small and stay in the cache."""
    step = max(1, _CHUNK_CODES // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def consecutive_groups(in_features: int, groups: int) -> Tensor:
    """g_idx int32 [in] of `groups` equal groups of consecutive columns (in_features is a multiple of groups)."""
    return torch.arange(in_features, dtype=torch.int32) // (in_features // groups)


def dequantized(weight: QuantizedWeight) -> Tensor:
    """FP32 [out, in], the numbers of `QuantizedWeight.dequantized`, several times faster for consecutive groups."""
    (rows, columns), groups = weight.codes.shape, weight.scales.shape[1]
    if columns % groups or not torch.equal(weight.g_idx, consecutive_groups(columns, groups)):
        return weight.dequantized()
    values = weight.codes.float().view(rows, groups, -1)
    return values.sub_(weight.zeros.float()[:, :, None]).mul_(weight.scales.float()[:, :, None]).view(rows, columns)
