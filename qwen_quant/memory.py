"""How much memory and disk a run needs, from shapes alone.

Peak = interpreter + one block's 16-bit weights and half as much again for codes + the square matrices of the widest
linear + temporaries of the solver and of one batch + the hidden states that are held in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_quant.activations import BYTES_PER_VALUE, RAM_LIMIT_BYTES
from qwen_quant.block_solver import BATCH_BYTES, CACHE_BYTES
from qwen_quant.checkpoint.families import ModelSpec, SubBlock
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.environment import memory_bytes, peak_rss_bytes
from qwen_quant.errors import InputError
from qwen_quant.experts import SPARSE_BATCH_BYTES
from qwen_quant.gptq import ROW_CHUNK_VALUES
from qwen_quant.packing import packed_specs
from qwen_quant.recipe import GPTQConfig

SOLVER_TEMPORARIES = 12
BATCH_TEMPORARIES = 6
FULL_PRECISION_SHARE = 0.25
FULL_PRECISION_TOKENS = 16384


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes of a run.

    Attributes:
        interpreter_bytes: resident set before any weight is read.
        stored_block_bytes: weights of the largest block as stored.
        block_bytes: the same and its codes.
        square_bytes: Gram, cross and factor matrices of the widest linear, FP32.
        working_bytes: temporaries of the solver and of one batch, and the kept inputs of a half's last linear.
        hidden_state_bytes: hidden states of all streams, wherever they are held.
        hidden_in_memory: whether they are held in memory (else in a file).
        peak_memory_bytes: predicted peak resident set (host); on a GPU run the same parts lie in its memory instead.
        output_bytes: tensors of the artifact.
        disk_bytes: output plus two sets of hidden states for resuming.
    """

    interpreter_bytes: int
    stored_block_bytes: int
    block_bytes: int
    square_bytes: int
    working_bytes: int
    hidden_state_bytes: int
    hidden_in_memory: bool
    peak_memory_bytes: int
    output_bytes: int
    disk_bytes: int


def stream_rows(config: GPTQConfig, rows: int, tokens: int) -> tuple[int, ...]:
    """Calibration rows of each stream.

    The full-precision stream of asymmetric calibration only feeds a regression, which needs fewer tokens than the
    Hessian: it takes the first quarter of the rows, and at least 16384 tokens (measured: README).
    """
    if config.rounding_only or not config.asymmetric_calibration:
        return (rows,)
    return (rows, min(rows, max(math.ceil(rows * FULL_PRECISION_SHARE), math.ceil(FULL_PRECISION_TOKENS / tokens))))


def _largest_block(spec: ModelSpec, reader: CheckpointReader) -> int:
    sizes = dict.fromkeys(range(spec.num_layers), 0)
    start = spec.family.layers_prefix + "."
    for name in reader.names:
        if name.startswith(start) and not spec.is_table(name):
            layer = int(name[len(start) :].split(".", 1)[0])
            sizes[layer] = sizes.get(layer, 0) + reader.info(name).nbytes
    return max(sizes.values(), default=0)


def one_of_each_linear(spec: ModelSpec) -> list[str]:
    """Full names of linears of every shape there is: one block of each kind, the first of its experts."""
    names = []
    for halves, layers in spec.kinds().items():
        for half in halves:
            parts = (half,) if isinstance(half, SubBlock) else (half.shared, half.expert(0))
            names += [spec.layer_prefix(layers[0]) + name for part in parts if part for name in part.linears()]
    return names


def _sparse_batch(spec: ModelSpec, tokens: int) -> int:
    """Temporaries of one batch through all experts of a block, and of an expert's dense weights (0 where none are)."""
    if not spec.expert_count:
        return 0
    return max(SPARSE_BATCH_BYTES, 4 * tokens * spec.stream_width) * BATCH_TEMPORARIES


def _output_bytes(spec: ModelSpec, reader: CheckpointReader, config: GPTQConfig) -> int:
    linears = {name + ".weight" for name in spec.linear_names()}
    total = 0
    for name in reader.names:
        info = reader.info(name)
        if name not in linears:
            total += info.nbytes
            continue
        for dtype, shape in packed_specs(info.shape[1], info.shape[0], config.bits, config.group_size).values():
            total += math.prod(shape) * dtype.itemsize
    return total


def footprint(
    spec: ModelSpec, reader: CheckpointReader, config: GPTQConfig, calibration_shape: tuple[int, int]
) -> Footprint:
    """Predict a run over calibration rows of `calibration_shape` [rows, tokens]."""
    rows, tokens = calibration_shape
    stream = stream_rows(config, rows, tokens)
    squares = 2 if len(stream) == 1 else 3 + (stream[1] < stream[0])
    shapes = [reader.info(name + ".weight").shape for name in one_of_each_linear(spec)]
    widest_in, widest = max(s[1] for s in shapes), max(max(s) for s in shapes)
    block = _largest_block(spec, reader)
    square = squares * widest_in**2 * 4
    stacked = max(s[0] * s[1] for s in shapes) * 2
    solver = min(ROW_CHUNK_VALUES, stacked) * 4 * SOLVER_TEMPORARIES + stacked * 3
    batch = max(min(BATCH_BYTES, 4 * rows * tokens * widest), 4 * tokens * widest) * BATCH_TEMPORARIES
    batch += len(stream) * stacked * 4  # the linears that share an input, held dense during a pass
    cache = sum(stream) * tokens * widest_in * BYTES_PER_VALUE
    working = max(solver, batch, _sparse_batch(spec, tokens)) + (cache if cache <= CACHE_BYTES else 0)
    hidden = sum(stream) * tokens * spec.stream_width * BYTES_PER_VALUE
    in_memory = hidden <= RAM_LIMIT_BYTES
    interpreter = peak_rss_bytes()
    peak = interpreter + block + block // 2 + square + working + (hidden if in_memory else 0)
    output = _output_bytes(spec, reader, config)
    return Footprint(
        interpreter, block, block + block // 2, square, working, hidden, in_memory, peak, output, output + 2 * hidden
    )


def check_fits(need: Footprint) -> None:
    """Refuse a run whose one block does not fit the memory that is free now (InputError saying what it needs)."""
    _, available = memory_bytes()
    more = need.peak_memory_bytes - need.interpreter_bytes
    if available and more > available:
        raise InputError(
            "not enough memory for one block",
            f"{more / 2**30:.2f} GiB needed ({need.block_bytes / 2**30:.2f} weights, "
            f"{need.square_bytes / 2**30:.2f} Hessian, {need.working_bytes / 2**30:.2f} working), "
            f"{available / 2**30:.2f} GiB free",
            "free memory, use a larger machine, or halve the Hessian's share with --no-asymmetric-calibration",
        )
