"""Limits that an artifact must keep to before it may be released.

A gate compares the UNFAVOURABLE end of the interval: what cannot be excluded counts, so that too little data fails
rather than passes.  A value that is not a number fails.  A failed smoke prompt is a gate of its own.
"""

from __future__ import annotations

import dataclasses

from qwen_quant.errors import GateError, InputError
from qwen_quant.recipe import GateConfig
from qwen_quant.results import GateOutcome, ValidationResult


def gate_outcomes(result: ValidationResult, gates: GateConfig) -> tuple[GateOutcome, ...]:
    """Every gate that was asked for, one outcome a text or task, and the smoke gate where prompts were run.

    Errors: InputError for a limit on tasks where no task was run.
    """
    outcomes = []
    if result.smoke:
        failed = sum(bool(case.failures) for case in result.smoke)
        outcomes.append(GateOutcome("smoke prompts that fail", 0, failed, failed == 0))
    for text in result.texts:
        if gates.max_kl is not None:
            outcomes.append(_at_most(f"max_kl on {text.dataset}", gates.max_kl, text.kl_mean.high))
        if gates.max_perplexity_ratio is not None:
            name = f"max_perplexity_ratio on {text.dataset}"
            outcomes.append(_at_most(name, gates.max_perplexity_ratio, text.perplexity_ratio.high))
        if gates.min_top1 is not None:
            low = text.top1_agreement.low
            outcomes.append(GateOutcome(f"min_top1 on {text.dataset}", gates.min_top1, low, low >= gates.min_top1))
    if gates.max_task_drop is not None and not result.tasks and result.texts:
        raise InputError("max_task_drop is set but no task was run", next_step="add --tasks or --preset")
    for task in result.tasks:
        if gates.max_task_drop is not None:
            outcomes.append(_at_most(f"max_task_drop on {task.task}", gates.max_task_drop, -task.difference.low))
    return tuple(outcomes)


def _at_most(name: str, limit: float, value: float) -> GateOutcome:
    return GateOutcome(name, limit, value, value <= limit)


def with_gates(result: ValidationResult, gates: GateConfig, override_reason: str = "") -> ValidationResult:
    """The result with its gates and the reason why failing ones are overridden ("" where they are not)."""
    return dataclasses.replace(result, gates=gate_outcomes(result, gates), override_reason=override_reason)


def remedy(result: ValidationResult) -> str:
    """What may bring the figures closer to the baseline, by what was measured."""
    if result.baseline_sha256 and result.baseline_sha256 == result.quantized_sha256:
        return "try --kv-cache bf16, or a model with more key-value heads"
    if result.quantized_kind.startswith("bitsandbytes"):
        return "try --quant-type int8 or nf4, a smaller --block-size, or qwen-quant gptq, which calibrates"
    return "try more calibration tokens, a smaller --group-size or more --bits"


def check_gates(result: ValidationResult) -> None:
    """Raise GateError naming every failed gate with its value and limit, unless a reason overrides them."""
    failed = [gate for gate in result.gates if not gate.passed]
    if not failed or result.override_reason:
        return
    raise GateError(
        f"{result.quantized} fails {len(failed)} gate(s)",
        "; ".join(f"{gate.name}: {gate.value:.4g}, limit {gate.limit:g}" for gate in failed),
        f"do not release it: {remedy(result)}; "
        "--override-gates REASON goes on all the same and is written into the report",
    )
