"""GPTQ: choose codes so that the layer's OUTPUT changes least, given the inputs it really sees.

With X the inputs [tokens, in] and H = X^T X / tokens, the loss of a changed weight is tr(dW H dW^T).  Columns are
rounded one after the other and each error is pushed onto the columns still to come (Frantar et al., 2023).  What is done
beyond the paper, each a measured gain (README, benchmarks/):

- columns are solved by falling diag(H) while groups stay blocks of CONSECUTIVE columns, so no permutation is stored;
- scales come from a search weighted by how much an error in a column costs (`grid.find_grid`);
- asymmetric calibration: the inputs X come from the blocks quantized so far, but the output aimed at is that of the
  full-precision inputs X + D.  The least-squares target is W + W C H^-1 with C = D^T X / tokens, of which a fraction
  (`ASYMMETRIC_STRENGTH`) is taken because C carries sampling noise (idea: GPTAQ, ICML 2025; solved here in closed form).

Weights are handled transposed, [in, out], so that one input column is one contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.factor import cholesky_, lower_inverse_
from qwen_quant.grid import Grid, dequantize, find_grid, round_codes
from qwen_quant.recipe import GPTQConfig

SOLVE_BLOCK = 128
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
        row_loss, row_rounding_loss, row_energy: FP64 [out]: dW H dW^T of the artifact and of plain rounding, and W H W^T.
        damp_percent: damping that succeeded.
        dead_columns: columns whose input was always zero.
    """

    row_loss: Tensor
    row_rounding_loss: Tensor
    row_energy: Tensor
    damp_percent: float
    dead_columns: int


@dataclass
class HessianAccumulator:
    """Sums over batches, in FP32, of X^T X and, for asymmetric calibration, of D^T X and R^T X (see `add`)."""

    columns: int
    asymmetric: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0

    def __post_init__(self) -> None:
        """Allocate the FP32 [in, in] sums."""
        self.gram = torch.zeros(self.columns, self.columns, device=self.device)
        self.cross = torch.zeros_like(self.gram) if self.asymmetric else None
        self.residual: Tensor | None = None

    def add(
        self,
        inputs: Tensor,
        difference: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
    ) -> None:
        """Add one batch of tokens.

        Args:
            inputs: X, FP32 [tokens, in].
            difference: D = X_full_precision - X, FP32 [tokens, in].
            residual: what the residual stream lacks where the layer's output is added, FP32 [tokens, out].
            token_weights: FP32 [tokens], how much each token counts (None: all the same).
        """
        if token_weights is not None:
            root = token_weights.sqrt().unsqueeze(1)
            inputs = inputs * root
            difference = None if difference is None else difference * root
            residual = None if residual is None else residual * root
        if residual is not None:
            if self.residual is None:
                self.residual = torch.zeros(residual.shape[1], self.columns, device=self.device)
            self.residual.addmm_(residual.mT, inputs)
        self.tokens += inputs.shape[0]
        if inputs.device.type == "cpu":
            rows = inputs.contiguous().numpy()
            self.gram += torch.from_numpy(np.dot(rows.T, rows))  # numpy sees A^T A and calls BLAS syrk: half the work
        else:
            self.gram.addmm_(inputs.mT, inputs)
        if self.cross is not None and difference is not None:
            self.cross.addmm_(difference.mT, inputs)


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
class _Problem:
    """Everything about one solve that does not depend on the row: `order` is reversed, `inverse` is in that order."""

    gram: Tensor
    cross: Tensor | None
    residual: Tensor | None
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
    inverse, damp = (None, 0.0) if config.rounding_only else _factored(gram, order, config.damp_percent, name)
    index = _group_index(gram.shape[0], config, order)
    problem = _Problem(gram, hessian.cross, hessian.residual, order, inverse, index, config)
    step = max(1, ROW_CHUNK_VALUES // weight.shape[1])
    parts = [_quantize_rows(weight, slice(row, row + step), problem) for row in range(0, weight.shape[0], step)]
    losses = torch.cat([losses for _, losses in parts], dim=1)
    whole = QuantizedWeight(
        torch.cat([part.codes for part, _ in parts]),
        torch.cat([part.scales for part, _ in parts]),
        torch.cat([part.zeros for part, _ in parts]),
        index.to(torch.int32).cpu(),
    )
    return whole, SolveStats(losses[0], losses[1], losses[2], damp, dead)


def _normalized(hessian: HessianAccumulator, name: str) -> tuple[Tensor, int]:
    """The mean Gram matrix with dead columns made harmless, and how many there were."""
    if hessian.tokens == 0:
        raise InputError(f"no calibration token reached {name}", next_step="use more calibration text")
    for total in (hessian.gram, hessian.cross, hessian.residual):
        if total is not None:
            total.div_(hessian.tokens)
            if not bool(torch.isfinite(total).all()):
                raise InputError(
                    f"the inputs of {name} are not finite",
                    "an activation overflowed or the checkpoint is damaged",
                    "look at its tensors: qwen-quant inspect",
                )
    diagonal = hessian.gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean().clamp_min(1e-8)  # such a column is independent of the others: it is just rounded
    return hessian.gram, int(dead.sum())


def _quantize_rows(weight: Tensor, rows: slice, problem: _Problem) -> tuple[QuantizedWeight, Tensor]:
    """Some rows of the weight: their codes and FP64 [3, rows] losses (artifact, plain rounding, energy)."""
    config, index = problem.config, problem.index
    original = weight[rows].to(problem.gram.device, torch.float32).mT.contiguous()
    target = original if problem.inverse is None else _target(original, rows, problem)
    grid = find_grid(original, None, config.bits, config.group_size, config.sym)
    plain = _consecutive_groups(original.shape[0], config.group_size, original.device)
    codes = round_codes(original, grid.scales[plain], grid.zeros[plain], grid.max_code)
    rounded = dequantize(codes, grid.scales[plain], grid.zeros[plain])
    rounding_loss = _row_losses(rounded.sub_(target), problem.gram)
    if problem.inverse is not None:
        codes, grid = _solved(target, problem)
    change = dequantize(codes, grid.scales[index], grid.zeros[index]).sub_(target)
    losses = torch.stack([_row_losses(change, problem.gram), rounding_loss, _row_losses(original, problem.gram)])
    return _pivot(codes, grid, index), losses.cpu()


def _target(original: Tensor, rows: slice, problem: _Problem) -> Tensor:
    """What the codes should reproduce, [in, out] in column order.

    W + strength * (W C + R) H^-1, with H^-1 = Linv^T Linv and R the part of the output's residual stream to make good.
    """
    if problem.cross is None or problem.inverse is None:
        return original
    shift = (problem.cross.mT @ original).mul_(ASYMMETRIC_STRENGTH)
    if problem.residual is not None:
        shift.add_(problem.residual[rows].mT, alpha=RESIDUAL_STRENGTH)
    moved = problem.inverse.mT @ (problem.inverse @ shift[problem.order])
    target = original.clone()
    target[problem.order] += moved
    return target


def _solved(target: Tensor, problem: _Problem) -> tuple[Tensor, Grid]:
    """Codes [in, out] in column order and their grid."""
    assert problem.inverse is not None
    config, order = problem.config, problem.order
    gathered = torch.argsort(problem.index, stable=True)
    importance = problem.gram.diagonal()[gathered] if config.scales == "search" else None
    grid = find_grid(target[gathered], importance, config.bits, config.group_size, config.sym)
    ordered = problem.index[order]
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
