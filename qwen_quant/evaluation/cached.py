"""Keys and values as a KV cache gives them back, inside one forward pass over a whole window.

A model that decodes puts the keys and values of every token into its cache and attends to what the cache returns, the
newest token's included. Each token's figures are written once and never change, so reading them all back through
`kv_cache.held_states` in a single pass over the window is what decoding it token by token computes, without holding a
cache. The rest of the arithmetic stays in FP32, as everywhere in the evaluation: what differs is the cache alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen_quant.checkpoint.families import ModelSpec
from qwen_quant.kv_cache import attention_layers, held_states

_CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheStandIn:
    """Stands where one attention layer expects the model's cache, and forgets everything.

    Attributes:
        kind: of the cache, as `kv_cache.make_cache` names it.
        dtype: of the cache.
    """

    kind: str
    dtype: torch.dtype

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[rows, heads, tokens, channels] of a whole window -> the same, written to a cache and read again."""
        return held_states(key_states, self.kind, self.dtype), held_states(value_states, self.kind, self.dtype)

    def update_indexer(self, indexer_key_states: Tensor, *_: Any) -> Tensor:
        """The keys of a sparse-attention indexer, which every cache keeps as they are."""
        return indexer_key_states


def cache_dtype(spec: ModelSpec) -> torch.dtype:
    """The dtype that a model is served and so cached in: that of config.json, BF16 where it names none."""
    names = [config.get(key) for config in (spec.config, spec.text_config) for key in ("dtype", "torch_dtype")]
    return next((_CACHE_DTYPES[name] for name in names if name in _CACHE_DTYPES), torch.bfloat16)


def cache_context(spec: ModelSpec, model: PreTrainedModel, kind: str) -> dict[int, dict[str, Any]]:
    """What the blocks get besides their usual arguments, by layer; {} for kind "", and for layers without a cache.

    Errors: InputError for a model without attention layers.
    """
    if not kind:
        return {}
    stand_in = CacheStandIn(kind, cache_dtype(spec))
    return {layer: {"past_key_values": stand_in} for layer in attention_layers(model.config)}


def cache_notes(kind: str) -> tuple[str, ...]:
    """What a reader must know of a comparison with a cache of this kind."""
    if kind != "qwen":
        return ()
    return (
        "the qwen cache scales a prompt as a whole and every generated token by itself: texts are measured as "
        "generated tokens, a prompt loses more",
    )
