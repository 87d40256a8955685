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
ASYMMETRIC_STRENGTH = 0.5
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
    """Sums X^T X (and D^T X for asymmetric calibration) in FP32 over batches.

    `add` takes X [tokens, in] and D = X_full_precision - X of the same tokens (or None).
    """

    columns: int
    asymmetric: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0

    def __post_init__(self) -> None:
        """Allocate the FP32 [in, in] sums."""
        self.gram = torch.zeros(self.columns, self.columns, device=self.device)
        self.cross = torch.zeros_like(self.gram) if self.asymmetric else None

    def add(self, inputs: Tensor, difference: Tensor | None = None, token_weights: Tensor | None = None) -> None:
        """Add one batch: inputs FP32 [tokens, in]; `token_weights` FP32 [tokens] scales each token's contribution."""
        if token_weights is not None:
            root = token_weights.sqrt().unsqueeze(1)
            inputs = inputs * root
            difference = None if difference is None else difference * root
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


def _target(weight: Tensor, cross: Tensor, order: Tensor, inverse: Tensor, strength: float) -> Tensor:
    """Reordered W + strength * W C H^-1, all [in, out]: H^-1 C^T W^T with H^-1 = Linv^T Linv."""
    shift = (cross.mT @ weight)[order]
    return weight[order].add_(inverse.mT @ (inverse @ shift), alpha=strength)


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


def _group_index(columns: int, config: GPTQConfig, order: Tensor) -> Tensor:
    """g_idx int64 [in]: consecutive groups, or groups along the solving order for desc_act."""
    size = columns if config.group_size == -1 else config.group_size
    index = torch.arange(columns, device=order.device) // size
    if config.desc_act:
        along = torch.empty_like(index)
        along[order.flip(0)] = index
        return along
    return index


def _grid_for(weight: Tensor, importance: Tensor, config: GPTQConfig, index: Tensor) -> Grid:
    """The grid of `weight` [in, out] in its column order (gathered by group first for desc_act)."""
    gathered = torch.argsort(index, stable=True)
    weights = importance[gathered] if config.scales == "search" else None
    return find_grid(weight[gathered], weights, config.bits, config.group_size, config.sym)


def quantize_weight(weight: Tensor, hessian: HessianAccumulator, config: GPTQConfig, *, name: str) -> tuple[QuantizedWeight, SolveStats]:
    """Quantize one weight, or several stacked along rows that share their input.

    Args:
        weight: [out, in], any float dtype.
        hessian: of the inputs; its `gram` is normalized in place and must not be used again for another input.
        config: settings.
        name: for errors.

    Errors: InputError when there were no tokens, an input was not finite, or no damping helps.
    """
    if hessian.tokens == 0:
        raise InputError(f"no calibration token reached {name}", next_step="use more calibration text")
    gram = hessian.gram
    if not bool(torch.isfinite(gram).all()):
        raise InputError(f"the inputs of {name} are not finite", "an activation overflowed or the checkpoint is damaged", "check it: qwen-quant inspect")
    gram.div_(hessian.tokens)
    original = weight.to(gram.device, torch.float32).mT.contiguous()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = gram.diagonal().mean().clamp_min(1e-8)
    order = _solving_order(gram.diagonal(), config)
    index = _group_index(gram.shape[0], config, order)
    rounding_grid = find_grid(original, None, config.bits, config.group_size, config.sym)
    plain_index = _group_index(gram.shape[0], GPTQConfig(group_size=config.group_size), order)
    rounded = _rounded(original, rounding_grid, plain_index)
    if config.rounding_only:
        grid, codes, damp, index = rounding_grid, rounded, 0.0, plain_index
    else:
        codes, grid, damp = _solved(original, hessian, config, (order, index), name)
    scales, zeros = grid.scales[index], grid.zeros[index]
    stats = SolveStats(
        _row_losses(dequantize(codes, scales, zeros) - original, gram),
        _row_losses(dequantize(rounded, rounding_grid.scales[plain_index], rounding_grid.zeros[plain_index]) - original, gram),
        _row_losses(original, gram),
        damp,
        int(dead.sum()),
    )
    return _pivot(codes, grid, index), stats


def _rounded(weight: Tensor, grid: Grid, index: Tensor) -> Tensor:
    """Codes [in, out] of plain rounding."""
    return round_codes(weight, grid.scales[index], grid.zeros[index], grid.max_code)


def _solved(
    original: Tensor, hessian: HessianAccumulator, config: GPTQConfig, layout: tuple[Tensor, Tensor], name: str
) -> tuple[Tensor, Grid, float]:
    """Codes [in, out] in column order, their grid, and the damping used; `layout` is (reversed order, g_idx)."""
    order, index = layout
    inverse, damp = _factored(hessian.gram, order, config.damp_percent, name)
    if hessian.cross is not None:
        hessian.cross.div_(hessian.tokens)
        target = _target(original, hessian.cross, order, inverse, ASYMMETRIC_STRENGTH)
    else:
        target = original[order]
    importance = torch.empty_like(target[:, 0])
    importance[order] = _importance(hessian.gram.diagonal()[order], inverse)
    in_columns = torch.empty_like(target)
    in_columns[order] = target
    grid = _grid_for(in_columns, importance, config, index)
    ordered = index[order]
    solved = _solve(target, inverse, grid.scales[ordered], grid.zeros[ordered], grid.max_code)
    codes = torch.empty_like(solved)
    codes[order] = solved
    return codes, grid, damp


def _importance(diagonal: Tensor, inverse: Tensor) -> Tensor:
    """What a squared error in each column costs in the scale search, [in] in reversed solving order."""
    return diagonal


def _pivot(codes: Tensor, grid: Grid, index: Tensor) -> QuantizedWeight:
    """[in, out] solver tensors as the [out, in] pivot on the CPU."""
    return QuantizedWeight(
        codes.mT.contiguous().to(torch.uint8).cpu(),
        grid.scales.mT.contiguous().half().cpu(),
        grid.zeros.mT.contiguous().to(torch.uint8).cpu(),
        index.to(torch.int32).cpu(),
    )
