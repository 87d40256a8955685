"""What a run will take, from the shapes and from timing one real block on this machine."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_quant.activations import ActivationStore
from qwen_quant.block import quantize_block
from qwen_quant.block_solver import BlockRun, Stream, embed
from qwen_quant.environment import free_disk_bytes, memory_bytes
from qwen_quant.gptq import QuantizedWeight, SolveStats, quantize_weight, round_weight
from qwen_quant.hessian import HessianAccumulator
from qwen_quant.memory import Footprint, one_of_each_linear
from qwen_quant.preparation import Prepared, QuantizeJob, prepare, shared_fetch
from qwen_quant.recipe import GPTQConfig
from qwen_quant.units import format_seconds

TIMED_TOKENS = 4096
TIMED_ROWS, TIMED_COLUMNS = 1536, 2048  # of the solver's problems; what is larger is counted up


@dataclass(frozen=True)
class PlanEstimate:
    """Predicted cost of a `gptq` run.

    Attributes:
        peak_memory_bytes: host memory, interpreter included.
        peak_vram_bytes: memory of the GPU (0 on the CPU).
        bound_bytes: what the design promises to stay under, above the interpreter: one block as stored + 2.5 (4.5 with
            asymmetric calibration) squares of the widest linear in FP32 + hidden states + 1 GiB, and with routed
            experts the block's codes (half of the stored block).
        disk_bytes: the artifact and what resuming needs while it is built.
        output_bytes: tensors of the artifact.
        hidden_state_bytes: of all streams.
        seconds: whole run.
        block_seconds: one block.
        timed_tokens: calibration tokens that the timing ran on.
        lines: the same for a person.
    """

    peak_memory_bytes: int
    peak_vram_bytes: int
    bound_bytes: int
    disk_bytes: int
    output_bytes: int
    hidden_state_bytes: int
    seconds: float
    block_seconds: float
    timed_tokens: int
    lines: tuple[str, ...]


def bound_bytes(ready: Prepared) -> int:
    """The promised bound above the interpreter's own memory (see PlanEstimate)."""
    need = ready.footprint
    widest = max(ready.reader.info(name + ".weight").shape[1] for name in one_of_each_linear(ready.spec))
    squares = 4.5 if len(ready.stream_rows) == 2 else 2.5
    block = need.block_bytes if ready.spec.expert_count else need.stored_block_bytes
    return int(block + squares * widest**2 * 4 + need.hidden_state_bytes + 2**30)


def _operations(rows: int, columns: int, factors: int, *, paired: bool) -> float:
    """Multiplications and additions of one solve, roughly: factors, products with the Hessian, the scale search."""
    return 4 / 3 * factors * columns**3 + (13 if paired else 7) * rows * columns**2 + 5000 * rows * columns


@dataclass
class _SolverClock:
    """Stands in for the solver: times it on a corner of each problem and counts up; the weight is only rounded.

    Attributes:
        seconds: what the solver would have taken.
        spent_seconds: what its stand-in took.
        known: what the first expert's problems gave and took, by shape: the other experts are not timed again.
    """

    seconds: float = 0.0
    spent_seconds: float = 0.0
    known: dict[torch.Size, tuple[QuantizedWeight, SolveStats, float]] = field(default_factory=dict)

    def __call__(
        self, weight: Tensor, hessian: HessianAccumulator, config: GPTQConfig, *, name: str
    ) -> tuple[QuantizedWeight, SolveStats]:
        """Rounded codes of the whole weight and the corner's statistics."""
        started = time.perf_counter()
        if ".experts." in name and weight.shape in self.known:
            result, stats, seconds = self.known[weight.shape]
            self.seconds += seconds
            return result, stats
        rows, columns = weight.shape
        height, width = min(rows, TIMED_ROWS), min(columns, TIMED_COLUMNS)
        factors, paired = 1 + (hessian.paired_gram is not None), hessian.cross is not None
        share = _operations(height, width, factors, paired=paired) / _operations(rows, columns, factors, paired=paired)
        corner = hessian.corner(width, height)
        before = time.perf_counter()
        result, stats = quantize_weight(weight[:height, :width], corner, config, name=name)
        seconds = (time.perf_counter() - before) / share
        self.seconds += seconds
        if (height, width) != (rows, columns):
            result = round_weight(weight, config)
        if ".experts." in name:
            self.known[weight.shape] = result, stats, seconds
        self.spent_seconds += time.perf_counter() - started
        return result, stats


