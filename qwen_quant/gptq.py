"""GPTQ: choose codes so that the layer's OUTPUT changes least, given the inputs it really sees.

With X the inputs [tokens, in] and H = X^T X / tokens, the loss of a changed weight is tr(dW H dW^T).  Columns are
rounded one after the other and each error is pushed onto the columns still to come (Frantar et al., 2023).  What is
done beyond the paper, each a measured gain (README, benchmarks/):

- columns are solved by falling diag(H) while groups stay blocks of CONSECUTIVE columns, so no permutation is stored;
- scales come from a search weighted by how much an error in a column costs (`grid.find_grid`);
- asymmetric calibration: the inputs X come from the blocks quantized so far, but the output aimed at is that of the
  full-precision inputs X + D, plus, for a layer whose output joins the residual stream, what that stream lacks, R.
  The least-squares target is W + (W C + R) H^-1 with C = D^T X / tokens (R likewise R^T X / tokens), of which a part is
  taken because C and R carry sampling noise (idea: GPTAQ, ICML 2025; here in closed form and with the residual).

Weights are handled transposed, [in, out], so that one input column is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.factor import cholesky_, lower_inverse_
from qwen_quant.grid import Grid, dequantize, find_grid, round_codes
from qwen_quant.hessian import HessianAccumulator
from qwen_quant.recipe import GPTQConfig

SOLVE_BLOCK = 128
ONE_THREAD_VALUES = 4 << 20
ROW_CHUNK_VALUES = 12 << 20
ASYMMETRIC_STRENGTH = 0.5
RESIDUAL_STRENGTH = 0.5
DAMP_ESCALATION = 10.0
MAX_DAMP_PERCENT = 1.0


@dataclass(frozen=True)
class QuantizedWeight:
    """The pivot that every format starts from.

    Attributes:
        codes: uint8 [out, in].
        scales: FP16 [out, groups].
        zeros: uint8 [out, groups].
        g_idx: int32 [in], group of each column.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def dequantized(self) -> Tensor:
        """FP32 [out, in]."""
        index = self.g_idx.long()
        return dequantize(self.codes.float(), self.scales.float()[:, index], self.zeros.float()[:, index])


@dataclass(frozen=True)
class SolveStats:
    """Per-row losses of one solve, so that linears solved together can be told apart again.

    Attributes:
        row_loss, row_rounding_loss: FP64 [out]: dW H dW^T of the artifact and of plain rounding, where dW is the
            difference from what full precision asks for (the weight itself without asymmetric calibration).
        row_energy: FP64 [out]: W H W^T.
        damp_percent: damping that succeeded.
        dead_columns: columns whose input was always zero.
    """

    row_loss: Tensor
    row_rounding_loss: Tensor
    row_energy: Tensor
    damp_percent: float
    dead_columns: int


def _solving_order(diagonal: Tensor, config: GPTQConfig) -> Tensor:
    """Columns in REVERSED solving order (last solved first), int64 [in]."""
    if config.desc_act or config.order == "activation":
        return torch.argsort(diagonal, stable=True)
    return torch.arange(diagonal.shape[0] - 1, -1, -1, device=diagonal.device)


def _factored(gram: Tensor, order: Tensor, damp_percent: float, name: str) -> tuple[Tensor, float]:
    """Linv [in, in] of `factor.py` in reversed solving order, and the damping that it took."""
    mean = float(gram.diagonal().mean())
    damp = damp_percent
    while True:
        matrix = gram[order[:, None], order[None, :]]
        matrix.diagonal().add_(damp * mean)
        if cholesky_(matrix):
            lower_inverse_(matrix)
            return matrix, damp
        if damp >= MAX_DAMP_PERCENT:
            raise InputError(
                f"the Hessian of {name} is not positive definite even with damping {damp:g}",
                "its inputs are degenerate or not finite",
                "use more or other calibration text",
            )
        damp = min(damp * DAMP_ESCALATION, MAX_DAMP_PERCENT)


