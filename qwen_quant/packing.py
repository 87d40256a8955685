"""Codes <-> qweight and zeros <-> qzeros: the only packing code of the package.

Layout ("gptq", as AutoGPTQ and GPTQModel write it).  Codes are laid one after the other, least significant bit first,
in a stream of bits that is cut into 32-bit words: along the INPUTS for qweight, along the OUTPUTS for qzeros.  At 2, 4
and 8 bits a word holds 16, 8 or 4 whole codes; at 3 bits 32 codes fill 3 words and two of them cross a word's edge,
which is AutoGPTQ's 10-1-10-1-10 scheme.  Both are one rule here, applied to bytes: 4, 2 or 1 codes per byte, or 8 codes
per 3 bytes, since a little-endian int32 is its bytes in stream order.

Tensors of one linear [out, in] with G groups:

    qweight  int32 [in * bits / 32, out]
    qzeros   int32 [G, out * bits / 32]     zero - 1 modulo 2^bits for "gptq" (v1), zero for "gptq_v2"
    scales   FP16  [G, out]
    g_idx    int32 [in]                     group of each input column

A zero of 0 wraps to 2^bits - 1 in v1; readers disagree on it (0, 16, or a borrow from the next nibble), so the grids of
this package never produce it, but it round-trips here.

in and out must fill whole words: multiples of 8 at 4 bits, 16 at 2, 4 at 8, 32 at 3.  GPTQModel rounds the last word up
in its buffers, but its own fast packer and most kernels cut the rest off, so such a layer is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.gptq import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32
_CHUNK_CODES = 1 << 24


def packed_specs(
    in_features: int, out_features: int, bits: int, group_size: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """suffix -> (dtype, shape) of a packed linear; group_size -1 is one group, the last group may be short.

    Errors: InputError when in_features or out_features do not fill whole 32-bit words.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size * bits % WORD_BITS:
            raise InputError(
                f"{name} {size} does not fill whole 32-bit words at {bits} bits",
                f"the gptq layout needs a multiple of {WORD_BITS // math.gcd(bits, WORD_BITS)}",
                "use other --bits (8 bits needs the smallest multiple)",
            )
    groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
    return {
        "qweight": (torch.int32, (in_features * bits // WORD_BITS, out_features)),
        "qzeros": (torch.int32, (groups, out_features * bits // WORD_BITS)),
        "scales": (torch.float16, (groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }


def _places(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(codes, bytes) of the smallest whole unit of the stream, and (code, byte, left shift) of every part.

    A negative shift is a right shift: the upper part of a code that crosses a byte's edge.
    """
    codes = 8 // math.gcd(8, bits)
    parts = []
    for code in range(codes):
        byte, shift = divmod(code * bits, 8)
        parts.append((code, byte, shift))
        if shift + bits > 8:
            parts.append((code, byte + 1, shift - 8))
    return codes, codes * bits // 8, parts


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] -> int32 words [rows, n * bits / 32]."""
    per_unit, unit_bytes, parts = _places(bits)
    units = codes.contiguous().view(codes.shape[0], -1, per_unit)
    stream = torch.zeros(*units.shape[:2], unit_bytes, dtype=torch.uint8, device=codes.device)
    for code, byte, shift in parts:
        stream[..., byte] |= units[..., code] << shift if shift >= 0 else units[..., code] >> -shift
    return stream.view(codes.shape[0], -1).view(torch.int32)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 words [rows, w] -> uint8 codes [rows, w * 32 / bits]."""
    per_unit, unit_bytes, parts = _places(bits)
    copy = words.clone(memory_format=torch.contiguous_format)  # .contiguous() keeps odd strides where a size is 1
    stream = copy.view(torch.uint8).view(words.shape[0], -1, unit_bytes)
    units = torch.zeros(*stream.shape[:2], per_unit, dtype=torch.uint8, device=words.device)
    for code, byte, shift in parts:
        units[..., code] |= stream[..., byte] >> shift if shift >= 0 else stream[..., byte] << -shift
    return units.bitwise_and_(2**bits - 1).view(words.shape[0], -1)


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges that keep the temporaries of one step near 16 MiB."""
    step = max(1, _CHUNK_CODES // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack_weight(quantized: QuantizedWeight, bits: int, checkpoint_format: str) -> dict[str, Tensor]:
    """The four tensors of a linear, as the module's docstring lays them out.

    Args:
        quantized: codes uint8 [out, in], scales FP16 [out, G], zeros uint8 [out, G], g_idx int32 [in].
        bits: 2, 3, 4 or 8; every code and zero is below 2^bits.
        checkpoint_format: "gptq" or "gptq_v2".

    Errors: InputError when in or out do not fill whole words.
    """
    out_features, in_features = quantized.codes.shape
    specs = packed_specs(in_features, out_features, bits, -1)
    qweight = torch.empty(specs["qweight"][1], dtype=torch.int32, device=quantized.codes.device)
    for start, stop in _chunks(out_features, in_features):
        qweight[:, start:stop] = pack_rows(quantized.codes[start:stop], bits).mT
    zeros = quantized.zeros.mT
    if checkpoint_format == "gptq":
        zeros = (zeros - 1) & (2**bits - 1)
    return {
        "qweight": qweight,
        "qzeros": pack_rows(zeros, bits),
        "scales": quantized.scales.mT.contiguous(),
        "g_idx": quantized.g_idx,
    }


def unpack_weight(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str) -> QuantizedWeight:
    """The inverse of `pack_weight`; `tensors` holds the four suffixes (shapes as in the module's docstring).

    Scales keep the dtype they are stored in (FP16 from this package).
    """
    qweight = tensors["qweight"]
    out_features, in_features = qweight.shape[1], qweight.shape[0] * WORD_BITS // bits
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=qweight.device)
    for start, stop in _chunks(out_features, in_features):
        codes[start:stop] = unpack_rows(qweight[:, start:stop].mT, bits)
    zeros = unpack_rows(tensors["qzeros"], bits)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    return QuantizedWeight(codes, tensors["scales"].mT.contiguous(), zeros.mT.contiguous(), tensors["g_idx"])
