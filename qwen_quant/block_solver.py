"""Quantize one half of a decoder block, each linear seeing the inputs its predecessors really give.

A block is two pre-norm halves x + output(body(norm(x))).  For each half, and for each stream (quantized so far, and the
full-precision one of asymmetric calibration):

1. norm(x) feeds the Hessian of the linears that share it; they are solved stacked, as one matrix.
2. the half runs once up to its last linear (replaced by an identity): its input z feeds that linear's Hessian.
3. x + output(z) becomes the new x.

So a block costs ONE forward pass per stream.  z is kept between 2 and 3 where it fits `CACHE_BYTES`, else the half's
body is run a second time.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwen_quant.activations import BYTES_PER_VALUE, ActivationStore
from qwen_quant.checkpoint.families import SparseBlock, SubBlock
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.gptq import QuantizedWeight, SolveStats, quantize_weight
from qwen_quant.hessian import HessianAccumulator
from qwen_quant.models.skeleton import CastLinear, StoredLinear, dense_weights, ordinary_linears
from qwen_quant.recipe import GPTQConfig
from qwen_quant.results import LayerStats

CACHE_BYTES = 512 << 20
BATCH_BYTES = 24 << 20  # below glibc's 32 MiB: freed temporaries are reused instead of faulted in anew
logger = logging.getLogger(__name__)


class SolveFn(Protocol):
    """`gptq.quantize_weight`, or a stand-in with its signature."""

    def __call__(
        self, weight: Tensor, hessian: HessianAccumulator, config: GPTQConfig, *, name: str
    ) -> tuple[QuantizedWeight, SolveStats]:
        """Codes and statistics of `weight` [out, in]."""


class CodesLinear(StoredLinear):
    """A linear whose weight is kept as codes and dequantized, exactly."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.quantized = QuantizedWeight(
            quantized.codes.to(device),
            quantized.scales.to(device),
            quantized.zeros.to(device),
            quantized.g_idx.to(device),
        )
        self.bias = bias

    def densified(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return self.quantized.dequantized().to(dtype)


@dataclass
class Stream:
    """One copy of the calibration set on its way through the model: its block, and its hidden states."""

    block: nn.Module
    states: ActivationStore


@dataclass(frozen=True)
class BlockRun:
    """What a block's solve needs besides the weights.

    Attributes:
        prefix: disk prefix of the block, with its closing dot.
        context: keyword arguments of the block's mixer.
        device, dtype: of the forward passes.
        config: the solver's settings.
        ids: int64 [rows, tokens], the calibration set; needed by halves with a lookup.
        last: no block follows, so nobody needs the hidden states after this one.
        solve: `quantize_weight`, or what stands in for it while a run is only being timed.
    """

    prefix: str
    context: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    config: GPTQConfig
    last: bool = False
    solve: SolveFn = quantize_weight
    ids: Tensor | None = None


@dataclass(frozen=True)
class SolvedLinear:
    """One quantized linear and its statistics."""

    name: str
    weight: QuantizedWeight
    stats: LayerStats


def embed(reader: CheckpointReader, name: str, ids: Tensor, stores: list[ActivationStore]) -> None:
    """Write the rows `ids` (int64 [rows, tokens]) of the embedding `name` to every store, as many rows as each has.

    Reads the matrix once and holds one copy of the rows that occur. A store wider than the embedding, for a model with
    several residual streams, gets it as often as it fits.
    """
    unique, places = torch.unique(ids, return_inverse=True)
    table = reader.gather_rows(name, unique)
    for store in stores:
        for row in range(store.shape[0]):
            store.save(row, table[places[row]].repeat(1, 1, store.shape[2] // table.shape[1]))


def batch_rows(tokens: int, widest: int) -> int:
    """Rows per batch, so that one FP32 activation of the widest linear stays near BATCH_BYTES."""
    return max(1, BATCH_BYTES // (4 * tokens * widest))


def stored_linear(block: nn.Module, name: str) -> CastLinear:
    """A linear of the block that has not been quantized yet."""
    module = block.get_submodule(name)
    assert isinstance(module, CastLinear), f"{name} is {type(module).__name__}"
    return module


def joined(block: nn.Module, half: SubBlock | SparseBlock, hidden: Tensor, output: Tensor) -> Tensor:
    """The residual stream [..., width] after a half: the sum of stream and output, or what the half's join makes."""
    result: Tensor = hidden + output if half.join is None else block.get_submodule(half.join)(hidden, output)
    return result


def add_lookup(run: BlockRun, sub: SubBlock, streams: list[Stream], outputs: list[ActivationStore]) -> None:
    """Add to every stream what the half's lookup says of its tokens: written to `outputs`, in small batches."""
    assert sub.lookup is not None and run.ids is not None
    for k, stream in enumerate(streams):
        rows, tokens, width = stream.states.shape
        lookup, step = stream.block.get_submodule(sub.lookup), batch_rows(tokens, width)
        with dense_weights(stream.block, ordinary_linears(lookup, f"{sub.lookup}."), run.dtype):
            for start in range(0, rows, step):
                hidden = stream.states.load(start, start + step).to(run.device, run.dtype)
                ids = run.ids[start : start + hidden.shape[0]].to(run.device)
                outputs[k].save(start, hidden + lookup(hidden, ids, None))
        stream.states = outputs[k]


def run_body(block: nn.Module, sub: SubBlock, hidden: Tensor, context: dict[str, Any]) -> Tensor:
    """The half's module on norm(hidden), with whatever now stands at its output linear."""
    module = block.get_submodule(sub.module)
    normed = block.get_submodule(sub.norm)(hidden)
    taken = {key: value for key, value in context.items() if key not in sub.without}
    result = module(hidden_states=normed, **taken) if sub.takes_context else module(normed)
    return result[0] if isinstance(result, tuple) else result


def _tap(block: nn.Module, sub: SubBlock, hidden: Tensor, context: dict[str, Any]) -> Tensor:
    """Input of the half's output linear."""
    linear = block.get_submodule(sub.output)
    block.set_submodule(sub.output, nn.Identity())
    try:
        return run_body(block, sub, hidden, context)
    finally:
        block.set_submodule(sub.output, linear)


class HalfRun:
    """The three steps over one half of a block, for one or two streams (quantized first)."""

    def __init__(self, run: BlockRun, sub: SubBlock, streams: list[Stream]) -> None:
        self.run, self.sub, self.streams = run, sub, streams
        inputs = [stored_linear(streams[0].block, name).weight for name in sub.inputs]
        self.in_width = inputs[0].shape[1]
        self.tap_width = stored_linear(streams[0].block, sub.output).weight.shape[1]
        widest = max(self.tap_width, self.in_width, *(weight.shape[0] for weight in inputs))
        rows, tokens, _ = streams[0].states.shape
        step = batch_rows(tokens, widest)
        edges = sorted({*range(0, rows, step), *(s.states.shape[0] for s in streams)} | {rows})
        self.spans = list(zip(edges, edges[1:], strict=False))
        shapes = [(stream.states.shape[0], tokens, self.tap_width) for stream in streams]
        cached = sum(r * t * w for r, t, w in shapes) * BYTES_PER_VALUE <= CACHE_BYTES
        self.taps = [ActivationStore(shape) for shape in shapes] if cached else None

    def _hessian(self, columns: int) -> HessianAccumulator:
        paired = "none"
        if len(self.streams) == 2:
            paired = "all" if self.streams[1].states.shape[0] == self.streams[0].states.shape[0] else "some"
        return HessianAccumulator(columns, paired, self.run.device)

    def _present(self, span: tuple[int, int]) -> list[Stream]:
        """The streams that hold these rows: the full-precision one may hold only the first rows of the set."""
        return [stream for stream in self.streams if span[1] <= stream.states.shape[0]]

    def _states(self, stream: Stream, span: tuple[int, int]) -> Tensor:
        return stream.states.load(*span).to(self.run.device, self.run.dtype)

    def _add(self, hessian: HessianAccumulator, values: list[Tensor], residual: Tensor | None = None) -> None:
        flat = [value.flatten(0, -2).float() for value in values]
        hessian.add(flat[0], flat[1] - flat[0] if len(flat) == 2 else None, residual)

    def _residual(self, span: tuple[int, int]) -> Tensor | None:
        """What the quantized stream's x lacks, FP32 [tokens, hidden] (None where nothing is to make up for it)."""
        streams = self._present(span)
        if len(streams) == 1 or not self.sub.joins_residual:
            return None
        quantized, full = (self._states(stream, span).float() for stream in streams)
        return (full - quantized).flatten(0, -2)

    def input_hessian(self) -> HessianAccumulator:
        """Hessian of norm(x)."""
        hessian = self._hessian(self.in_width)
        for span in self.spans:
            self._add(
                hessian, [s.block.get_submodule(self.sub.norm)(self._states(s, span)) for s in self._present(span)]
            )
        return hessian

    def output_hessian(self) -> HessianAccumulator:
        """Hessian of z; keeps z (rounded to BF16, as the next step will read it) where it fits."""
        hessian = self._hessian(self.tap_width)
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(dense_weights(stream.block, self.sub.inputs, self.run.dtype))
            for span in self.spans:
                present = self._present(span)
                values = [_tap(s.block, self.sub, self._states(s, span), self.run.context).bfloat16() for s in present]
                for store, value in zip(self.taps or [], values, strict=False):
                    store.save(span[0], value)
                self._add(hessian, values, self._residual(span))
        return hessian

    def advance(self, outputs: list[ActivationStore]) -> None:
        """Write x + output(z) of every stream to `outputs` (which may be the stores x comes from)."""
        for k, stream in enumerate(self.streams):
            linear = stream.block.get_submodule(self.sub.output)
            used = (self.sub.output,) if self.taps is not None else (*self.sub.inputs, self.sub.output)
            with dense_weights(stream.block, used, self.run.dtype):
                for span in (s for s in self.spans if stream in self._present(s)):
                    hidden = self._states(stream, span)
                    tap = self._tap_again(k, stream, span, hidden)
                    output = linear(tap.to(self.run.device, self.run.dtype))
                    outputs[k].save(span[0], joined(stream.block, self.sub, hidden, output))
            stream.states = outputs[k]

    def _tap_again(self, k: int, stream: Stream, span: tuple[int, int], hidden: Tensor) -> Tensor:
        """z of the rows `span`, kept or run again."""
        if self.taps is not None:
            return self.taps[k].load(*span)
        return _tap(stream.block, self.sub, hidden, self.run.context).bfloat16()


def solve_group(
    run: BlockRun, block: nn.Module, names: tuple[str, ...], hessian: HessianAccumulator
) -> list[SolvedLinear]:
    """Solve the linears `names` of the quantized block as one stacked matrix and put their codes in place."""
    modules = [stored_linear(block, name) for name in names]
    label = ", ".join(run.prefix + name for name in names)
    weight = torch.cat([module.weight for module in modules])
    started = time.perf_counter()
    whole, stats = run.solve(weight, hessian, run.config, name=label)
    seconds = time.perf_counter() - started
    if stats.damp_percent > run.config.damp_percent:
        logger.warning("%s: damping escalated to %g to factor the Hessian", label, stats.damp_percent)
    if stats.dead_columns:
        logger.warning("%s: %d of %d input columns were never active", label, stats.dead_columns, weight.shape[1])
    solved, start = [], 0
    for name, module in zip(names, modules, strict=True):
        rows = slice(start, start + module.weight.shape[0])
        part = QuantizedWeight(whole.codes[rows], whole.scales[rows], whole.zeros[rows], whole.g_idx)
        share = seconds * module.weight.shape[0] / weight.shape[0]
        layer = _layer_stats(run.prefix + name, part, stats, rows, (hessian.tokens, share))
        block.set_submodule(name, CodesLinear(part, module.bias, run.device))
        solved.append(SolvedLinear(run.prefix + name, part, layer))
        start = rows.stop
    return solved


def _layer_stats(
    name: str, part: QuantizedWeight, stats: SolveStats, rows: slice, measured: tuple[int, float]
) -> LayerStats:
    energy = float(stats.row_energy[rows].sum())
    loss, rounding = float(stats.row_loss[rows].sum()), float(stats.row_rounding_loss[rows].sum())
    out_features, in_features = part.codes.shape
    return LayerStats(
        name=name,
        in_features=in_features,
        out_features=out_features,
        relative_error=(max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0,
        rounding_error=(max(rounding, 0.0) / energy) ** 0.5 if energy > 0 else 0.0,
        damp_percent=stats.damp_percent,
        dead_columns=stats.dead_columns,
        tokens=measured[0],
        seconds=measured[1],
    )
