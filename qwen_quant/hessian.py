"""Sums over the calibration set that the solver works from, in FP32 whatever the activations come in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HessianAccumulator:
    """Sums over batches, in FP32, of X^T X and, for asymmetric calibration, of D^T X and R^T X (see `add`).

    Args:
        columns: in_features.
        paired: "none" (one stream), "all" (every token comes with D and R) or "some" (a part of them does; the Gram
            matrix of that part is then kept as well, because D^T X must be divided by the X^T X of the same tokens).
        device: where the sums live.
    """

    def __init__(self, columns: int, paired: str = "none", device: torch.device | None = None) -> None:
        self.columns, self.device = columns, device or torch.device("cpu")
        self.tokens, self.paired_tokens = 0, 0
        self.gram = torch.zeros(columns, columns, device=self.device)
        self.cross = None if paired == "none" else torch.zeros_like(self.gram)
        self.paired_gram = torch.zeros_like(self.gram) if paired == "some" else None
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
            residual: R, what the residual stream lacks where the layer's output is added, FP32 [tokens, out].
            token_weights: FP32 [tokens], how much each token counts (None: all the same).
        """
        if token_weights is not None:
            root = token_weights.sqrt().unsqueeze(1)
            inputs = inputs * root
            difference = None if difference is None else difference * root
            residual = None if residual is None else residual * root
        product = _gram(inputs)
        self.gram += product
        self.tokens += inputs.shape[0]
        if self.cross is None or difference is None:
            return
        self.cross.addmm_(difference.mT, inputs)
        self.paired_tokens += inputs.shape[0]
        if self.paired_gram is not None:
            self.paired_gram += product
        if residual is not None:
            if self.residual is None:
                self.residual = torch.zeros(residual.shape[1], self.columns, device=self.device)
            self.residual.addmm_(residual.mT, inputs)

    def corner(self, columns: int, rows: int) -> HessianAccumulator:
        """A copy for the first `columns` inputs and first `rows` outputs: a smaller problem of the same kind."""
        part = HessianAccumulator(columns, device=self.device)
        part.tokens, part.paired_tokens = self.tokens, self.paired_tokens
        part.gram = self.gram[:columns, :columns].clone()
        part.cross = None if self.cross is None else self.cross[:columns, :columns].clone()
        part.paired_gram = None if self.paired_gram is None else self.paired_gram[:columns, :columns].clone()
        part.residual = None if self.residual is None else self.residual[:rows, :columns].clone()
        return part


def _gram(inputs: Tensor) -> Tensor:
    """X^T X of FP32 [tokens, in]."""
    if inputs.device.type != "cpu":
        return inputs.mT @ inputs
    rows = inputs.contiguous().numpy()
    return torch.from_numpy(np.dot(rows.T, rows))  # numpy recognizes A^T A and calls BLAS syrk: half the work
