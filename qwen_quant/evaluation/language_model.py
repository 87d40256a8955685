"""A loaded model behind three questions: how likely is this continuation, this text, and what comes next (greedy).

These are the three requests of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, model_guide.md);
nothing here imports it. Answers are those of its own HF model at batch size 1 in the same dtype: rows are batched, but
padding is masked and a row that has stopped is cut where it stopped. Batches are laid out over all requests before any
is answered, so that a resumed run computes the same batches as one that was never killed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from qwen_quant.errors import InputError
from qwen_quant.kv_cache import make_cache

DEFAULT_MAX_LENGTH = 2048
DEFAULT_NEW_TOKENS = 256
# Padded tokens in one batch of forward passes; rows in one batch of generation. On the CPU one row at a time: four give
# twice the tokens a second, but the longest answer holds the batch, and GSM8K took twice as long in all (135M, 1 core).
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
GENERATION_ROWS = {"cpu": 1, "cuda": 32}
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GREEDY_SETTINGS = {"until", "do_sample", "temperature", "top_p", "top_k", *_NEW_TOKENS}


@dataclass(frozen=True)
class Answer:
    """What one request got: (log-likelihood in nats, greedy), log-likelihood, or text; and tokens cut off its left."""

    value: Any
    truncated_tokens: int = 0


@dataclass(frozen=True)
class Row:
    """Tokens of one scored row: `context` (at least one) and `continuation`, whose log-likelihood is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """Settings of one greedy generation: stop strings and the most tokens to add."""

    until: tuple[str, ...]
    new_tokens: int


Batch = Iterator[tuple[list[int], Callable[[], list[Answer]]]]
"""(indices of requests, what answers them): a batch that nobody calls costs nothing."""


