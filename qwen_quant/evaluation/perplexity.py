"""Perplexity over disjoint windows, and how a text becomes windows.

The protocol, which every figure of this package follows: the file is read as it is (no line is joined, stripped or
detokenized), tokenized whole in one piece without special tokens, and cut from its start into consecutive windows of
`window_tokens` tokens that do not overlap; what is left at the end is dropped.  A window starts with an empty context
(no BOS), so its first token is not scored: it scores window_tokens - 1 tokens.

    perplexity = exp(mean over scored tokens of -ln p(token | earlier tokens of its window))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.results import PerplexityPair


def windows_of(ids: list[int], window_tokens: int, max_windows: int | None) -> Tensor:
    """The first `max_windows` (None: all) whole windows, int64 [windows, window_tokens].

    Errors: InputError when the text does not fill one window.
    """
    count = len(ids) // window_tokens
    if not count:
        raise InputError(
            f"the evaluation text has {len(ids)} tokens, less than one window of {window_tokens}",
            next_step="give a longer text or a smaller --window",
        )
    if max_windows is not None:
        count = min(count, max_windows)
    return torch.tensor(ids[: count * window_tokens], dtype=torch.int64).view(count, window_tokens)


def token_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target: log_probs [n, vocabulary], targets int64 [n] -> FP64 [n]."""
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double().neg()


def perplexity_pair(baseline_losses: Tensor, quantized_losses: Tensor) -> PerplexityPair:
    """Perplexities of FP64 per-token losses [n] of the same tokens under both models."""
    baseline, quantized = float(baseline_losses.mean()), float(quantized_losses.mean())
    return PerplexityPair(
        math.exp(baseline), math.exp(quantized), math.exp(quantized - baseline), int(baseline_losses.numel())
    )
