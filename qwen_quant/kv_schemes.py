"""The two ways to hold keys and values in 8 bit (`kv_cache.py` says what they are), as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STORED = "bf16-stored"  # a cache in BF16 for a model that computes in FP32
_LARGEST_CODE = 127
_QWEN_LARGEST_CODE = 255

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scheme:
    """One way to quantize a chunk.

    Attributes:
        quantize: [rows, heads, tokens, channels] -> (codes of that shape, then what dequantizes them, if anything,
            each [rows, heads, tokens, 1]).
        dequantize: those parts and the dtype wanted -> [rows, heads, tokens, channels].
    """

    name: str
    quantize: Callable[[Tensor], Parts]
    dequantize: Callable[[Parts, torch.dtype], Tensor]


def quantize_per_token(states: Tensor) -> tuple[Tensor, Tensor]:
    """Scheme "int8": int8 codes shaped as `states` and scales [..., 1] in its dtype.

    A token of zeros gets scale 0 and codes 0. The scale is the quotient rounded up to the dtype: no code is cut.
    """
    largest = states.abs().amax(-1, keepdim=True).float()
    scale = (largest / _LARGEST_CODE).to(states.dtype)
    # A scale rounded down would push the largest value beyond the last code: take the next number up.
    short = scale.float() * _LARGEST_CODE < largest
    scale = torch.where(short, _next_up(scale), scale)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    codes = (states.float() / divisor).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    return codes, scale


def dequantize_per_token(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_per_token`: scale * code, contiguous, in `dtype`."""
    return codes.to(dtype, memory_format=torch.contiguous_format).mul_(scale)


def quantize_cache_v(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scheme "qwen" on one chunk: uint8 codes shaped as `states` [rows, heads, tokens, channels], scale and zero.

    Scale and zero are [rows, heads, tokens, 1] in the dtype of `states`, equal for all tokens of the chunk, and every
    step is taken in that dtype, as in the original code (the name is its documentation's).
    """
    tokens = states.shape[2]
    flat = states.flatten(2)
    largest, smallest = flat.amax(-1, keepdim=True), flat.amin(-1, keepdim=True)
    scale = (largest - smallest) / _QWEN_LARGEST_CODE
    zero = 0 - smallest / scale
    # M = m (or a range too small for the dtype): with scale 1 the code is 0 and the value m comes back.
    broken = (scale == 0) | ~torch.isfinite(zero)
    scale = torch.where(broken, torch.ones_like(scale), scale)
    zero = torch.where(broken, -smallest, zero)
    scale, zero = (part.unsqueeze(-1).repeat(1, 1, tokens, 1) for part in (scale, zero))
    codes = (states / scale + zero).clamp(0, _QWEN_LARGEST_CODE).to(torch.uint8)
    return codes, scale, zero


def dequantize_cache_torch(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The inverse of `quantize_cache_v`: scale * (code - zero), in the dtype of scale."""
    return scale * (codes - zero)


def _next_up(values: Tensor) -> Tensor:
    """The next larger number of the tensor's dtype (torch.nextafter knows no F16)."""
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    return (bits + 1).view(values.dtype)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", quantize_per_token, lambda parts, dtype: dequantize_per_token(parts[0], parts[1], dtype)),
        Scheme(STORED, lambda states: (states.to(torch.bfloat16),), lambda parts, dtype: parts[0].to(dtype)),
        Scheme("qwen", quantize_cache_v, lambda parts, dtype: dequantize_cache_torch(*parts).to(dtype)),
    )
}