class LanguageModel:
    """A causal model with its tokenizer.

    Args:
        model: transformers' class, on its device, in the dtype to compute in.
        tokenizer: a transformers tokenizer.
        name: of the model, for errors.
        kv_cache: kind of cache that keys and values pass through (kv_cache.make_cache); "": none but generate's own.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str, kv_cache: str = "") -> None:
        self.model, self.tokenizer, self.name, self.kv_cache = model, tokenizer, name, kv_cache
        self.device = next(model.parameters()).device
        self.max_length = max_length(model.config)

    @property
    def prefix_id(self) -> int:
        """What a text without context is conditioned on: the tokenizer's beginning or else its end token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InputError(f"the tokenizer of {self.name} has neither a beginning nor an end token")

    def encode(self, text: str) -> list[int]:
        """Token ids as the model is given them by default: without a second beginning token."""
        prefix = self.tokenizer.decode([self.prefix_id])
        special = {"add_special_tokens": False} if prefix and text.startswith(prefix) else {}
        return list(self.tokenizer(text, **special)["input_ids"])

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        """Answers (log p(continuation | context) in nats, every token the most likely one) of text pairs.

        A context longer than the model loses its beginning. Errors: InputError for an empty continuation, or one that
        is longer than the model.
        """
        rows = [self._pair(context, continuation) for context, continuation in pairs]
        return self._scored(rows)

    def rolling(self, texts: Sequence[str]) -> Batch:
        """Answers log p(text) in nats: every token predicted once, in windows that overlap by one token."""
        for index, text in enumerate(texts):
            yield [index], lambda text=text: [self._rolled(text)]  # type: ignore[misc]

    def generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> Batch:
        """Answers the greedy continuation of each prompt, before the first of its stop strings.

        A prompt that leaves no room for the new tokens loses its beginning. Errors: InputError for settings that ask
        for sampling, beams or penalties, and for more new tokens than the model has positions.
        """
        groups: dict[Generation, list[tuple[int, list[int]]]] = {}
        for index, (prompt, asked) in enumerate(prompts):
            settings = generation_settings(asked)
            if settings.new_tokens >= self.max_length:
                raise InputError(
                    f"a task asks for {settings.new_tokens} new tokens",
                    f"{self.name} has {self.max_length} positions in all",
                    "leave this task out",
                )
            groups.setdefault(settings, []).append((index, self.encode(prompt)))
        size = GENERATION_ROWS.get(self.device.type, 1)
        for settings, members in groups.items():
            members.sort(key=lambda member: (-len(member[1]), member[1]))
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                prompts_ids = [ids for _, ids in chunk]
                yield [index for index, _ in chunk], lambda p=prompts_ids, s=settings: self._generated(p, s)  # type: ignore[misc]

    def _pair(self, context: str, continuation: str) -> Row:
        """Tokens of a pair; spaces that end the context belong to the continuation's first token."""
        bare = context.rstrip()
        whole = self.encode(context + continuation)
        if bare:
            start = self.encode(bare)
            tail = whole[len(start) :]
        else:
            start = [self.prefix_id]
            tail = whole[1:] if whole[:1] == start else whole
        if not tail or len(tail) > self.max_length:
            raise InputError(
                f"a task scores a continuation of {len(tail)} tokens",
                f"it takes 1 to {self.max_length}, the positions of {self.name}",
                "leave this task out",
            )
        cut = max(0, len(start) + len(tail) - self.max_length - 1)
        return Row(tuple(start[cut:]), tuple(tail), cut)

    def _scored(self, rows: Sequence[Row]) -> Batch:
        """Batches of rows: those that differ only in their last token share one forward pass."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            shared.setdefault(row.context + row.continuation[:-1], []).append(index)
        inputs = sorted(shared, key=lambda ids: (-len(ids), ids))
        budget = BATCH_TOKENS.get(self.device.type, 1)
        start = 0
        while start < len(inputs):
            size = max(1, budget // max(len(inputs[start]), 1))
            chunk = inputs[start : start + size]
            members = [[(index, rows[index]) for index in shared[ids]] for ids in chunk]
            indices = [index for group in members for index, _ in group]
            yield indices, lambda c=chunk, m=members: self._forward(c, m)  # type: ignore[misc]
            start += size

    @torch.inference_mode()
    def _forward(self, inputs: list[tuple[int, ...]], members: list[list[tuple[int, Row]]]) -> list[Answer]:
        """Answers of the rows of one batch, in the order of `members`; logits are made only where they are scored."""
        ids, mask = padded(inputs, left=False, device=self.device)
        extra = {} if bool(mask.all()) else {"attention_mask": mask}
        cache = self._cache()
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=bool(cache), **cache, **extra).last_hidden_state
        head = self.model.get_output_embeddings()
        answers = []
        for state, tokens, group in zip(hidden, inputs, members, strict=True):
            longest = max(len(row.continuation) for _, row in group)
            scores = head(state[len(tokens) - longest : len(tokens)]).float().log_softmax(-1)
            answers += [_score(scores, row) for _, row in group]
        return answers

    def _rolled(self, text: str) -> Answer:
        """log p of one text over its windows."""
        rows = rolling_rows(self.encode(text), self.prefix_id, self.max_length)
        total = 0.0
        for _, compute in self._scored(rows):
            total += sum(answer.value[0] for answer in compute())
        return Answer(total)

    def _cache(self) -> dict[str, Any]:
        """The argument that hands the model an empty cache of the kind asked for; {} for none."""
        return {"past_key_values": make_cache(self.model.config, self.kv_cache)} if self.kv_cache else {}

    @torch.inference_mode()
    def _generated(self, prompts: list[list[int]], settings: Generation) -> list[Answer]:
        """The texts that follow the prompts of one batch."""
        room = self.max_length - settings.new_tokens
        ids, mask = padded([prompt[-room:] for prompt in prompts], left=True, device=self.device)
        end_ids = _end_ids(self.model, self.tokenizer)
        end = self.tokenizer.eos_token_id
        until = tuple(stop for stop in (*settings.until, "" if end is None else self.tokenizer.decode([end])) if stop)
        stopper = _StopStrings(self.tokenizer, until, ids.shape[1], len(prompts))
        config = copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1, max_length=None)
        config.update(max_new_tokens=settings.new_tokens, pad_token_id=end_ids[0] if end_ids else 0)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopper]),
            **self._cache(),
        )
        answers = []
        for row, prompt, stopped in zip(output.tolist(), prompts, stopper.stopped_after, strict=True):
            new = row[ids.shape[1] :][:stopped]
            ends = [new.index(end) for end in end_ids if end in new]
            text = self.tokenizer.decode(new[: min(ends)] if ends else new, skip_special_tokens=True)
            answers.append(Answer(before_stop(text, until), max(0, len(prompt) - room)))
        return answers


class _StopStrings(StoppingCriteria):
    """Ends a row once one of the strings is in what was generated; remembers after how many tokens.

    Only the last tokens are decoded at each step: as many as the longest string's bytes plus a few, since a token is
    at least one byte.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_tokens: int, rows: int) -> None:
        self._tokenizer, self._until, self._prompt_tokens = tokenizer, until, prompt_tokens
        self._tail = max((len(stop.encode()) for stop in until), default=0) + 4
        self.stopped_after: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Bool [rows]: which rows are done."""
        made = input_ids.shape[1] - self._prompt_tokens
        tails = input_ids[:, max(self._prompt_tokens, input_ids.shape[1] - self._tail) :].tolist()
        for index, tail in enumerate(tails):
            if self.stopped_after[index] is None:
                text = self._tokenizer.decode(tail)
                if any(stop in text for stop in self._until):
                    self.stopped_after[index] = made
        return torch.tensor([after is not None for after in self.stopped_after], device=input_ids.device)


def _score(log_probabilities: Tensor, row: Row) -> Answer:
    """Answer of one row from log-probabilities FP32 [n, vocabulary] of the last n positions of its input."""
    part = log_probabilities[-len(row.continuation) :]
    tokens = torch.tensor(row.continuation, device=part.device)
    total = float(part.gather(1, tokens[:, None]).sum())
    return Answer((total, bool((part.argmax(-1) == tokens).all())), row.truncated_tokens)


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Token ids that end a generation: generation_config's, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, list) else [ids])]


def padded(rows: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [rows, longest]: rows filled up with token 0 on one side, mask 0 there and 1 elsewhere."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


def max_length(config: Any) -> int:
    """Positions of a model by its config, 2048 where it does not say (lm-eval's rule, and Qwen-1's seq_length)."""
    for name in ("n_positions", "max_position_embeddings", "seq_length", "n_ctx"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return DEFAULT_MAX_LENGTH


def generation_settings(asked: Mapping[str, Any]) -> Generation:
    """Stop strings and length of a generation that is greedy (InputError for one that is not)."""
    step = "leave this task out: a paired comparison needs both models to answer deterministically"
    if asked.get("do_sample") or (asked.get("do_sample") is None and float(asked.get("temperature") or 0.0) > 0.0):
        raise InputError("a task asks for sampled answers", f"its generation_kwargs are {dict(asked)}", step)
    unknown = sorted(set(asked) - _GREEDY_SETTINGS)
    if unknown:
        raise InputError(f"a task's generation_kwargs hold '{unknown[0]}'", "only greedy decoding is done", step)
    until = asked.get("until") or ()
    lengths = [asked[name] for name in _NEW_TOKENS if asked.get(name) is not None]
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Generation(stops, int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS)


def before_stop(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def rolling_rows(tokens: Sequence[int], prefix_id: int, window: int) -> list[Row]:
    """Rows that predict each token once: the first window after the prefix token, then windows of full length.

    A later window starts one token early (its first prediction needs context); the last is moved left until it is full,
    and scores only the tokens that are still missing.
    """
    rows = []
    done = 0
    ids = [prefix_id, *tokens]
    while done < len(tokens):
        end = min(done + window, len(tokens))
        first = max(0, end - window) if done else 0
        rows.append(Row(tuple(ids[first : done + 1]), tuple(ids[done + 1 : end + 1])))
        done = end
    return rows
