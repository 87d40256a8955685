"""Two models' scores of the same items, and what the difference between them says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_quant.errors import InputError
from qwen_quant.evaluation.significance import (
    accuracy_verdict,
    holm,
    mcnemar_exact,
    paired_bootstrap_difference,
    sign_flip_test,
)
from qwen_quant.evaluation.task_scores import TaskScores
from qwen_quant.results import TaskResult


def pair_tasks(baseline: dict[str, TaskScores], quantized: dict[str, TaskScores], seed: int) -> tuple[TaskResult, ...]:
    """The comparison of two runs, one row a task in the baseline's order; Holm's correction over all rows.

    Errors: InputError when the two did not run the same tasks on the same items.
    """
    if set(baseline) != set(quantized):
        odd = sorted(set(baseline) ^ set(quantized))
        raise InputError(f"the task '{odd[0]}' was run on one model only", next_step="run both models with one TaskRun")
    pairs = [(baseline[name], quantized[name]) for name in baseline]
    for first, second in pairs:
        _check_items(first, second)
    p_values = [_p_value(first.scores, second.scores, seed) for first, second in pairs]
    adjusted = holm(p_values)
    return tuple(_result(pair, p, p_holm, seed) for pair, p, p_holm in zip(pairs, p_values, adjusted, strict=True))


def _check_items(first: TaskScores, second: TaskScores) -> None:
    """Both ran the same items under the same metric (InputError otherwise)."""
    same = (first.metric, first.shots, first.item_ids) == (second.metric, second.shots, second.item_ids)
    if not same:
        odd = sorted(set(first.item_ids) ^ set(second.item_ids))
        raise InputError(
            f"the task '{first.task}' was not run on the same items by both models",
            f"{len(first.item_ids)} items against {len(second.item_ids)}" + (f", such as {odd[0]}" if odd else ""),
            "both folders need the same tokenizer and chat template, and one --data-dir and --limit",
        )


def _only(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[int, int] | None:
    """(items only the first got right, items only the second did); None where scores are not 0 or 1."""
    if not all(bool(np.isin(scores, (0.0, 1.0)).all()) for scores in (first, second)):
        return None
    return int((first > second).sum()), int((second > first).sum())


def _p_value(first: NDArray[np.float64], second: NDArray[np.float64], seed: int) -> float:
    """McNemar's exact test where scores are 0 or 1, else the sign-flip test."""
    only = _only(first, second)
    return sign_flip_test(second - first, seed=seed) if only is None else mcnemar_exact(*only)


def _result(pair: tuple[TaskScores, TaskScores], p_value: float, p_holm: float, seed: int) -> TaskResult:
    """One row of the report."""
    first, second = pair
    only = _only(first.scores, second.scores)
    difference = paired_bootstrap_difference(first.scores, second.scores, seed=seed)
    items = len(first.item_ids)
    verdict = accuracy_verdict(difference, p_holm, items, None if only is None else sum(only))
    return TaskResult(
        task=first.task,
        metric=first.metric,
        shots=first.shots,
        items=items,
        baseline=float(first.scores.mean()),
        quantized=float(second.scores.mean()),
        difference=difference,
        only_baseline_right=None if only is None else only[0],
        only_quantized_right=None if only is None else only[1],
        p_value=p_value,
        p_holm=p_holm,
        verdict=verdict,
    )
