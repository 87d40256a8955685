"""What a run will take, from the shapes and from timing one real block on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from qwen_quant.activations import ActivationStore
from qwen_quant.block_solver import BlockRun, Stream, quantize_block
from qwen_quant.memory import Footprint
from qwen_quant.preparation import Prepared, QuantizeJob, prepare, shared_fetch
from qwen_quant.units import format_seconds

TIMED_TOKENS = 4096


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
    context = ready.skeleton.context(0, tokens)
    run = BlockRun(ready.spec.layer_prefix(0), context, ready.skeleton.device, ready.skeleton.dtype, ready.job.gptq)
    started = time.perf_counter()
    solved = quantize_block(run, ready.spec.family.sub_blocks, streams, [stream.states for stream in streams])
    if ready.skeleton.device.type == "cuda":
        torch.cuda.synchronize()
    total = time.perf_counter() - started
    solver = sum(linear.stats.seconds for linear in solved)
    return solver, max(total - solver, 0.0) / (rows * len(streams)), rows


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
    """PlanEstimate of a prepared job; runs its first block once on a few rows."""
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
