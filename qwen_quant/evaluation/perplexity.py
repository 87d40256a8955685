"""Perplexity, and how a text becomes windows.

The protocol, which every figure of this package follows: the text is tokenized whole in one piece without special
tokens.  A window of `window_tokens` tokens starts every `stride_tokens` tokens; what does not fill a last window is
dropped.  A window starts with an empty context (no BOS).  Every token is scored in the first window that holds it, the
first token of a context never.  Disjoint windows (stride = window) so score window_tokens - 1 tokens each.

    perplexity = exp(mean over scored tokens of -ln p(token | earlier tokens of its window))
    bits per byte = sum of -log2 p over scored tokens / UTF-8 bytes of these tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.results import PerplexityPair


@dataclass(frozen=True)
class WindowSet:
    """Windows of one text: `ids` int64 [windows, tokens]; each starts `stride` tokens after the one before."""

    ids: Tensor
    stride: int

    @property
    def window_tokens(self) -> int:
        """Length of one window."""
        return int(self.ids.shape[1])

    def first_fresh(self, window: int) -> int:
        """Position in window number `window` of the first token that no earlier window holds."""
        return 0 if window == 0 else self.window_tokens - self.stride

    def scored_ids(self, window: int) -> list[int]:
        """The tokens whose loss counts in this window."""
        return [int(i) for i in self.ids[window, max(self.first_fresh(window), 1) :]]


def windows_of(ids: list[int], window_tokens: int, max_windows: int | None, stride: int = 0) -> WindowSet:
    """The first `max_windows` (None: all) whole windows, one every `stride` tokens (0: disjoint).

    Errors: InputError when the text does not fill one window.
    """
    if len(ids) < window_tokens:
        raise InputError(
            f"the evaluation text has {len(ids)} tokens, less than one window of {window_tokens}",
            next_step="give a longer text or a smaller --window",
        )
    windows = torch.tensor(ids, dtype=torch.int64).unfold(0, window_tokens, stride or window_tokens)
    return WindowSet(windows[:max_windows].contiguous(), stride or window_tokens)


def token_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target: log_probs [n, vocabulary], targets int64 [n] -> FP64 [n]."""
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double().neg()


def perplexity_pair(baseline_losses: Tensor, quantized_losses: Tensor) -> PerplexityPair:
    """Perplexities of FP64 per-token losses [n] of the same tokens under both models."""
    baseline, quantized = float(baseline_losses.mean()), float(quantized_losses.mean())
    return PerplexityPair(_exp(baseline), _exp(quantized), _exp(quantized - baseline), int(baseline_losses.numel()))


def _exp(value: float) -> float:
    """exp, infinite where a float cannot hold it."""
    return math.exp(value) if value < 709 else math.inf
