"""Linear attention (qwen3_next, qwen3_5) in other runtimes: which of its stored values they keep in another form.

llama.cpp and mlx-lm store the factor 1 + weight of a norm, which the model itself computes in FP32; written in FP32 it
is the model's own number.  llama.cpp also stores -exp(A_log), and repeats key heads in another order than
transformers: where value head h of r per key head has key head h // r in transformers, llama.cpp takes h % key heads
(qwen3_5; for qwen3_next it sorts the rows of the fused projection by q, k, v, z instead).  Rows and blocks of columns
are moved whole, so no weight changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen_quant.checkpoint.halves import SubBlock

if TYPE_CHECKING:
    from qwen_quant.checkpoint.families import ModelSpec


def is_hybrid(spec: ModelSpec) -> bool:
    """Whether some blocks have linear attention."""
    return spec.family.linear_mixer is not None


def adds_one(spec: ModelSpec, name: str) -> bool:
    """Whether the model multiplies by 1 + this tensor (the norm inside linear attention multiplies by its weight)."""
    return is_hybrid(spec) and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def one_plus(rows: Tensor) -> Tensor:
    """FP32 1 + weight, as the model computes it."""
    return rows.float() + 1.0


def decay(rows: Tensor) -> Tensor:
    """FP32 -exp(A_log), as the model computes it."""
    return -rows.float().exp()


def is_vision(spec: ModelSpec, name: str) -> bool:
    """Whether tensor `name` belongs to the vision tower, which a text runtime has no place for."""
    return spec.family.has_vision and name.startswith("model.visual.")


def full_attention_interval(spec: ModelSpec) -> int | None:
    """n where exactly every n-th block has full attention; None where the blocks follow no such rule."""
    mixers = [halves[0] for halves in spec.blocks]
    full = [isinstance(half, SubBlock) and half.module == "self_attn" for half in mixers]
    if True not in full:
        return None
    interval = full.index(True) + 1
    return interval if full == [(k + 1) % interval == 0 for k in range(len(full))] else None


def value_head_order(spec: ModelSpec, width: int) -> Tensor:
    """int64 [value heads * width]: rows (`width` a head) in llama.cpp's order, as indices into transformers' order."""
    config = spec.text_config
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    return torch.arange(values * width).view(keys, values // keys, width).transpose(0, 1).flatten()


def key_rows(spec: ModelSpec) -> int:
    """Rows of the queries and keys of a linear-attention block, which stand in front of its values."""
    config = spec.text_config
    return 2 * int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])


def behind_keys(spec: ModelSpec) -> Tensor:
    """int64: rows of [queries, keys, values] with the value heads in llama.cpp's order."""
    start, order = key_rows(spec), value_head_order(spec, int(spec.text_config["linear_value_head_dim"]))
    return torch.cat([torch.arange(start), start + order])


def fused_rows(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """int64 rows of qwen3_next's in_proj_qkvz, which holds q, k, v, z of one key head after another: (q k v, z)."""
    config = spec.text_config
    heads, key = int(config["linear_num_key_heads"]), int(config["linear_key_head_dim"])
    value = int(config["linear_num_value_heads"]) // heads * int(config["linear_value_head_dim"])
    rows = torch.arange(heads * 2 * (key + value)).view(heads, -1)
    q, k, v, z = (part.flatten() for part in rows.split([key, key, value, value], 1))
    return torch.cat([q, k, v]), z
