"""Greedy generation for the smoke checks: one loop over two ways to run a model, with the same tokens.

Prompts are one left-padded batch with a KV cache, in FP32 as the rest of the evaluation.  A model that fits into memory
is loaded dense; a larger one is never in memory as a whole: each of its decoder blocks reads its weights when it is
called and drops them when it returns, so every new token costs one pass over the checkpoint for all prompts together.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from qwen_quant.environment import memory_bytes
from qwen_quant.errors import InputError
from qwen_quant.evaluation.streaming import Head
from qwen_quant.kv_cache import PLAIN, make_cache
from qwen_quant.models.skeleton import TOKEN_IDS, Fetch, Skeleton, expected_tensors, meta_model
from qwen_quant.progress import ProgressFn
from qwen_quant.runtime.loading import WeightSource, load_model

DENSE_LIMIT_BYTES = 4 << 30
"""A larger model (in FP32) is streamed however much RAM there is, so that validation stays under 8 GB everywhere."""
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class Request:
    """One prompt: its token `ids`, and the tokens that end the answer."""

    ids: tuple[int, ...]
    stops: frozenset[int]


@dataclass(frozen=True)
class RunSettings:
    """How a model answers.

    Attributes:
        max_new_tokens: the stop token counts as one of them.
        device: where it computes.
        streamed: one block in memory at a time, from disk.
        kv_cache: kind of its cache (kv_cache.make_cache): "bf16" is the plain one.
    """

    max_new_tokens: int
    device: torch.device
    streamed: bool
    kv_cache: str = PLAIN


@dataclass(frozen=True)
class Generated:
    """What a model said to one prompt.

    Attributes:
        ids: new tokens, without the stop token.
        stopped: whether a stop token ended it.
        non_finite: whether it ended because a logit was NaN or infinite.
    """

    ids: tuple[int, ...]
    stopped: bool
    non_finite: bool


class CausalModel(Protocol):
    """What the greedy loop needs: the device, the transformers config (for the cache), the last token's logits."""

    config: Any
    device: torch.device

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """New tokens and positions int64 [rows, n], mask int64 [rows, cached + n] -> FP32 [rows, vocabulary]."""
        ...


class DenseModel:
    """The whole model in FP32 on `device`."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._model = load_model(source.folder, device, torch.float32)
        self.config, self.device = self._model.config, device

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """As in `CausalModel`."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self._model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


class _StreamedBlock(nn.Module):
    """Stands in for a decoder block: makes it when it is called, with its weights from disk, and drops it after."""

    def __init__(self, inner: nn.Module, make: Callable[[], nn.Module], finished: Callable[[], None]) -> None:
        super().__init__()
        self._make, self._finished = make, finished
        for name in ("attention_type", "layer_type"):  # the decoder chooses the mask by it
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Whatever the real block returns."""
        result = self._make()(hidden_states, *args, **kwargs)
        self._finished()
        return result


def _checked(source: WeightSource, expected: dict[str, tuple[int, ...]]) -> Fetch:
    """source.dense that also compares the shape with config.json's, as load_model does (InputError)."""

    def fetch(name: str) -> Tensor:
        value = source.dense(name)
        if tuple(value.shape) != expected.get(name, tuple(value.shape)):
            why = f"config.json asks for {expected[name]}"
            raise InputError(f"{source.folder}: '{name}' has shape {tuple(value.shape)}", why)
        return value

    return fetch


class StreamedModel:
    """The decoder of transformers around blocks that are read when they run; holds the head and one block.

    Args:
        source: the model's weights.
        device: where it computes.
        finished: called after every block.
    """

    def __init__(self, source: WeightSource, device: torch.device, finished: Callable[[], None]) -> None:
        self._source = source
        skeleton = Skeleton(source.spec, device, torch.float32)
        self._head = Head(source, skeleton)
        self.config, self.device = skeleton.model.config, device
        self._decoder = decoder = skeleton.model.get_decoder()

        fetch = _checked(source, expected_tensors(skeleton.model))

        def maker(layer: int) -> Callable[[], nn.Module]:
            return lambda: skeleton.block(layer, fetch, source.reader.gather_rows)

        layers_name = source.spec.family.layers_prefix.rsplit(".", 1)[-1]
        inner = enumerate(getattr(decoder, layers_name))
        blocks = [_StreamedBlock(block, maker(layer), finished) for layer, block in inner]
        setattr(decoder, layers_name, nn.ModuleList(blocks))
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)  # its buffers are not on disk
        setattr(decoder, source.spec.family.final_norm.rsplit(".", 1)[-1], nn.Identity())  # Head normalizes

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """As in `CausalModel`."""
        rows = self._source.reader.gather_rows(self._source.spec.family.embedding + ".weight", ids.cpu())
        # A decoder that looks things up by token ids would search its embedding, which is not held, for each row.
        tokens = {TOKEN_IDS: ids} if self._source.spec.family.lookup else {}
        hidden = self._decoder(
            inputs_embeds=rows.to(ids.device, torch.float32),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **tokens,
        ).last_hidden_state
        return self._head.logits(hidden[:, -1])


