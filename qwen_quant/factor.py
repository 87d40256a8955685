"""In-place blocked Cholesky factor and triangular inverse: two matrices in memory where LAPACK's wrappers need four.

For the damped Hessian A (columns already in REVERSED solving order) A = L L^T, and Linv = L^-1 is lower triangular with
A^-1 = Linv^T Linv.  Read from the last row to the first, row i of Linv is what GPTQ calls row n-1-i of the upper factor
of the inverse: one Cholesky and one triangular inverse, n^3/3 operations each, instead of Cholesky, inverse, Cholesky.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def cholesky_(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric FP32 [n, n] with its Cholesky factor; the upper triangle with zeros.

    Returns:
        False when the matrix is not positive definite (its content is then destroyed).
    """
    n = matrix.shape[0]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        factor, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(info) != 0 or not bool(torch.isfinite(factor.diagonal()).all()):
            return False
        matrix[start:stop, start:stop] = factor
        matrix[start:stop, stop:] = 0
        if stop == n:
            break
        panel = torch.linalg.solve_triangular(factor.mT, matrix[stop:, start:stop], upper=True, left=False)
        matrix[stop:, start:stop] = panel
        for row in range(stop, n, 4 * BLOCK):  # lower part of the trailing update only
            end = min(row + 4 * BLOCK, n)
            matrix[row:end, stop:end].addmm_(panel[row - stop : end - stop], panel[: end - stop].mT, alpha=-1)
    return True


def lower_inverse_(lower: Tensor) -> None:
    """Overwrite a lower triangular FP32 [n, n] with its inverse, last block column first."""
    n = lower.shape[0]
    starts = list(range(0, n, BLOCK))
    for start in reversed(starts):
        stop = min(start + BLOCK, n)
        eye = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        diagonal = torch.linalg.solve_triangular(lower[start:stop, start:stop], eye, upper=False)
        if stop < n:
            right = lower[stop:, start:stop] @ diagonal
            for row in range(stop, n, 4 * BLOCK):
                end = min(row + 4 * BLOCK, n)
                lower[row:end, start:stop] = lower[row:end, stop:end] @ right[: end - stop]
            lower[stop:, start:stop].neg_()
        lower[start:stop, start:stop] = diagonal
