"""KL divergence of next-token distributions, per token, over the full vocabulary.

    KL(P || Q) = sum over tokens t of p_t (ln p_t - ln q_t)   in nats, P the baseline, Q the quantized model

Log-probabilities are FP32; the products are summed over the vocabulary in FP64.  Two equal rows of logits give exactly
0.  Rounding can leave a value of about -1e-7 where the two distributions are nearly equal; it is not hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_quant.results import Divergence


def token_divergence(baseline_log_probs: Tensor, quantized_log_probs: Tensor) -> Tensor:
    """KL(baseline || quantized) of each position: two FP32 [n, vocabulary] -> FP64 [n]; the second is overwritten."""
    gap = torch.sub(baseline_log_probs, quantized_log_probs, out=quantized_log_probs)
    probabilities = baseline_log_probs.exp()
    # A token that P excludes contributes nothing, even if both logs are -inf; one that only Q excludes: KL is infinite.
    gap.masked_fill_(probabilities == 0, 0.0)
    return probabilities.mul_(gap).sum(1, dtype=torch.float64)


def summarize(kl: Tensor, same_top1: Tensor) -> Divergence:
    """Mean, quantiles (linear interpolation) and agreement: `kl` FP64 [n], `same_top1` bool [n], n > 0."""
    # torch.quantile takes at most 16 million values; sorting once has no such limit.
    ordered = kl.sort().values
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_median=_quantile(ordered, 0.5),
        kl_p90=_quantile(ordered, 0.9),
        kl_p99=_quantile(ordered, 0.99),
        kl_max=float(ordered[-1]),
        top1_agreement=float(same_top1.double().mean()),
        tokens=int(kl.numel()),
    )


def _quantile(ordered: Tensor, fraction: float) -> float:
    position = fraction * (ordered.numel() - 1)
    low = int(position)
    high = min(low + 1, ordered.numel() - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))
