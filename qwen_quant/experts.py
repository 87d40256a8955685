"""Quantize the half of a block that has routed experts, each expert from the tokens that the router sends to it.

The router runs once over the quantized stream; then one expert at a time reads its tokens' hidden states from where
they are stored, so that only one expert's Hessian exists at any time, however many experts there are.

Asymmetric calibration pairs by the quantized stream's routing: for a token sent to an expert there, the full-precision
input is that of the same token, wherever full precision would have sent it, because the expert's task is to give what
its unquantized self would give.  An expert with fewer than PAIRED_TOKENS_PER_COLUMN paired tokens for each of its input
columns is solved without: the regression on so few would be fitted to noise.

An expert with fewer tokens than `minimum_tokens` is handled by `GPTQConfig.expert_policy`, and its statistics say so:

    route-all   every token of the calibration set goes through it, as if the router had chosen it
    pool        tokens of the whole layer, evenly spaced, are added to its own until there are enough
    round       plain rounding
"""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_quant.activations import ActivationStore
from qwen_quant.block_solver import (
    BATCH_BYTES,
    BlockRun,
    HalfRun,
    SolvedLinear,
    Stream,
    batch_rows,
    joined,
    solve_group,
    stored_linear,
)
from qwen_quant.checkpoint.families import SparseBlock, SubBlock
from qwen_quant.hessian import HessianAccumulator
from qwen_quant.models.skeleton import dense_weights, ordinary_linears
from qwen_quant.recipe import GPTQConfig

SPARSE_BATCH_BYTES = 96 << 20  # experts are made dense once a batch: many tokens each make that cheap
PAIRED_TOKENS_PER_COLUMN = 1  # measured on tiny models: from 3 tokens a column on, pairing gains 4% or changes nothing
ROUTED = "routed"
_GROUP_WITHOUT_GROUPS = 128
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertTokens:
    """What one expert is calibrated from.

    Attributes:
        tokens: int64, ascending: tokens of the calibration set (row * row length + place).
        routed: how many tokens the router sends to the expert.
        how: "routed", or the policy that stepped in because those were too few.
    """

    tokens: Tensor
    routed: int
    how: str


def minimum_tokens(config: GPTQConfig, columns: int) -> int:
    """Fewest tokens that an expert with `columns` inputs is calibrated from: so many for each group of columns.

    A row that is one group (group_size -1) counts as groups of 128.
    """
    size = _GROUP_WITHOUT_GROUPS if config.group_size == -1 else config.group_size
    return config.expert_min_tokens * math.ceil(columns / size)


