"""Greedy decoding of a fixed number of tokens with nothing between two forward passes but the argmax.

`generate` serves every option there is; this serves measurements and long greedy runs. The difference is the cache:
transformers' dynamic cache copies all keys and values of a layer for every token (concatenation), its static cache
attends to the whole capacity under a mask. Here keys and values live in storage of the final length and attention sees
the filled part of it, so no token copies what is there and none needs a mask. With torch.compile, which needs shapes
that stay, the static cache is used. Where `native_step` takes the model, one native call does a whole step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from qwen_quant.errors import UsageError
from qwen_quant.kv_cache import PLAIN, Int8Cache, Int8Layer, make_cache
from qwen_quant.runtime.native_step import NativeStep, refusal


@dataclass(frozen=True)
class Decoded:
    """Result of `decode`.

    Attributes:
        tokens: int64 [batch, new_tokens].
        prefill_seconds: time to the first token.
        decode_seconds: time of the others.
        token_seconds: time of each of the others.
        compile_seconds: time of the steps that compiled (a few are run beforehand, on caches of their own); 0 without.
        step: what ran the steps: "native", "torch.compile", or "transformers (why not native)".
    """

    tokens: Tensor
    prefill_seconds: float
    decode_seconds: float
    token_seconds: tuple[float, ...]
    compile_seconds: float
    step: str

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of each row, the first token (prefill) left out; 0 for fewer than two tokens."""
        return len(self.token_seconds) / self.decode_seconds if self.token_seconds else 0.0


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one attention layer in storage that holds `capacity` tokens from the start.

    `keys` and `values` are its filled part, without a copy. More tokens than `capacity` double it.

    Args:
        capacity: tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new, width] and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        storage = self._room(key_states, value_states, start, stop)
        for held, new in zip(storage, (key_states, value_states), strict=True):
            held[:, :, start:stop] = new
        self.keys, self.values = (held[:, :, :stop] for held in storage)
        return self.keys, self.values

    def _room(self, keys: Tensor, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The storage with room for `stop` tokens; made anew when it is full or the rows were re-ordered."""
        held = self.storage
        # Re-ordering and repeating rows (the base class) leave keys that are no part of the storage any more.
        if held is not None and stop <= held[0].shape[2] and (not start or self.keys.data_ptr() == held[0].data_ptr()):
            return held
        while stop > self.capacity:
            self.capacity *= 2
        made = []
        for new, filled in ((keys, self.keys), (values, self.values)):
            storage = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
            if start:
                storage[:, :, :start] = filled
            made.append(storage)
        self.storage = (made[0], made[1])
        return self.storage

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.storage = None


def preallocated_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """transformers' dynamic cache of `model` with PreallocatedLayer for its full-attention layers.

    Sliding-window and linear-attention layers, whose size does not grow, stay transformers' own.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def decoding_cache(model: PreTrainedModel, capacity: int, kv_cache: str) -> Cache:
    """An empty cache of a kind with room for `capacity` tokens from the start."""
    if kv_cache == PLAIN:
        return preallocated_cache(model, capacity)
    cache = make_cache(model.config, kv_cache)
    assert isinstance(cache, Int8Cache)
    cache.reserve(capacity)
    return cache


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    new_tokens: int,
    *,
    compiled: bool = False,
    kv_cache: str = PLAIN,
    on_token: Callable[[int], None] | None = None,
) -> Decoded:
    """Greedy continuation of exactly `new_tokens` tokens; end-of-text tokens do not stop it.

    Args:
        model: any causal language model of transformers.
        ids: int64 [batch, length], without padding, on the model's device.
        new_tokens: at least 1.
        compiled: run steps through torch.compile (decoding only, not the prefill); needs a C++ compiler on the CPU.
        kv_cache: kind of cache (kv_cache.make_cache); torch.compile needs the plain one.
        on_token: called with the number of tokens so far.

    Errors: UsageError for no prompt token or no new token, and for another cache with torch.compile.
    """
    if compiled and kv_cache != PLAIN:
        raise UsageError("torch.compile needs a cache of fixed size", f"{kv_cache!r} grows", "decode without it")
    if new_tokens < 1 or ids.dim() != 2 or ids.shape[1] < 1:
        raise UsageError(
            f"cannot decode {new_tokens} tokens from a prompt of shape {tuple(ids.shape)}",
            "a [batch, length] prompt of at least one token and at least one new token are needed",
        )
    capacity = ids.shape[1] + new_tokens
    with torch.inference_mode():
        why_not = "torch.compile" if compiled else refusal(model, ids.shape[0], kv_cache)
        step, compile_seconds = model.forward, 0.0
        if compiled:
            step, compile_seconds = compiled_step(model, ids, capacity)
        cache = (
            StaticCache(model.config, max_cache_len=capacity) if compiled else decoding_cache(model, capacity, kv_cache)
        )
        started = time.perf_counter()
        token = next_token(model.forward, ids, cache, 0)
        native = None if why_not else NativeStep(model, filled_storage(cache))
        tokens, times = [token], [time.perf_counter()]
        for count in range(1, new_tokens):
            position = ids.shape[1] + count - 1
            if native is None:
                token = next_token(step, token, cache, position)
            else:
                token = torch.tensor([[native(int(token), position)]])
            tokens.append(token)
            times.append(time.perf_counter())
            if on_token is not None:
                on_token(count + 1)
    each = tuple(after - before for before, after in zip(times, times[1:], strict=False))
    ran = "torch.compile" if compiled else f"transformers ({why_not})" if why_not else "native"
    return Decoded(torch.cat(tokens, 1), times[0] - started, times[-1] - times[0], each, compile_seconds, ran)


def filled_storage(cache: Cache) -> list[tuple[Tensor, ...]]:
    """The storage of every layer of a preallocated or Int8 cache that has been fed a prompt, for NativeStep."""
    coded = [layer for layer in cache.layers if isinstance(layer, Int8Layer)]
    if coded:
        halves = [(layer.stores[0].parts, layer.stores[1].parts) for layer in coded]
        return [(keys[0], values[0], *keys[1:], *values[1:]) for keys, values in halves]
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer) and layer.storage is not None]
    assert len(layers) == len(cache.layers)
    return [layer.storage for layer in layers if layer.storage is not None]


def next_token(step: Callable[..., Any], ids: Tensor, cache: Any, position: int) -> Tensor:
    """int64 [batch, 1]: the likeliest token after `ids`, whose first stands at `position`."""
    positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
    output = step(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
    token: Tensor = output.logits[:, -1:].argmax(-1)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return token


def compiled_step(model: PreTrainedModel, ids: Tensor, capacity: int) -> tuple[Callable[..., Any], float]:
    """The forward pass of one token a row, compiled for a StaticCache of `capacity` tokens, and the seconds it took."""
    step = torch.compile(model.forward, dynamic=False)
    started = time.perf_counter()
    # As it will be used: after a prefill that is not compiled, and with a second cache, lest either compiles again.
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=capacity)
        token = next_token(model.forward, ids[:, :1], cache, 0)
        for position in range(1, min(3, capacity)):
            token = next_token(step, token, cache, position)
    return step, time.perf_counter() - started
