"""Int8 key/value cache with the surface of transformers' own: half the bytes of a 16-bit cache.

Two schemes, both per head; X is [rows, heads, tokens, channels]:

- "int8" (the default): one scale per token and head, symmetric, rounded. scale = max|x| / 127 over the channels, first
  rounded up to the model's dtype, so that what is stored is what was divided by; code = round(x / scale) in -127..127;
  value = scale * code. What a token becomes does not depend on the tokens it arrived with.
- "qwen": the scheme of first-generation Qwen, bit for bit: one range [m, M] per head over the whole chunk that is added
  (all tokens of a prompt, or one new token), scale = (M - m) / 255, zero = -m / scale not rounded, code = X / scale +
  zero clamped to 0..255 and truncated, value = scale * (code - zero); scale and zero are stored per token in the
  dtype of X. The original divides by zero where M = m; here such a chunk is exact (scale 1).

A third, "bf16-stored", has no codes: BF16 values of a model that computes in FP32, at half its own cache's bytes.

`update` returns all keys and values of one layer dequantized, the new ones included, so that a prompt sees what later
tokens will see; nothing dequantized outlives the layer's attention. Storage grows by GROWTH_TOKENS, not per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from qwen_quant.errors import InputError
from qwen_quant.kv_schemes import (
    SCHEMES,
    STORED,
    Parts,
    Scheme,
    dequantize_cache_torch,
    dequantize_per_token,
    quantize_cache_v,
    quantize_per_token,
)

__all__ = [
    "PLAIN",
    "STORED",
    "Int8Cache",
    "Int8Layer",
    "attention_layers",
    "dequantize_cache_torch",
    "dequantize_per_token",
    "held_states",
    "make_cache",
    "quantize_cache_v",
    "quantize_per_token",
]
logger = logging.getLogger(__name__)

GROWTH_TOKENS = 256
DEFAULT_SCHEME = "int8"
PLAIN = "bf16"  # what the command line calls the cache in the model's own dtype
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LayerPast = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def held_states(states: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """What attention reads back of `states` [rows, heads, tokens, channels] whose tokens were cached one by one.

    Bit for bit what a cache of `kind` ("bf16": the plain one, "int8", "qwen") returns while it decodes, the newest
    token included; as a chunk of their own every token has its own range in "qwen" too. `dtype` is the cache's, that is
    the served model's; the result is in the dtype of `states`.
    """
    held = states.to(dtype)
    if kind != PLAIN:
        scheme = SCHEMES[kind]
        chunks = held.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        back = scheme.dequantize(scheme.quantize(chunks), dtype)
        held = back.squeeze(2).unflatten(0, (states.shape[0], states.shape[2])).transpose(1, 2)
    return held.to(states.dtype)


def attention_layers(config: PreTrainedConfig) -> frozenset[int]:
    """Layers whose keys and values an Int8 cache holds: all but the linear-attention ones of a hybrid model.

    Errors: InputError for a model without any, or with layers of a kind that is not known.
    """
    return frozenset(i for i, layer in enumerate(Int8Cache(config).layers) if isinstance(layer, Int8Layer))


class _Storage:
    """The quantized keys, or values, of one layer: tensors [rows, heads, capacity, channels or 1].

    Slots from `length` on are spare. The first growth makes room for `reserved` tokens at least.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.parts: Parts = ()
        self.length = 0
        self.reserved = 0

    @property
    def used(self) -> Parts:
        """The parts up to `length`, as views."""
        return tuple(part[:, :, : self.length] for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare slots included."""
        return sum(part.nbytes for part in self.parts)

    def append(self, states: Tensor) -> None:
        """Quantize `states` [rows, heads, tokens, channels] behind what is there."""
        end = self.length + states.shape[2]
        new = self.scheme.quantize(states)
        if not self.parts or end > self.parts[0].shape[2]:
            self._grow(new, -(-max(end, self.reserved) // GROWTH_TOKENS) * GROWTH_TOKENS)
        for part, piece in zip(self.parts, new, strict=True):
            part[:, :, self.length : end] = piece
        self.length = end

    def _grow(self, like: Parts, capacity: int) -> None:
        """Room for `capacity` tokens, one part after the other so that only one is held twice."""
        old, grown = list(self.parts), []
        for index, piece in enumerate(like):
            room = piece.new_empty((*piece.shape[:2], capacity, piece.shape[3]))
            if old:
                room[:, :, : self.length] = old[index][:, :, : self.length]
                old[index] = room
                self.parts = tuple(old)
            grown.append(room)
        self.parts = tuple(grown)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put every part through a `function` of its rows."""
        self.parts = tuple(function(part) for part in self.parts)


class Int8Layer(CacheLayerMixin):
    """Cache of one attention layer; the storage of `keys` and `values` is in `stores`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, scheme: str = DEFAULT_SCHEME) -> None:
        super().__init__()
        self.scheme = SCHEMES[scheme]
        self.stores = (_Storage(self.scheme), _Storage(self.scheme))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states (InputError for a dtype that is not 16-bit or F32)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.dtype not in _DTYPES:
            raise InputError(
                f"the int8 cache cannot hold {self.dtype} keys",
                "it knows bfloat16, float16 and float32",
                "load the model in one of them",
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add states [rows, heads, tokens, channels]; returns all keys and values, dequantized in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.append(states)
        return self.dequantized()

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """(keys, values), [rows, heads, tokens, channels], as new tensors in the model's dtype."""
        key, value = (self.scheme.dequantize(store.used, self.dtype) for store in self.stores)
        return key, value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(cached and new tokens, offset 0): every position stays, sliding windows are the mask's work."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.stores[0].length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(store.nbytes for store in self.stores)

    def offload(self) -> None:
        """Move the codes to the CPU."""
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the codes back to the layer's device."""
        self._change(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        self.stores = (_Storage(self.scheme), _Storage(self.scheme))
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -`tokens_to_remove` tokens (a number up to 0, as transformers has it; else ValueError)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        for store in self.stores:
            store.length = max(0, store.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx`[i] (int64 [rows])."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask)."""
        self._change(lambda part: part[indices, ...])

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.change(function)


class Int8IndexedLayer(Int8Layer):
    """An Int8Layer with what the indexer of sparse attention (qwen4_exp) keeps beside keys and values.

    Its keys, of one narrow head, decide which tokens attention sees: they stay as they are, in transformers' own layer,
    of which only this part is used.
    """

    def __init__(self, scheme: str = DEFAULT_SCHEME) -> None:
        super().__init__(scheme)
        self.indexer = DynamicIndexedLayer()

    @property
    def indexer_keys(self) -> Tensor | None:
        """[rows, tokens, channels] in the model's dtype; None before the first."""
        keys: Tensor | None = self.indexer.indexer_keys
        return keys

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of all tokens, which the model keeps in its first such layer."""
        positions: Tensor | None = self.indexer.indexer_position_ids
        return positions

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor | None) -> None:
        self.indexer.indexer_position_ids = positions

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add keys [rows, tokens, channels] of the indexer; returns all of them."""
        keys: Tensor = self.indexer.update_indexer(indexer_key_states)
        return keys

    def offload(self) -> None:
        """Move everything to the CPU."""
        super().offload()
        self.indexer.offload()

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        super().prefetch()
        self.indexer.device = self.device
        self.indexer.prefetch()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.indexer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -`tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        self.indexer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx`[i] (int64 [rows])."""
        super().reorder_cache(beam_idx)
        self.indexer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.indexer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask)."""
        super().batch_select_indices(indices)
        self.indexer.batch_select_indices(indices)


class Int8Cache(Cache):
    """A model's cache with Int8 keys and values: give it as `past_key_values` to a model or to `generate`.

    Attention layers hold codes; layers of a hybrid model without keys and values keep transformers' own cache. More
    tokens than config.json has positions are held, as in the plain cache, and logged as a warning once.

    Errors: InputError for an unknown scheme, a model without attention layers, or a layer of a kind that is not known.
    """

    def __init__(self, config: PreTrainedConfig, scheme: str = DEFAULT_SCHEME) -> None:
        if scheme not in SCHEMES:
            raise InputError(f"unknown cache scheme {scheme!r}", "", f"choose one of {', '.join(SCHEMES)}")
        self.scheme = scheme
        super().__init__(layers=[_int8_layer(layer, scheme) for layer in DynamicCache(config=config).layers])
        self._positions: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not any(isinstance(layer, Int8Layer) for layer in self.layers):
            raise InputError(
                f"model_type {config.model_type!r} has no attention layers", "there is nothing to cache in int8"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add states of layer `layer_idx`: all its keys and values, as `Int8Layer.update`."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._positions is not None and keys.shape[2] > self._positions:
            logger.warning("the cache holds %d tokens, the model has %d positions", keys.shape[2], self._positions)
            self._positions = None
        return keys, values

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens at once when the first come, for who knows how many there will be."""
        for layer in self.layers:
            if isinstance(layer, Int8Layer):
                for store in layer.stores:
                    store.reserved = tokens

    def layer_past(self, layer: int) -> LayerPast:
        """Layer `layer` as the original lays it out: ((key codes, scale, zero), (value codes, scale, zero)), views.

        Errors: InputError unless the scheme is "qwen" and the layer has keys.
        """
        entry = self.layers[layer]
        if self.scheme != "qwen" or not isinstance(entry, Int8Layer) or not entry.is_initialized:
            raise InputError(f"layer {layer} has no layer_past", "only a filled cache of scheme 'qwen' has")
        key, value = ((used[0], used[1], used[2]) for used in (store.used for store in entry.stores))
        return key, value


def _int8_layer(plain: Any, scheme: str) -> Any:
    """What stands for transformers' cache layer `plain` (InputError for one that is neither attention nor linear)."""
    if type(plain) is DynamicIndexedLayer:
        return Int8IndexedLayer(scheme)
    if type(plain) in (DynamicLayer, DynamicSlidingWindowLayer):
        return Int8Layer(scheme)
    if type(plain) is LinearAttentionLayer:
        return plain
    raise InputError(f"no int8 cache for layers of kind {type(plain).__name__}", "", "use the plain cache")


def make_cache(config: PreTrainedConfig, kind: str) -> Cache:
    """An empty cache: "bf16" (transformers' own, in the model's dtype), or a scheme: "int8", "qwen", "bf16-stored".

    Errors: InputError for another kind.
    """
    if kind == PLAIN:
        return DynamicCache(config=config)
    if kind not in SCHEMES:
        raise InputError(f"unknown cache {kind!r}", "", f"choose one of {', '.join((PLAIN, *SCHEMES))}")
    return Int8Cache(config, kind)
