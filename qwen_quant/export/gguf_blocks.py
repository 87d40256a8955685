"""Quantized linears as GGUF blocks of 32 weights, exactly.

    Q4_0  FP16 d, 16 bytes           value = d * (q - 8),  q in 0..15:  low nibbles are weights 0-15, high ones 16-31
    Q5_0  FP16 d, 32 bits, 16 bytes  value = d * (q - 16), q in 0..31:  fifth bits first, then nibbles as in Q4_0
    Q8_0  FP16 d, 32 bytes           value = d * q,        q in -128..127

A block has one scale, so groups of 64 and 128 repeat theirs.  code - zero is the same number whatever the width it was
stored in, so the narrowest type that holds every code - zero of the source is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.export.pivot import PackedRows, row_slices
from qwen_quant.gptq import QuantizedWeight

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """One GGUF type.

    Attributes:
        name: in gguf.GGMLQuantizationType.
        block_bytes: of 32 weights.
        low, high: least and largest code - zero.
    """

    name: str
    block_bytes: int
    low: int
    high: int


BLOCK_TYPES = (BlockType("Q4_0", 18, -8, 7), BlockType("Q5_0", 22, -16, 15), BlockType("Q8_0", 34, -128, 127))


def narrowest(bits: int, *, sym: bool) -> BlockType | None:
    """The smallest type that holds code - zero of any such weight; None when none does (8 bits, asymmetric)."""
    top = 2**bits - 1
    low, high = (-(2 ** (bits - 1)), top - 2 ** (bits - 1)) if sym else (-top, top)
    return next((kind for kind in BLOCK_TYPES if kind.low <= low and high <= kind.high), None)


def encode(weight: QuantizedWeight, kind: BlockType) -> Tensor:
    """uint8 [out, in / 32 * block_bytes] of a weight whose blocks of 32 columns each lie in one group."""
    rows, width = weight.codes.shape
    groups = weight.g_idx.view(-1, BLOCK)[:, 0].long()
    found = torch.empty(rows, width // BLOCK * kind.block_bytes, dtype=torch.uint8)
    for part in row_slices(rows, width):
        found[part] = _encode_rows(
            weight.codes[part], weight.scales[part][:, groups], weight.zeros[part][:, groups], kind
        )
    return found


def encode_q4_0(packed: PackedRows) -> Tensor:
    """`encode` as Q4_0 of symmetric 4-bit codes that are still packed: nibbles change places, no code changes."""
    (rows, width), blocks = packed.shape, packed.grid.g_idx.view(-1, BLOCK)[:, 0].long()
    found = torch.empty(rows, width // BLOCK, 1 + BLOCK // 4, dtype=torch.int16)
    for part in row_slices(rows, width):
        halves = packed.stream[part].view(torch.int64).view(-1, 2)  # weights 0-15 and 16-31 of each block
        low, high = (halves[:, k].contiguous().view(torch.uint8).to(torch.int16) for k in (0, 1))
        for lanes in (low, high):  # two nibbles in a byte -> one in each byte of 16 bits
            lanes.bitwise_or_(lanes << 4).bitwise_and_(0x0F0F)
        found[part, :, 1:] = low.bitwise_or_(high.bitwise_left_shift_(4)).view(-1, width // BLOCK, BLOCK // 4)
        found[part, :, 0] = packed.grid.scales[part].half().view(torch.int16)[:, blocks]
    return found.view(torch.uint8).view(rows, -1)


def _encode_rows(codes: Tensor, scales: Tensor, zeros: Tensor, kind: BlockType) -> Tensor:
    """uint8 [rows, in / 32 * block_bytes] of codes [rows, in] with scale and zero of each block [rows, in / 32].

    Sums are taken modulo 256, which leaves the bits of a negative int8 too.
    """
    rows = codes.shape[0]
    scales = scales.half().contiguous().view(torch.uint8).view(rows, -1, 2)
    start = 0 if kind.name == "Q8_0" else -kind.low
    values = codes.view(rows, -1, BLOCK) + (start - zeros.to(torch.int16)).to(torch.uint8).unsqueeze(2)
    if kind.name == "Q8_0":
        parts = [scales, values]
    else:
        low, high = values[:, :, : BLOCK // 2], values[:, :, BLOCK // 2 :]
        nibbles = (low & 15) | high << 4
        parts = [scales, nibbles] if kind.name == "Q4_0" else [scales, _fifth_bits(values), nibbles]
    return torch.cat(parts, 2).view(rows, -1)


def _fifth_bits(codes: Tensor) -> Tensor:
    """uint8 [rows, blocks, 4]: bit i of the four bytes (lowest first) is the fifth bit of weight i."""
    bits = (codes >> 4).view(*codes.shape[:2], 4, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return (bits * weights).sum(3, dtype=torch.uint8)
