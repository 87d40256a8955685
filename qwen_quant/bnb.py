"""bitsandbytes' 4-bit (NF4, FP4) and 8-bit weights, both ways, without bitsandbytes.

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

Routed experts lie under names of their own, as in 16-bit checkpoints; a loader that would stack them must not succeed.
Packed 4-bit weights cannot be stacked into its shapes. 8-bit codes could, and would then be taken for weights, so those
of an expert are stored in the 4-bit form, int8 [out * in, 1] (`is_expert`).

Quantizing gives the bytes of bitsandbytes 0.50's own CPU kernels (tests/test_bnb_convert.py, tests/golden/bnb):
- 4 bit: x = value * (1 / absmax), then the nearest table entry, which is the number of midpoints below x. Comparing
  with each of the 15 midpoints in turn is vectorised, and 2.7 times as fast as a search for each value.
- A last, short block divides by its absmax instead, and its absmax is at least 1e-38.
- Absmax of double quantization: (absmax - mean) * (1 / nested absmax) is rounded to one of 65536 equal steps of
  [-1, 1], and a table says which entry of the nested map is nearest to that step. A block of zeros gets index 0.
- 8 bit: the weight is rounded to FP16 first; code = round(value * (127 * (1 / SCB))), ties to even.

Dequantizing is a single FP32 multiplication for every product, in bitsandbytes' own order, so the result equals what
bitsandbytes dequantizes to FP32 (tests/golden/bnb, bit for bit but for the sign of zero: its FP4 kernel writes code 8
as -0.0, where the saved quant_map says 0.0); its 16-bit kernels round these same values.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCKSIZE = 256
STATE_SUFFIX = "quant_state.bitsandbytes__"
_CHUNK_VALUES = 1 << 23
_QUANTIZE_VALUES = 1 << 20  # FP32 values in work at a time: with their codes they stay near the processor
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

    @classmethod
    def from_state(cls, absmax: Tensor, quant_map: Tensor, state: Tensor) -> NestedAbsmax:
        """From the tensors on disk; `state` is the JSON of `quant_state` (ValueError or KeyError when it is not)."""
        values = json.loads(bytes(state.tolist()))
        return cls(absmax, quant_map, int(values["nested_blocksize"]), float(values["nested_offset"]))


@dataclass(frozen=True)
class Quantized4bit:
    """A weight [out, in] in 4 bit, as the module's docstring lays it out.

    Attributes:
        packed: uint8 [ceil(out * in / 2), 1].
        absmax: FP32 [blocks], or uint8 [blocks] with `nested`.
        quant_type: "nf4" or "fp4".
        blocksize: values that share one absmax.
        shape: (out, in).
        dtype: of the weight that was quantized, which bitsandbytes dequantizes to.
        nested: the state of double quantization, None without.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested: NestedAbsmax | None = None


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
    table = quant_map.float().flatten()
    # Both values of a byte at once, as the 64 bits of one integer: 25 times as fast as a look-up for each.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1).view(torch.int64).flatten()
    result = torch.empty(count)
    step = max(1, _CHUNK_VALUES // blocksize) * blocksize
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = data[start // 2 : (stop + 1) // 2].int()
        result[start:stop] = pairs.index_select(0, part).view(torch.float32)[: stop - start]
        _scaled(result[start:stop], scales[start // blocksize : math.ceil(stop / blocksize)], blocksize)
    return result.view(shape)


def dequantize_int8(codes: Tensor, scb: Tensor) -> Tensor:
    """FP32 [out, in] of codes int8 [out, in] and SCB FP32 [out]: code * SCB / 127."""
    return codes.float().mul_(scb.float()[:, None]).mul_(_INT8_STEP)


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # 2 bits of exponent, 1 of mantissa; the other 8 codes are negative
_SMALLEST_ABSMAX = 1e-38
_NESTED_STEPS = 65536
_DYNAMIC_DECADES = 7


@cache
def quant_map(quant_type: str) -> Tensor:
    """The table of "nf4" or "fp4": FP32 [16], by code."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    return torch.tensor([*_FP4_TWELFTHS, *(0.0 - value for value in _FP4_TWELFTHS)]).div_(12)


@cache
def dynamic_map() -> Tensor:
    """The table of absmax indices, FP32 [256], rising: 7 decades below 1, each with twice the steps of the one below.

    Decade k (0 the smallest) has 2^k values of either sign, the centres of equal parts of [0.1, 1] times 10^(k-6);
    0 and 1 complete it (T. Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, the signed dynamic type).
    """
    values = [0.0, 1.0]
    for decade in range(_DYNAMIC_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (decade - _DYNAMIC_DECADES + 1) * centres).tolist()
        values += (-(10 ** (decade - _DYNAMIC_DECADES + 1)) * centres).tolist()
    return torch.tensor(sorted(values))


@cache
def _nearest_dynamic() -> Tensor:
    """uint8 [65536]: for each equal step of [-1, 1] the nearest entry of `dynamic_map`."""
    table = dynamic_map()
    steps = torch.arange(_NESTED_STEPS) * (2 / (_NESTED_STEPS - 1)) - 1
    return torch.bucketize(steps, (table[:-1] + table[1:]) / 2).to(torch.uint8)


@cache
def _midpoints(quant_type: str) -> tuple[int, tuple[tuple[float, int], ...]]:
    """(code of the smallest entry, (midpoint, how the code changes above it, modulo 256) from low to high)."""
    table = quant_map(quant_type)
    order = torch.argsort(table, stable=True)
    middles = ((table[order[:-1]] + table[order[1:]]) / 2).tolist()
    changes = (order.diff() % 256).tolist()
    return int(order[0]), tuple(zip(middles, changes, strict=True))


def _codes(values: Tensor, quant_type: str) -> Tensor:
    """uint8 codes of the table entries nearest to FP32 values in [-1, 1]; a tie goes to the lower entry."""
    first, steps = _midpoints(quant_type)
    codes = torch.full(values.shape, first, dtype=torch.uint8)
    above = torch.empty(values.shape, dtype=torch.bool)
    for middle, change in steps:
        torch.gt(values, middle, out=above)
        codes.add_(above.view(torch.uint8), alpha=change)
    return codes


def _pack(codes: Tensor) -> Tensor:
    """uint8 codes, an even number of them -> bytes, the first of two codes in the high four bits."""
    pairs = codes.view(torch.int16)  # little endian: the first code is the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def block_absmax(weight: Tensor, blocksize: int) -> Tensor:
    """FP32 [blocks]: the largest magnitude in every block of a weight of any floating dtype."""
    flat = weight.flatten()
    whole = flat.numel() // blocksize
    absmax = torch.empty(math.ceil(flat.numel() / blocksize))
    step = max(1, _QUANTIZE_VALUES // blocksize)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        absmax[start:stop] = flat[start * blocksize : stop * blocksize].view(-1, blocksize).abs().amax(1)
    if whole < absmax.numel():
        absmax[whole] = flat[whole * blocksize :].abs().max().float().clamp(min=_SMALLEST_ABSMAX)
    return absmax


def absmax_offset(absmax: Tensor) -> float:
    """What double quantization takes off every absmax first: their mean, an FP32 sum by torch as in bitsandbytes."""
    return float(absmax.mean())


def quantize_absmax(absmax: Tensor, offset: float) -> tuple[Tensor, NestedAbsmax]:
    """Double quantization of FP32 [blocks]: (uint8 [blocks], how to decode them)."""
    count = absmax.numel()
    blocks = math.ceil(count / NESTED_BLOCKSIZE)
    centred = torch.zeros(blocks * NESTED_BLOCKSIZE)
    centred[:count] = absmax - torch.tensor(offset)
    rows = centred.view(blocks, NESTED_BLOCKSIZE)
    nested = rows.abs().amax(1)
    scaled = (rows * (1 / nested)[:, None]).nan_to_num_(nan=-1.0).clamp_(-1, 1)  # 0 * inf: a block of zeros
    steps = scaled.add_(1).mul_((_NESTED_STEPS - 1) / 2).add_(0.5).int()
    indices = _nearest_dynamic()[steps.flatten()[:count]]
    return indices, NestedAbsmax(nested, dynamic_map(), NESTED_BLOCKSIZE, offset)


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int = 64, *, double_quant: bool = False, offset: float | None = None
) -> Quantized4bit:
    """Quantize a weight [out, in] (BF16, FP16 or FP32, finite) to NF4 or FP4.

    Args:
        quant_type: "nf4" or "fp4".
        blocksize: values that share one absmax, a power of two.
        double_quant: quantize absmax too.
        offset: the mean of absmax where it is known already (`absmax_offset`); used with `double_quant` only.
    """
    flat, count = weight.flatten(), weight.numel()
    absmax = block_absmax(weight, blocksize)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    step = max(1, _QUANTIZE_VALUES // blocksize) * blocksize
    for start in range(0, count, step):
        stop = min(start + step, count)
        scales = absmax[start // blocksize : math.ceil(stop / blocksize)]
        codes = _codes(_normalized(flat[start:stop], scales, blocksize), quant_type)
        packed[start // 2 : (stop + 1) // 2] = _pack(codes)
    shape, nested = (weight.shape[0], weight.shape[1]), None
    if double_quant:
        absmax, nested = quantize_absmax(absmax, absmax_offset(absmax) if offset is None else offset)
    return Quantized4bit(packed[:, None], absmax, quant_type, blocksize, shape, weight.dtype, nested)


def _normalized(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Values of whole blocks and perhaps a short last one, divided by their absmax: FP32, one 0 more if odd."""
    count = values.numel()
    whole = count // blocksize
    result = torch.zeros(count + count % 2)
    result[:count] = values
    result[: whole * blocksize].view(whole, blocksize).mul_((1 / absmax[:whole].clamp(min=_SMALLEST_ABSMAX))[:, None])
    if whole < absmax.numel():
        result[whole * blocksize : count].div_(absmax[whole])
    return result


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], SCB FP32 [out]) of a weight [out, in] whose values fit FP16; rows of zeros get zeros."""
    codes, scb = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    step = max(1, _QUANTIZE_VALUES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        # By way of FP32, in vectors; straight from BF16 to FP16 torch casts value by value.
        rows = weight[start : start + step].to(torch.float32, copy=True)
        rows.copy_(rows.half())
        largest = torch.maximum(rows.amax(1), -rows.amin(1)).abs()  # never -0.0
        scales = torch.where(largest > 0, 127 / largest, 0.0)
        codes[start : start + step] = rows.mul_(scales[:, None]).round_()
        scb[start : start + step] = largest
    return codes, scb


def quant_state(
    quant_type: str, blocksize: int, shape: tuple[int, int], dtype: torch.dtype, nested_offset: float | None = None
) -> Tensor:
    """The JSON that bitsandbytes keeps beside a 4-bit weight, as uint8 [bytes]; an offset means double quantization."""
    state: dict[str, object] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": nested_offset}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def tensors_4bit(weight: Quantized4bit) -> dict[str, Tensor]:
    """What lies on disk for a linear, by the suffix of its name: "weight", "weight.absmax" and so on."""
    nested = weight.nested
    state = quant_state(
        weight.quant_type, weight.blocksize, weight.shape, weight.dtype, None if nested is None else nested.offset
    )
    tensors = {
        "weight": weight.packed,
        "weight.absmax": weight.absmax,
        "weight.quant_map": quant_map(weight.quant_type),
        f"weight.{STATE_SUFFIX}{weight.quant_type}": state,
    }
    if nested is not None:
        tensors |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.quant_map}
    return tensors


def is_expert(name: str) -> bool:
    """Whether a linear (or a tensor of it) belongs to a routed expert."""
    return ".mlp.experts." in name


def int8_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of the codes of linear `name` [out, in]: an expert's are [out * in, 1]."""
    return (math.prod(shape), 1) if is_expert(name) else shape


def tensors_int8(name: str, codes: Tensor, scb: Tensor) -> dict[str, Tensor]:
    """What lies on disk for linear `name` in 8 bit, by the suffix of its name; weight_format 0 means plain rows."""
    stored = codes.view(int8_shape(name, codes.shape))
    return {"weight": stored, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