@contextmanager
def _few_threads(values: Tensor) -> Iterator[None]:
    """One thread for thousands of small operations: there, thread barriers cost more than more cores give."""
    threads = torch.get_num_threads()
    if values.device.type == "cpu" and values.numel() <= ONE_THREAD_VALUES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _solve(target: Tensor, inverse: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """The column loop. `target` [in, out] is consumed; scales and zeros are [in, out] views per column.

    Rows run from the last (solved first) to the first. Returns codes FP32 [in, out] in the same order.
    """
    rows = target.shape[0]
    codes = torch.empty_like(target)
    for stop in range(rows, 0, -SOLVE_BLOCK):
        start = max(stop - SOLVE_BLOCK, 0)
        block, local = target[start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start - 1, -1, -1):
            value, scale, zero = block[i], scales[start + i], zeros[start + i]
            code = round_codes(value, scale, zero, max_code)
            codes[start + i] = code
            error = (value - dequantize(code, scale, zero)) / local[i, i]
            errors[i] = error
            if i:
                block[:i].addr_(local[i, :i], error, alpha=-1)
        if start:
            target[:start].addmm_(inverse[start:stop, :start].mT, errors, alpha=-1)
    return codes


def _row_losses(change: Tensor, gram: Tensor) -> Tensor:
    """diag(dW H dW^T) for a change [in, out], FP64 [out]."""
    return ((gram @ change) * change).sum(0, dtype=torch.float64)


def _consecutive_groups(columns: int, group_size: int, device: torch.device) -> Tensor:
    """g_idx int64 [in] of groups of consecutive columns."""
    return torch.arange(columns, device=device) // (columns if group_size == -1 else group_size)


def _group_index(columns: int, config: GPTQConfig, order: Tensor) -> Tensor:
    """g_idx int64 [in]: consecutive groups, or groups along the solving order for desc_act."""
    index = _consecutive_groups(columns, config.group_size, order.device)
    if config.desc_act and not config.rounding_only:
        along = torch.empty_like(index)
        along[order.flip(0)] = index
        return along
    return index


@dataclass(frozen=True)
class _Pairing:
    """The regression of what full precision has more on the inputs: C, R and the inverse factor of the same tokens."""

    cross: Tensor
    residual: Tensor | None
    order: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class _Problem:
    """Everything about one solve that does not depend on the row: `order` is reversed, `inverse` is in that order."""

    gram: Tensor
    pairing: _Pairing | None
    order: Tensor
    inverse: Tensor | None
    index: Tensor
    config: GPTQConfig


def quantize_weight(
    weight: Tensor, hessian: HessianAccumulator, config: GPTQConfig, *, name: str
) -> tuple[QuantizedWeight, SolveStats]:
    """Quantize one weight, or several stacked along rows that share their input.

    Args:
        weight: [out, in], any float dtype.
        hessian: of the inputs; its sums are normalized in place, so it serves one solve.
        config: settings.
        name: for errors.

    Errors: InputError when there were no tokens, an input was not finite, or no damping helps.
    """
    gram, dead = _normalized(hessian, name)
    order = _solving_order(gram.diagonal(), config)
    paired = _paired_inverse(hessian, config, name)
    inverse, damp = (None, 0.0) if config.rounding_only else _factored(gram, order, config.damp_percent, name)
    pairing = None
    if inverse is not None and hessian.cross is not None and hessian.paired_tokens:
        pairing = _Pairing(hessian.cross, hessian.residual, *(paired or (order, inverse)))
    index = _group_index(gram.shape[0], config, order)
    problem = _Problem(gram, pairing, order, inverse, index, config)
    step = max(1, ROW_CHUNK_VALUES // weight.shape[1])
    parts = [_quantize_rows(weight, slice(row, row + step), problem) for row in range(0, weight.shape[0], step)]
    losses = torch.cat([losses for _, losses in parts], dim=1)
    whole = _joined([part for part, _ in parts])
    return whole, SolveStats(losses[0], losses[1], losses[2], damp, dead)


def _normalized(hessian: HessianAccumulator, name: str) -> tuple[Tensor, int]:
    """The mean Gram matrix with dead columns made harmless, and how many there were."""
    if hessian.tokens == 0:
        raise InputError(f"no calibration token reached {name}", next_step="use more calibration text")
    pairs = max(hessian.paired_tokens, 1)
    sums = (
        (hessian.gram, hessian.tokens),
        (hessian.cross, pairs),
        (hessian.paired_gram, pairs),
        (hessian.residual, pairs),
    )
    for total, count in sums:
        if total is not None:
            total.div_(count)
            if not bool(torch.isfinite(total).all()):
                raise InputError(
                    f"the inputs of {name} are not finite",
                    "an activation overflowed or the checkpoint is damaged",
                    "look at its tensors: qwen-quant inspect",
                )
    dead = _revive(hessian.gram)
    return hessian.gram, dead


def _revive(gram: Tensor) -> int:
    """Give columns whose input was always zero a diagonal, so that they are just rounded; returns how many."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean().clamp_min(1e-8)
    return int(dead.sum())


def _paired_inverse(hessian: HessianAccumulator, config: GPTQConfig, name: str) -> tuple[Tensor, Tensor] | None:
    """(order, inverse factor) of the paired tokens' own Gram matrix, where only some tokens are paired."""
    if hessian.paired_gram is None or not hessian.paired_tokens or config.rounding_only:
        return None
    gram, hessian.paired_gram = hessian.paired_gram, None
    _revive(gram)
    order = torch.arange(gram.shape[0], device=gram.device)
    return order, _factored(gram, order, config.damp_percent, name)[0]


def _quantize_rows(weight: Tensor, rows: slice, problem: _Problem) -> tuple[QuantizedWeight, Tensor]:
    """Some rows of the weight: their codes and FP64 [3, rows] losses (artifact, plain rounding, energy)."""
    config, index = problem.config, problem.index
    original = weight[rows].to(problem.gram.device, torch.float32).mT.contiguous()
    target = _target(original, rows, problem)
    codes, grid, plain = _rounded(original, config)
    rounded = dequantize(codes, grid.scales[plain], grid.zeros[plain])
    rounding_loss = _row_losses(rounded.sub_(target), problem.gram)
    if problem.inverse is not None:
        codes, grid = _solved(target, problem)
    change = dequantize(codes, grid.scales[index], grid.zeros[index]).sub_(target)
    losses = torch.stack([_row_losses(change, problem.gram), rounding_loss, _row_losses(original, problem.gram)])
    return _pivot(codes, grid, index), losses.cpu()


def _rounded(original: Tensor, config: GPTQConfig) -> tuple[Tensor, Grid, Tensor]:
    """Plain rounding of FP32 [in, out]: codes, their grid, g_idx int64 [in]."""
    grid = find_grid(original, None, config.bits, config.group_size, config.sym)
    index = _consecutive_groups(original.shape[0], config.group_size, original.device)
    return round_codes(original, grid.scales[index], grid.zeros[index], grid.max_code), grid, index


def round_weight(weight: Tensor, config: GPTQConfig) -> QuantizedWeight:
    """Plain rounding of a weight [out, in], in chunks of rows, without looking at any input."""
    step = max(1, ROW_CHUNK_VALUES // weight.shape[1])
    parts = []
    for row in range(0, weight.shape[0], step):
        parts.append(_pivot(*_rounded(weight[row : row + step].float().mT.contiguous(), config)))
    return _joined(parts)


def _target(original: Tensor, rows: slice, problem: _Problem) -> Tensor:
    """What the codes should reproduce, [in, out] in column order.

    W + (a W C + b R) H^-1 with H^-1 = Linv^T Linv; a and b are ASYMMETRIC_STRENGTH and RESIDUAL_STRENGTH.
    """
    pairing = problem.pairing
    if pairing is None:
        return original
    shift = (pairing.cross.mT @ original).mul_(ASYMMETRIC_STRENGTH)
    if pairing.residual is not None:
        shift.add_(pairing.residual[rows].mT, alpha=RESIDUAL_STRENGTH)
    moved = pairing.inverse.mT @ (pairing.inverse @ shift[pairing.order])
    target = original.clone()
    target[pairing.order] += moved
    return target


def _solved(target: Tensor, problem: _Problem) -> tuple[Tensor, Grid]:
    """Codes [in, out] in column order and their grid."""
    assert problem.inverse is not None
    config, order = problem.config, problem.order
    gathered = torch.argsort(problem.index, stable=True)
    importance = problem.gram.diagonal()[gathered] if config.scales == "search" else None
    grid = find_grid(target[gathered], importance, config.bits, config.group_size, config.sym)
    ordered = problem.index[order]
    with _few_threads(target):
        solved = _solve(target[order], problem.inverse, grid.scales[ordered], grid.zeros[ordered], grid.max_code)
    codes = torch.empty_like(solved)
    codes[order] = solved
    return codes, grid


def _pivot(codes: Tensor, grid: Grid, index: Tensor) -> QuantizedWeight:
    """[in, out] solver tensors as the [out, in] pivot on the CPU."""
    return QuantizedWeight(
        codes.mT.contiguous().to(torch.uint8).cpu(),
        grid.scales.mT.contiguous().half().cpu(),
        grid.zeros.mT.contiguous().to(torch.uint8).cpu(),
        index.to(torch.int32).cpu(),
    )


def _joined(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Chunks of rows of one weight."""
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        parts[0].g_idx,
    )