def fits_in_memory(source: WeightSource, device: torch.device) -> bool:
    """Whether the FP32 model takes at most half of the device's free memory (and DENSE_LIMIT_BYTES of RAM)."""
    needed = 4 * sum(math.prod(shape) for shape in expected_tensors(meta_model(source.spec)).values())
    if device.type == "cuda":
        return bool(needed <= torch.cuda.mem_get_info(device)[0] // 2)
    return needed <= min(memory_bytes()[1] // 2, DENSE_LIMIT_BYTES)


def stop_ids(source: WeightSource) -> frozenset[int]:
    """eos_token_id of generation_config.json, or of config.json where that names none; empty when neither does.

    Errors: InputError for a file or a value that cannot be read.
    """
    path, value = source.folder / GENERATION_CONFIG_FILE, None
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read", str(error), "fetch this file again") from error
    value = source.spec.config.get("eos_token_id") if value is None else value
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in found):
        raise InputError(f"{source.folder}: eos_token_id is {value!r}", "it must be a token id or a list of them")
    return frozenset(found)


def _check_ids(source: WeightSource, requests: Sequence[Request]) -> None:
    """Every prompt has tokens and all are rows of the embedding (InputError otherwise)."""
    rows = source.reader.info(source.spec.family.embedding + ".weight").shape[0]
    step = "put the checkpoint's own tokenizer files beside it"
    for request in requests:
        if not request.ids:
            raise InputError(f"the tokenizer of {source.folder} gives no token for a smoke prompt", next_step=step)
        if max(request.ids) >= rows:
            why = f"the embedding has {rows} rows"
            raise InputError(f"the tokenizer of {source.folder} gives token {max(request.ids)}", why, step)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and positions, int64 [rows, longest]; padding is id 0 with mask 0 and position 0."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def greedy(
    model: CausalModel, requests: Sequence[Request], settings: RunSettings, after_step: Callable[[], None]
) -> tuple[Generated, ...]:
    """The most probable token at every step (the lowest id among equals), all prompts together.

    Args:
        model: dense or streamed.
        requests: the prompts, none empty, and the tokens that end each.
        settings: how many tokens, and which cache.
        after_step: called after every step; there are fewer than max_new_tokens when every prompt has ended.
    """
    ids, mask, positions = _left_padded([request.ids for request in requests], model.device)
    cache = make_cache(model.config, settings.kv_cache)
    said: list[list[int]] = [[] for _ in requests]
    stopped, non_finite = set[int](), set[int]()
    for _ in range(settings.max_new_tokens):
        logits = model.logits(ids, mask, positions, cache)
        finite, picks = torch.isfinite(logits).all(1).tolist(), logits.argmax(1)
        for row, pick in enumerate(picks.tolist()):
            if row in stopped or row in non_finite:
                continue
            if not finite[row]:
                non_finite.add(row)
            elif pick in requests[row].stops:
                stopped.add(row)
            else:
                said[row].append(pick)
        after_step()
        if len(stopped) + len(non_finite) == len(said):
            break
        ids, positions = picks.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(said), 1)], 1)
    return tuple(Generated(tuple(row), k in stopped, k in non_finite) for k, row in enumerate(said))


def generate(
    source: WeightSource, requests: Sequence[Request], settings: RunSettings, progress: ProgressFn
) -> tuple[Generated, ...]:
    """Greedy answers of one checkpoint, run dense or streamed; progress is called after every step (streamed: block).

    Errors: InputError for weights that cannot be read, and for prompts that its embedding has no rows for.
    """
    _check_ids(source, requests)
    label = f"generating with {source.folder.name}"
    total = settings.max_new_tokens * (source.spec.num_layers if settings.streamed else 1)
    steps = itertools.count(1)

    def advance() -> None:
        progress(label, next(steps), total)

    progress(label, 0, total)
    if settings.streamed:
        answers = greedy(StreamedModel(source, settings.device, advance), requests, settings, lambda: None)
    else:
        answers = greedy(DenseModel(source, settings.device), requests, settings, advance)
    progress(label, total, total)
    return answers
