"""Codes <-> qweight and zeros <-> qzeros in AutoGPTQ's layout; the only packing code, both zero conventions.

Codes are a little-endian bit stream of int32 words along one axis: code k occupies bits k*bits .. k*bits+bits-1, so 32
codes fill `bits` words (with 3 bits, codes 10 and 21 straddle a word's edge).

| tensor | dtype | shape | content |
|---|---|---|---|
| qweight | int32 | [in*bits/32, out] | codes, packed along in |
| qzeros | int32 | [groups, out*bits/32] | zeros - 1 ("gptq") or zeros ("gptq_v2"), packed along out |
| scales | FP16 | [groups, out] | |
| g_idx | int32 | [in] | group of each input column |
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.gptq import QuantizedWeight

WORD_BITS = 32


def _pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, m] -> int32 [n*bits/32, m], packed along the first axis."""
    n, m = codes.shape
    padded = np.zeros((-(-n // WORD_BITS) * WORD_BITS, m), dtype=np.uint8)
    padded[:n] = codes
    lanes = padded.reshape(-1, WORD_BITS, m)
    words = np.zeros((lanes.shape[0], bits, m), dtype=np.uint32)
    for k in range(WORD_BITS):
        word, offset = divmod(k * bits, WORD_BITS)
        lane = lanes[:, k].astype(np.uint32)
        words[:, word] |= lane << np.uint32(offset)
        if offset + bits > WORD_BITS:
            words[:, word + 1] |= lane >> np.uint32(WORD_BITS - offset)
    return words.reshape(-1, m)[: n * bits // WORD_BITS].view(np.int32)


def _unpack_rows(packed: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n*bits/32, m] -> uint8 [n, m]; the inverse of `_pack_rows`."""
    count, m = packed.shape
    n = count * WORD_BITS // bits
    words = np.zeros((-(-count // bits) * bits, m), dtype=np.uint32)
    words[:count] = packed.view(np.uint32)
    words = words.reshape(-1, bits, m)
    codes = np.empty((words.shape[0], WORD_BITS, m), dtype=np.uint8)
    mask = np.uint32(2**bits - 1)
    for k in range(WORD_BITS):
        word, offset = divmod(k * bits, WORD_BITS)
        value = words[:, word] >> np.uint32(offset)
        if offset + bits > WORD_BITS:
            value |= words[:, word + 1] << np.uint32(WORD_BITS - offset)
        codes[:, k] = (value & mask).astype(np.uint8)
    return codes.reshape(-1, m)[:n]


def packed_specs(
    in_features: int, out_features: int, bits: int, group_size: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """suffix -> (dtype, shape) of a packed linear (InputError when its sizes do not fill whole words)."""
    for label, size in (("in_features", in_features), ("out_features", out_features)):
        if size * bits % WORD_BITS:
            raise InputError(
                f"{label} = {size} does not pack into 32-bit words at {bits} bits",
                "the gptq layout has no room for a part of a word",
                "use --bits 8 or 4 where that divides",
            )
    groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
    return {
        "qweight": (torch.int32, (in_features * bits // WORD_BITS, out_features)),
        "qzeros": (torch.int32, (groups, out_features * bits // WORD_BITS)),
        "scales": (torch.float16, (groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }


def pack_weight(weight: QuantizedWeight, bits: int, checkpoint_format: str) -> dict[str, Tensor]:
    """The pivot as qweight, qzeros, scales and g_idx (see the module's table)."""
    zeros = weight.zeros.numpy()
    if checkpoint_format == "gptq":
        zeros = (zeros - 1) & np.uint8(2**bits - 1)  # zero 0 wraps; our solver never makes one
    return {
        "qweight": torch.from_numpy(_pack_rows(weight.codes.numpy().T, bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(_pack_rows(zeros, bits).T)),
        "scales": weight.scales.mT.contiguous(),
        "g_idx": weight.g_idx,
    }


def unpack_weight(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str) -> QuantizedWeight:
    """The pivot of a packed linear; `tensors` has the four suffixes (g_idx may be absent: consecutive groups)."""
    codes = _unpack_rows(tensors["qweight"].contiguous().numpy(), bits).T
    zeros = _unpack_rows(np.ascontiguousarray(tensors["qzeros"].numpy().T), bits)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & np.uint8(2**bits - 1)
    scales = tensors["scales"].mT.contiguous().half()
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        size = math.ceil(codes.shape[1] / scales.shape[1])
        g_idx = torch.arange(codes.shape[1]) // size
    return QuantizedWeight(
        torch.from_numpy(np.ascontiguousarray(codes)),
        scales,
        torch.from_numpy(np.ascontiguousarray(zeros)),
        g_idx.to(torch.int32),
    )
