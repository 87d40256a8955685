"""Positions of first-generation Qwen: RoPE, its dynamic NTK base, and LogN scaling of queries.

With S the trained length (seq_length) and d the rotated channels of a head:

    alpha(L) = max(2^ceil(log2(L / S) + 1) - 1, 1)        one per request, from the length L of its prompt
    base'    = base * alpha^(d / (d - 2));   inv_freq_i = base'^(-2i / d)
    LogN     = ln(n) / ln(S) for a query that sees n > S tokens, else 1

Everything is FP32; nothing is kept between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_quant.models.qwen1_config import QWenConfig


class PositionTables(NamedTuple):
    """What a layer needs to know about the positions of its inputs.

    Attributes:
        cos, sin: FP32 [rows or 1, tokens, rotated channels].
        query_scale: FP32 [rows or 1, tokens], the LogN factors; None where all are 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


def ntk_alpha(length: int, trained_length: int) -> int:
    """alpha(length): 1 up to the trained length, 3 up to twice, 7 up to four times, and so on."""
    doublings = (math.ceil(length / trained_length) - 1).bit_length() if length > trained_length else 0
    return int(2 ** (doublings + 1) - 1)


def inverse_frequencies(dim: int, base: float, alpha: float, device: torch.device | None = None) -> Tensor:
    """inv_freq, FP32 [dim / 2], of RoPE over `dim` channels with the NTK factor `alpha`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (float(base * alpha ** (dim / (dim - 2))) ** exponents)


def logn_scale(seen: Tensor, trained_length: int) -> Tensor:
    """LogN factors, FP32, of queries that see `seen` tokens each (integers of any shape, at least 1)."""
    return (seen.float().log() / math.log(trained_length)).clamp(min=1.0)


def prefill_alphas(
    config: QWenConfig, length: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[float, ...]:
    """The NTK factors of a request at its prefill: one for all rows, or one per row.

    Args:
        length: tokens of the prompt, padding included.
        attention_mask: 1 for real tokens [rows, at least length]; any other shape says nothing about lengths.
        position_ids: int64 [rows or 1, length], used where there is no such mask.
    """
    if not config.use_dynamic_ntk or length <= config.seq_length:
        return (1.0,)
    if attention_mask is not None and attention_mask.dim() == 2:
        lengths = attention_mask.ne(0).sum(1).tolist()
    elif position_ids is not None:
        lengths = (position_ids.amax(1) + 1).tolist()
    else:
        lengths = [length]
    alphas = tuple(float(ntk_alpha(int(real), config.seq_length)) for real in lengths)
    return alphas if len(set(alphas)) > 1 else alphas[:1]


def as_alphas(given: float | Sequence[float] | Tensor) -> tuple[float, ...]:
    """NTK factors that a caller gave, for all rows or one per row (ValueError for one below 1)."""
    alphas = tuple(torch.as_tensor(given, dtype=torch.float64).flatten().tolist())
    if not alphas or min(alphas) < 1:
        raise ValueError(f"ntk_alpha must be at least 1, not {given}")
    return alphas


def rotate(states: Tensor, tables: PositionTables) -> Tensor:
    """RoPE (half-split) on [rows, heads, tokens, channels], computed in FP32 and returned in the input's dtype.

    Channels beyond the tables' width pass unchanged.
    """
    width = tables.cos.shape[-1]
    part = states[..., :width].float()
    first, second = part.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    result = (part * tables.cos.unsqueeze(1) + turned * tables.sin.unsqueeze(1)).to(states.dtype)
    return result if width == states.shape[-1] else torch.cat((result, states[..., width:]), dim=-1)


class QWenRotaryEmbedding(nn.Module):
    """Makes PositionTables; holds no tensors, so that it works whatever device and dtype the model was built on."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, position_ids: Tensor, alphas: tuple[float, ...], window: int | None = None, *, logn: bool = False
    ) -> PositionTables:
        """Tables for `position_ids` (int64 [rows or 1, tokens]) under one NTK factor, or one per row.

        Args:
            window: tokens that the queries see; NTK and LogN count no more than these.
            logn: whether LogN is wanted.
        """
        config = self.config
        if window is not None:
            most = float(ntk_alpha(window, config.seq_length))
            alphas = tuple(min(alpha, most) for alpha in alphas)
        inverse = torch.stack(
            [
                inverse_frequencies(config.rotary_dim, config.rotary_emb_base, alpha, position_ids.device)
                for alpha in alphas
            ]
        )
        angles = position_ids.float().unsqueeze(-1) * inverse.unsqueeze(1)
        angles = torch.cat((angles, angles), dim=-1)
        scale = None
        if logn:
            seen = position_ids + 1
            scale = logn_scale(seen if window is None else seen.clamp(max=window), config.seq_length)
        return PositionTables(angles.cos(), angles.sin(), scale)
