"""Quantize one decoder block: its halves in order, dense or with routed experts."""

from __future__ import annotations

import torch

from qwen_quant.activations import ActivationStore
from qwen_quant.block_solver import BlockRun, HalfRun, SolvedLinear, Stream, add_lookup, solve_group
from qwen_quant.checkpoint.families import Half, SparseBlock
from qwen_quant.experts import SparseRun


@torch.no_grad()
def quantize_block(
    run: BlockRun, halves: tuple[Half, ...], streams: list[Stream], outputs: list[ActivationStore]
) -> list[SolvedLinear]:
    """Quantize every linear of a block and move the streams' hidden states past it.

    Args:
        run: settings and context.
        halves: of the block, in execution order.
        streams: [quantized] or [quantized, full precision]; the first one's block is changed in place.
        outputs: where the new hidden states go, one store per stream.

    Returns:
        The solved linears in order. Errors: InputError from the solver, with the linear named.
    """
    solved: list[SolvedLinear] = []
    for half in halves:
        walk: HalfRun | SparseRun
        if isinstance(half, SparseBlock):
            walk = SparseRun(run, half, streams)
            solved += walk.solve()
        else:
            if half.lookup is not None:
                add_lookup(run, half, streams, outputs)
            walk = HalfRun(run, half, streams)
            solved += solve_group(run, streams[0].block, half.inputs, walk.input_hessian())
            solved += solve_group(run, streams[0].block, (half.output,), walk.output_hessian())
        if not (run.last and half is halves[-1]):
            walk.advance(outputs)
    return solved
