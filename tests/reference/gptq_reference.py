"""GPTQ as the formula reads: one column at a time, the remaining Hessian inverted anew each time, FP64, no blocks."""

from __future__ import annotations

import numpy as np


def reference_codes(weight, hessian, scales, zeros, g_idx, order, max_code):
    """Codes [out, in] for fixed scales/zeros [out, groups]; columns are solved in `order`.

    After a column is rounded, the optimal change of the columns still free is -err * Hinv[j, rest] / Hinv[j, j] with
    Hinv the inverse of the Hessian restricted to that column and those still free.
    """
    w = weight.astype(np.float64).copy()
    codes = np.zeros(w.shape, dtype=np.int64)
    free = list(order)
    while free:
        column = free[0]
        inverse = np.linalg.inv(hessian[np.ix_(free, free)].astype(np.float64))
        scale, zero = scales[:, g_idx[column]].astype(np.float64), zeros[:, g_idx[column]].astype(np.float64)
        code = np.clip(np.round(w[:, column] / scale) + zero, 0, max_code)
        codes[:, column] = code
        error = (w[:, column] - (code - zero) * scale) / inverse[0, 0]
        w[:, free] -= np.outer(error, inverse[0])
        free = free[1:]
    return codes


def weighted_loss(change, hessian):
    """tr(dW H dW^T) in FP64."""
    change = change.astype(np.float64)
    return float(np.einsum("oi,ij,oj->", change, hessian.astype(np.float64), change))
