"""How many bytes a cache of any kind holds, and for how many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from qwen_quant.kv_cache import Int8Layer


@dataclass(frozen=True)
class CacheSize:
    """Bytes allocated.

    Attributes:
        nbytes: all of them.
        fixed_bytes: of these, the states of linear-attention layers, which do not grow with the tokens.
        capacity: tokens a row that the rest has room for, spare ones included.
    """

    nbytes: int
    fixed_bytes: int
    capacity: int

    def filled(self, tokens: int) -> CacheSize:
        """The size of the part that `tokens` of the room for `capacity` take."""
        grown = (self.nbytes - self.fixed_bytes) * tokens // max(1, self.capacity)
        return CacheSize(self.fixed_bytes + grown, self.fixed_bytes, tokens)


def cache_size(cache: Cache) -> CacheSize:
    """The size of a cache of transformers or of `kv_cache`."""
    fixed = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in _states(layer))
    grown = sum(_grown_nbytes(layer) for layer in cache.layers)
    return CacheSize(fixed + grown, fixed, _capacity(cache))


def cache_dtype(cache: Cache) -> torch.dtype:
    """The dtype of the keys, or of their codes, in a cache that has been given some."""
    layer: Any = next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized)
    dtype: torch.dtype = layer.stores[0].parts[0].dtype if isinstance(layer, Int8Layer) else layer.dtype
    return dtype


def _states(layer: Any) -> list[Tensor]:
    """States of a linear-attention layer."""
    kinds = (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None))
    return [tensor for kind in kinds if isinstance(kind, dict) for tensor in kind.values() if tensor is not None]


def _grown_nbytes(layer: Any) -> int:
    """Bytes of keys and values, and of a sparse-attention indexer's keys."""
    held = layer.nbytes if isinstance(layer, Int8Layer) else 0
    names = ("keys", "values", "indexer_keys")
    tensors = [value for name in names if isinstance(value := getattr(layer, name, None), Tensor)]
    return held + sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _capacity(cache: Cache) -> int:
    held = [part.shape[2] for layer in cache.layers if isinstance(layer, Int8Layer) for part in layer.stores[0].parts]
    plain = [
        keys for layer in cache.layers if isinstance(keys := getattr(layer, "keys", None), Tensor) and keys.numel()
    ]
    held += [keys.untyped_storage().nbytes() * keys.shape[2] // keys.nbytes for keys in plain]
    return max(held) if held else int(cache.get_seq_length())