def _timing_config(config: GPTQConfig) -> GPTQConfig:
    """Experts take the tokens they get: a few rows reach too few of them for the policy to say anything."""
    return dataclasses.replace(config, expert_min_tokens=0, expert_policy="round")


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings: what a few rows under `_timing_config` meet says nothing of the run."""
    log = logging.getLogger("qwen_quant")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _timed_block(ready: Prepared, layer: int) -> tuple[float, float, int]:
    """(solver seconds, other seconds per row of both streams, rows timed) of block `layer`, run for real."""
    tokens = ready.calibration.input_ids.shape[1]
    rows = min(ready.calibration.input_ids.shape[0], max(1, math.ceil(TIMED_TOKENS / tokens)))
    embedding = ready.spec.family.embedding + ".weight"
    ids = ready.calibration.input_ids[:rows]
    streams, fetch = [], shared_fetch(ready)
    for _ in ready.stream_rows:
        store = ActivationStore((rows, tokens, ready.spec.stream_width))
        embed(ready.reader, embedding, ids, [store])
        streams.append(Stream(ready.skeleton.block(layer, fetch, ready.reader.gather_rows), store))
    del fetch
    context, clock, skeleton = ready.skeleton.context(layer, tokens), _SolverClock(), ready.skeleton
    prefix = ready.spec.layer_prefix(layer)
    run = BlockRun(
        prefix, context, skeleton.device, skeleton.dtype, _timing_config(ready.job.gptq), solve=clock, ids=ids
    )
    started = time.perf_counter()
    with _silent():
        quantize_block(run, ready.spec.blocks[layer], streams, [stream.states for stream in streams])
    if skeleton.device.type == "cuda":
        torch.cuda.synchronize()
    total = time.perf_counter() - started
    return clock.seconds, max(total - clock.spent_seconds, 0.0) / (rows * len(streams)), rows


def _split(need: Footprint, device: torch.device) -> tuple[int, int]:
    """(host, GPU) bytes of a footprint."""
    if device.type == "cpu":
        return need.peak_memory_bytes, 0
    on_device = need.block_bytes + need.square_bytes + need.working_bytes
    host = need.interpreter_bytes + need.block_bytes + (need.hidden_state_bytes if need.hidden_in_memory else 0)
    return host, on_device


def make_plan(job: QuantizeJob) -> PlanEstimate:
    """Predict a run without writing anything (InputError for whatever would stop the run itself)."""
    ready = prepare(job, writing=False)
    return estimate(ready)


def estimate(ready: Prepared) -> PlanEstimate:
    """PlanEstimate of a prepared job; runs the first block of each kind on a few rows."""
    need, seconds, rows = ready.footprint, 0.0, 0
    for layers in ready.spec.kinds().values():
        solver, per_row, rows = _timed_block(ready, layers[0])
        seconds += (solver + per_row * sum(ready.stream_rows)) * len(layers)
    block = seconds / max(ready.spec.num_layers, 1)
    host, vram = _split(need, ready.skeleton.device)
    tokens = rows * ready.calibration.input_ids.shape[1]
    lines = (
        f"predicted: {host / 2**30:.2f} GiB RAM" + (f", {vram / 2**30:.2f} GiB VRAM" if vram else ""),
        f"{need.disk_bytes / 2**30:.2f} GiB disk while running, {need.output_bytes / 2**30:.2f} GiB output",
        f"about {format_seconds(seconds)} ({block:.1f} s a block, timed on {tokens} tokens)",
        f"free here: {memory_bytes()[1] / 2**30:.2f} GiB RAM, {free_disk_bytes(ready.work.out) / 2**30:.2f} GiB disk",
    )
    bound = bound_bytes(ready)
    sizes = (host, vram, bound, need.disk_bytes, need.output_bytes, need.hidden_state_bytes)
    return PlanEstimate(*sizes, seconds, block, tokens, lines)
