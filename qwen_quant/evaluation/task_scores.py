"""Every item's score, out of what lm-eval logs about each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_quant.errors import InputError
from qwen_quant.evaluation.task_catalog import LoadedPlan

_ID_LENGTH = 12


@dataclass(frozen=True, eq=False)
class TaskScores:
    """One model's scores of one task.

    Attributes:
        task: as it was asked for. metric: lm-eval's name, "METRIC,FILTER" where the task filters its answers in several
            ways, "1 - METRIC" where lower was better. shots: examples in the prompt.
        item_ids: which items, in order: "TASK/NUMBER/HASH of row, prompt and target".
        scores: FP64 [items] in 0..1, higher is better.
        warnings: what a reader should know about this run of this model.
    """

    task: str
    metric: str
    shots: int
    item_ids: tuple[str, ...]
    scores: NDArray[np.float64]
    warnings: tuple[str, ...]


def collect(
    name: str, loaded: LoadedPlan, samples: dict[str, list[dict[str, Any]]], warnings: tuple[str, ...]
) -> dict[str, TaskScores]:
    """Rows of one name from lm-eval's logged samples, the members of a group pooled."""
    first = next(iter(loaded.tasks))
    wanted = _wanted(loaded, samples[first])
    several = len({sample["filter"] for sample in samples[first]}) > 1
    shots = max(int(task.get_config("num_fewshot") or 0) for task in loaded.tasks.values())
    rows = {}
    for metric, chosen in wanted:
        lower = loaded.tasks[first].higher_is_better().get(metric, True) is False
        label = f"{'1 - ' if lower else ''}{metric}{',' + chosen if several else ''}"
        ids, values = [], []
        for leaf in loaded.tasks:
            for sample in samples[leaf]:
                if sample["filter"] == chosen and (value := _number(sample.get(metric))) is not None:
                    ids.append(f"{leaf}/{sample['doc_id']}/{_fingerprint(sample)}")
                    values.append(1.0 - value if lower else value)
        scores = np.array(values, dtype=np.float64)
        if scores.size == 0 or float(scores.min()) < 0 or float(scores.max()) > 1:
            raise InputError(
                f"the task '{name}' gives no score between 0 and 1 for every item",
                f"its metric is {metric}",
                "leave it out; perplexity is measured by `qwen-quant validate --text`",
            )
        key = name if len(wanted) == 1 else f"{name}:{metric}"
        rows[key] = TaskScores(name, label, shots, tuple(ids), scores, warnings)
    return rows


def _wanted(loaded: LoadedPlan, samples: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(metric, filter) pairs to report: as planned, else the first metric that has a number for each item."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    numeric = [m for m in samples[0]["metrics"] if _number(samples[0].get(m)) is not None]
    planned = loaded.plan.scores
    if planned is None:
        return [(metric, filters[0]) for metric in numeric]
    if planned[0]:
        return [(planned[0], planned[1] or filters[0])]
    better = next(iter(loaded.tasks.values())).higher_is_better()
    numeric.sort(key=lambda metric: better.get(metric, True) is False)
    if not numeric:
        raise InputError(
            f"the task '{loaded.plan.name}' has no score for each item",
            f"its metrics are {', '.join(samples[0]['metrics'])}",
            "leave it out; perplexity is measured by `qwen-quant validate --text`",
        )
    return [(numeric[0], filters[0])]


def _number(value: Any) -> float | None:
    """A score as a number, None for anything else (and for NaN: the metric does not apply to this item)."""
    if isinstance(value, (bool, int, float, np.number, np.bool_)) and not np.isnan(float(value)):
        return float(value)
    return None


def _fingerprint(sample: dict[str, Any]) -> str:
    """Which row, prompt and target one sample is."""
    text = "".join(str(sample[key]) for key in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]
