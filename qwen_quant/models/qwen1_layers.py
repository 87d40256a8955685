"""The decoder block of first-generation Qwen, with the module names of the published weights.

x + c_proj(attention(c_attn(ln_1(x)))), then x + c_proj(w1(y) * silu(w2(y))) with y = ln_2(x). The norms are RMSNorms;
c_attn holds q, k and v one after the other and has the only bias; every head has its own keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_quant.models.qwen1_config import QWenConfig
from qwen_quant.models.qwen1_rope import PositionTables, rotate


class QWenRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in FP32, back to x's dtype, times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] -> the same."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(states.dtype) * self.weight


def matmul_attention(  # noqa: PLR0913 (transformers' signature)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its probabilities: attn_implementation "eager".

    Shapes: query [rows, heads, tokens, channels], key and value the same with all cached tokens, mask additive; returns
    ([rows, tokens, heads, channels], [rows, heads, tokens, cached tokens]).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class QWenAttention(nn.Module):
    """Self-attention with a fused c_attn; keys are cached after RoPE."""

    is_causal = True

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.window = config.window_of(layer_idx)
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionTables,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[rows, tokens, hidden] -> (the same, probabilities where the implementation gives them)."""
        tables = PositionTables(*position_embeddings)
        rows_tokens = hidden_states.shape[:-1]
        fused = self.c_attn(hidden_states).view(*rows_tokens, 3, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))
        query, key = rotate(query, tables), rotate(key, tables)
        if tables.query_scale is not None:
            query = query * tables.query_scale[:, None, :, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, matmul_attention
        )
        dropout = self.config.attn_dropout_prob if self.training else 0.0
        mixed, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return self.c_proj(mixed.reshape(*rows_tokens, -1)), probabilities


class QWenMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))); its width is half of intermediate_size."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return self.c_proj(self.w1(states) * functional.silu(self.w2(states)))


class QWenBlock(GradientCheckpointingLayer):
    """One decoder block."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """[rows, tokens, hidden] -> the same; `context` is what QWenAttention.forward takes."""
        hidden_states = hidden_states + self.attn(hidden_states=self.ln_1(hidden_states), **context)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))