def _evenly(tokens: Tensor, count: int) -> Tensor:
    """`count` of `tokens` (all of them where there are fewer), evenly spaced."""
    count = min(count, tokens.numel())
    return tokens[torch.arange(count) * tokens.numel() // max(count, 1)]


def choose_tokens(routed: Tensor, total: int, minimum: int, policy: str) -> ExpertTokens:
    """The tokens that an expert is calibrated from.

    Args:
        routed: int64, ascending: tokens sent to it.
        total: tokens of the calibration set.
        minimum: fewest that are enough; none at all never are.
        policy: what happens to an expert with fewer.
    """
    count = routed.numel()
    if count >= max(minimum, 1):
        return ExpertTokens(routed, count, ROUTED)
    if policy == "route-all":
        return ExpertTokens(torch.arange(total), count, policy)
    if policy == "pool":
        others = torch.ones(total, dtype=torch.bool)
        others[routed] = False
        added = _evenly(others.nonzero().flatten(), max(minimum, 1) - count)
        return ExpertTokens(torch.cat([routed, added]).sort().values, count, policy)
    return ExpertTokens(routed, count, policy)


class SparseRun:
    """The half with routed experts, for one or two streams (quantized first)."""

    def __init__(self, run: BlockRun, half: SparseBlock, streams: list[Stream]) -> None:
        self.run, self.half, self.streams = run, half, streams
        self.rows, self.row_tokens, self.width = streams[0].states.shape
        self.hidden = stored_linear(streams[0].block, half.expert(0).inputs[0]).weight.shape[1]

    def solve(self) -> list[SolvedLinear]:
        """Quantize the shared expert and every routed one; the quantized stream's block is changed in place."""
        solved: list[SolvedLinear] = []
        block, shared = self.streams[0].block, self.half.shared
        if shared is not None:
            walk = HalfRun(self.run, shared, self.streams)
            solved += solve_group(self.run, block, shared.inputs, walk.input_hessian())
            solved += solve_group(self.run, block, (shared.output,), walk.output_hessian())
        config = self.run.config
        minimum, total = minimum_tokens(config, self.hidden), self.rows * self.row_tokens
        chosen = [choose_tokens(routed, total, minimum, config.expert_policy) for routed in self.routed_tokens()]
        for index, tokens in enumerate(chosen):
            solved += _ExpertRun(self, self.half.expert(index), tokens).solve()
        self._warn(chosen, minimum)
        return solved

    def _warn(self, chosen: list[ExpertTokens], minimum: int) -> None:
        starved = [expert.routed for expert in chosen if expert.how != ROUTED]
        if starved:
            logger.warning(
                "%s%s: %d of %d experts got fewer than %d tokens (the fewest %d): expert policy %s",
                self.run.prefix,
                self.half.module,
                len(starved),
                len(chosen),
                minimum,
                min(starved),
                self.run.config.expert_policy,
            )

    def _spans(self, rows: int, step: int) -> list[tuple[int, int]]:
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def normed(self, stream: Stream, states: Tensor) -> Tensor:
        """norm(x) of stored states, in the compute dtype."""
        result: Tensor = stream.block.get_submodule(self.half.norm)(states.to(self.run.device, self.run.dtype))
        return result

    def routed_tokens(self) -> list[Tensor]:
        """For every expert the tokens that the quantized stream's router sends to it, int64, ascending."""
        stream, found = self.streams[0], []
        router = stream.block.get_submodule(f"{self.half.module}.gate")
        for span in self._spans(self.rows, batch_rows(self.row_tokens, self.width)):
            _, _, index = router(self.normed(stream, stream.states.load(*span)).flatten(0, -2))
            found.append(index.to("cpu", torch.int32))
        choices = torch.cat(found)
        counts = torch.bincount(choices.flatten(), minlength=self.half.count)
        places = torch.argsort(choices.flatten(), stable=True) // choices.shape[1]
        return list(places.split(counts.tolist()))

    def advance(self, outputs: list[ActivationStore]) -> None:
        """Write x + mlp(norm(x)) of every stream to `outputs` (which may be the stores x comes from)."""
        step = max(1, SPARSE_BATCH_BYTES // (4 * self.row_tokens * self.width))
        for k, stream in enumerate(self.streams):
            mlp = stream.block.get_submodule(self.half.module)
            with dense_weights(stream.block, ordinary_linears(stream.block), self.run.dtype):
                for span in self._spans(stream.states.shape[0], step):
                    hidden = stream.states.load(*span).to(self.run.device, self.run.dtype)
                    output = mlp(self.normed(stream, hidden))
                    outputs[k].save(span[0], joined(stream.block, self.half, hidden, output))
            stream.states = outputs[k]


class _ExpertRun:
    """One expert: its two solves over the tokens chosen for it."""

    def __init__(self, sparse: SparseRun, sub: SubBlock, chosen: ExpertTokens) -> None:
        self.sparse, self.run, self.sub, self.chosen = sparse, sparse.run, sub, chosen
        self.width = stored_linear(sparse.streams[0].block, sub.output).weight.shape[1]
        self.paired = self._paired_tokens()
        count = chosen.tokens.numel()
        step = max(1, BATCH_BYTES // (4 * max(self.width, sparse.hidden)))
        edges = sorted({*range(0, count, step), self.paired, count})
        self.spans = list(zip(edges, edges[1:], strict=False))

    def _paired_tokens(self) -> int:
        """How many of the chosen tokens, the first ones, come with their full-precision inputs."""
        if len(self.sparse.streams) == 1 or self.chosen.how == "round":
            return 0
        held = self.sparse.streams[1].states.shape[0] * self.sparse.row_tokens
        count = int(torch.searchsorted(self.chosen.tokens, held))
        return count if count >= PAIRED_TOKENS_PER_COLUMN * max(self.width, self.sparse.hidden) else 0

    def solve(self) -> list[SolvedLinear]:
        """Codes of gate and up together, then of down, with what they were calibrated from in their statistics."""
        run, block = self.run, self.sparse.streams[0].block
        if self.chosen.how == "round":
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, rounding_only=True))
        solved = solve_group(run, block, self.sub.inputs, self._hessian(self.sparse.hidden, taps=False))
        solved += solve_group(run, block, (self.sub.output,), self._hessian(self.width, taps=True))
        return [self._reported(linear) for linear in solved]

    def _reported(self, linear: SolvedLinear) -> SolvedLinear:
        tokens, routed, how = self.chosen.tokens.numel(), self.chosen.routed, self.chosen.how
        stats = dataclasses.replace(linear.stats, tokens=tokens, routed_tokens=routed, calibrated_by=how)
        return dataclasses.replace(linear, stats=stats)

    def _hessian(self, columns: int, *, taps: bool) -> HessianAccumulator:
        """Hessian of norm(x), or with `taps` of the down projection's input, over the chosen tokens.

        Without any token (policy "round") it is the identity: errors are then those of the weights themselves.
        """
        count = self.chosen.tokens.numel()
        paired = "none" if not self.paired else "all" if self.paired == count else "some"
        hessian = HessianAccumulator(columns, paired, self.run.device)
        if not count:
            hessian.gram.fill_diagonal_(1)
            hessian.tokens = 1
        streams = self.sparse.streams
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(dense_weights(stream.block, self.sub.inputs if taps else (), self.run.dtype))
            for start, stop in self.spans:
                present = streams if stop <= self.paired else streams[:1]
                values = [self._inputs(stream, self.chosen.tokens[start:stop], taps=taps) for stream in present]
                hessian.add(values[0], values[1] - values[0] if len(values) == 2 else None)
        return hessian

    def _inputs(self, stream: Stream, tokens: Tensor, *, taps: bool) -> Tensor:
        """FP32 [tokens, columns]: what gate and up read, or with `taps` what down reads (rounded to BF16)."""
        normed = self.sparse.normed(stream, stream.states.gather(tokens))
        if not taps:
            return normed.float()
        output = stream.block.get_submodule(self.sub.output)
        stream.block.set_submodule(self.sub.output, nn.Identity())
        try:
            value: Tensor = stream.block.get_submodule(self.sub.module)(normed)
        finally:
            stream.block.set_submodule(self.sub.output, output)
        return value.bfloat16().float()
