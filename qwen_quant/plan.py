"""What a run will take, from the shapes and from timing one real block on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.activations import ActivationStore
from qwen_quant.block_solver import BlockRun, Stream, quantize_block
from qwen_quant.gptq import QuantizedWeight, SolveStats, quantize_weight, round_weight
from qwen_quant.hessian import HessianAccumulator
from qwen_quant.memory import Footprint
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
            asymmetric calibration) squares of the widest linear in FP32 + hidden states + 1 GiB.
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
    need, spec = ready.footprint, ready.spec
    widest = max(ready.reader.info(n + ".weight").shape[1] for n in spec.linear_names()[: len(spec.family.linears())])
    squares = 4.5 if len(ready.stream_rows) == 2 else 2.5
    return int(need.stored_block_bytes + squares * widest**2 * 4 + need.hidden_state_bytes + 2**30)


def _operations(rows: int, columns: int, factors: int, *, paired: bool) -> float:
    """Multiplications and additions of one solve, roughly: factors, products with the Hessian, the scale search."""
    return 4 / 3 * factors * columns**3 + (13 if paired else 7) * rows * columns**2 + 5000 * rows * columns


@dataclass
class _SolverClock:
    """Stands in for the solver: times it on a corner of each problem and counts up; the weight is only rounded.

    Attributes:
        seconds: what the solver would have taken.
        spent_seconds: what its stand-in took.
    """

    seconds: float = 0.0
    spent_seconds: float = 0.0

    def __call__(
        self, weight: Tensor, hessian: HessianAccumulator, config: GPTQConfig, *, name: str
    ) -> tuple[QuantizedWeight, SolveStats]:
        """Rounded codes of the whole weight and the corner's statistics."""
        started = time.perf_counter()
        rows, columns = weight.shape
        height, width = min(rows, TIMED_ROWS), min(columns, TIMED_COLUMNS)
        factors, paired = 1 + (hessian.paired_gram is not None), hessian.cross is not None
        share = _operations(height, width, factors, paired=paired) / _operations(rows, columns, factors, paired=paired)
        corner = hessian.corner(width, height)
        before = time.perf_counter()
        result, stats = quantize_weight(weight[:height, :width], corner, config, name=name)
        self.seconds += (time.perf_counter() - before) / share
        if (height, width) != (rows, columns):
            result = round_weight(weight, config)
        self.spent_seconds += time.perf_counter() - started
        return result, stats


def _timed_block(ready: Prepared) -> tuple[float, float, int]:
    """(solver seconds of a block, other seconds per row of both streams, rows timed), from running block 0 for real."""
    tokens = ready.calibration.input_ids.shape[1]
    rows = min(ready.calibration.input_ids.shape[0], max(1, math.ceil(TIMED_TOKENS / tokens)))
    embedding = ready.spec.family.embedding + ".weight"
    hidden = ready.reader.gather_rows(embedding, ready.calibration.input_ids[:rows])
    streams, fetch = [], shared_fetch(ready)
    for _ in ready.stream_rows:
        store = ActivationStore((rows, tokens, ready.spec.hidden_size))
        store.save(0, hidden)
        streams.append(Stream(ready.skeleton.block(0, fetch), store))
    del fetch
    context, clock, skeleton = ready.skeleton.context(0, tokens), _SolverClock(), ready.skeleton
    prefix = ready.spec.layer_prefix(0)
    run = BlockRun(prefix, context, skeleton.device, skeleton.dtype, ready.job.gptq, solve=clock)
    started = time.perf_counter()
    quantize_block(run, ready.spec.family.sub_blocks, streams, [stream.states for stream in streams])
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
    """PlanEstimate of a prepared job; runs its first block on a few rows."""
    need = ready.footprint
    solver, per_row, rows = _timed_block(ready)
    block = solver + per_row * sum(ready.stream_rows)
    seconds = block * ready.spec.num_layers
    host, vram = _split(need, ready.skeleton.device)
    tokens = rows * ready.calibration.input_ids.shape[1]
    lines = (
        f"predicted: {host / 2**30:.2f} GiB RAM" + (f", {vram / 2**30:.2f} GiB VRAM" if vram else ""),
        f"{need.disk_bytes / 2**30:.2f} GiB disk while running, {need.output_bytes / 2**30:.2f} GiB output",
        f"about {format_seconds(seconds)} ({block:.1f} s a block, timed on {tokens} tokens)",
    )
    bound = bound_bytes(ready)
    sizes = (host, vram, bound, need.disk_bytes, need.output_bytes, need.hidden_state_bytes)
    return PlanEstimate(*sizes, seconds, block, tokens, lines)
