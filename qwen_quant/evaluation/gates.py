"""Limits that an artifact must keep to before it may be released."""

from __future__ import annotations

from qwen_quant.errors import GateError
from qwen_quant.results import ValidationResult


def check_gates(
    result: ValidationResult,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = None,
    min_top1: float | None = None,
) -> None:
    """Compare a result with its limits; None is no limit, and a value that is not a number fails.

    Args:
        max_kl: largest mean KL divergence, nats per token.
        max_perplexity_ratio: largest quantized / baseline perplexity.
        min_top1: least top-1 agreement, 0 to 1.

    Errors: GateError naming every failed gate with its value and bound.
    """
    kl, ratio, top1 = result.divergence.kl_mean, result.perplexity.ratio, result.divergence.top1_agreement
    failed = []
    if max_kl is not None and not kl <= max_kl:
        failed.append(f"KL divergence {kl:.4g} is above {max_kl:g}")
    if max_perplexity_ratio is not None and not ratio <= max_perplexity_ratio:
        failed.append(f"perplexity ratio {ratio:.4g} is above {max_perplexity_ratio:g}")
    if min_top1 is not None and not top1 >= min_top1:
        failed.append(f"top-1 agreement {top1:.4g} is below {min_top1:g}")
    if failed:
        raise GateError(
            f"{result.quantized} fails {len(failed)} gate(s)",
            "; ".join(failed),
            "do not release it: try more calibration tokens, a smaller --group-size or more --bits",
        )
