"""Two reports side by side: what may be compared is, and what may not is shown with the reason.

Texts are paired by their sha256 and windows, then by sha256, then by name; lengths by their window; tasks by task and
metric. Figures of a pair whose protocol differs are shown without a difference. Figures that are relative to the
baseline (KL divergence, ratio, agreement, task differences) are compared only where the baselines agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen_quant.results import Interval, LengthRow, TaskResult, TextResult, ValidationResult

BASELINE_TOLERANCE = 1e-3  # relative difference of baseline perplexities that rounding and threads can explain
NOT_COMPARED = "not compared"
LENGTH_SECTION = "context lengths"
TASK_SECTION = "benchmark tasks"
# Fields that say how an item was measured, and what they are called in a warning.
_LENGTH_PROTOCOL = (("windows", "windows"), ("tokens", "tokens scored"))
_TEXT_PROTOCOL = (
    ("dataset_sha256", "sha256 of the text"),
    ("joining", "joining"),
    ("window_tokens", "tokens a window"),
    ("stride_tokens", "stride in tokens"),
    *_LENGTH_PROTOCOL,
)
_TASK_PROTOCOL = (("shots", "shots"), ("items", "items"))

Item = TypeVar("Item", TextResult, LengthRow, TaskResult)


@dataclass(frozen=True)
class ComparisonRow:
    """One figure of both reports.

    Attributes:
        section: "model", the text it belongs to, "context lengths" or "benchmark tasks".
        scope: the text, length or task it belongs to; "model" in the section "model".
        metric: its name; unit: "", "ratio", "nats", "share" (of 1), "bits", "bytes" or "count".
        a, b: the figures (None where that report has none).
        difference: b - a; None where the two must not be compared.
        a_interval, b_interval: their intervals, where the report has them.
        overlap: whether the intervals overlap; None without intervals, or where they must not be compared.
        words: the same in words.
    """

    section: str
    scope: str
    metric: str
    unit: str
    a: float | None
    b: float | None
    difference: float | None
    a_interval: Interval | None
    b_interval: Interval | None
    overlap: bool | None
    words: str


@dataclass(frozen=True)
class ComparisonResult:
    """Two reports side by side.

    Attributes:
        a, b: the quantized models; a_baseline, b_baseline: what each was compared with.
        same_protocol: whether everything in both was measured in the same way against the same baseline.
        rows: every figure.
        warnings: every way in which the reports differ that a reader must know.
    """

    a: str
    b: str
    a_baseline: str
    b_baseline: str
    same_protocol: bool
    rows: tuple[ComparisonRow, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Metric:
    """How a figure is found in an item (a text, a length, a task) and read."""

    name: str
    unit: str
    value: Callable[..., float]
    interval: Callable[..., Interval] | None = None
    higher_is_better: bool = False
    to_baseline: bool = False


_TEXT_METRICS = (
    _Metric("perplexity of the baseline", "", lambda t: t.perplexity.baseline),
    _Metric("perplexity", "", lambda t: t.perplexity.quantized),
    _Metric(
        "perplexity ratio",
        "ratio",
        lambda t: t.perplexity_ratio.estimate,
        lambda t: t.perplexity_ratio,
        to_baseline=True,
    ),
    _Metric("bits per byte", "bits", lambda t: t.bits_per_byte_quantized),
    _Metric("KL divergence, mean", "nats", lambda t: t.kl_mean.estimate, lambda t: t.kl_mean, to_baseline=True),
    _Metric("KL divergence, median", "nats", lambda t: t.divergence.kl_median, to_baseline=True),
    _Metric("KL divergence, p90", "nats", lambda t: t.divergence.kl_p90, to_baseline=True),
    _Metric("KL divergence, p99", "nats", lambda t: t.divergence.kl_p99, to_baseline=True),
    _Metric("KL divergence, max", "nats", lambda t: t.divergence.kl_max, to_baseline=True),
    _Metric(
        "top-1 agreement",
        "share",
        lambda t: t.top1_agreement.estimate,
        lambda t: t.top1_agreement,
        higher_is_better=True,
        to_baseline=True,
    ),
)
_LENGTH_METRICS = (
    _Metric("perplexity", "", lambda r: r.quantized),
    _Metric("perplexity ratio", "ratio", lambda r: r.ratio, to_baseline=True),
)
_TASK_METRICS = (
    _Metric("score", "share", lambda t: t.quantized, higher_is_better=True),
    _Metric(
        "score - baseline",
        "share",
        lambda t: t.difference.estimate,
        lambda t: t.difference,
        higher_is_better=True,
        to_baseline=True,
    ),
)


def compare_reports(a: ValidationResult, b: ValidationResult) -> ComparisonResult:
    """Every figure of two reports side by side, with what keeps them from being compared."""
    warnings: list[str] = []
    rows = [_exact_row("size of the weights", "bytes", float(a.quantized_bytes), float(b.quantized_bytes))]
    for text_a, text_b in _pair_texts(a.texts, b.texts):
        rows += _compare(text_a, text_b, _TEXT_METRICS, warnings)
    for length_a, length_b in _pair(a.by_length, b.by_length, lambda row: row.window_tokens):
        rows += _compare(length_a, length_b, _LENGTH_METRICS, warnings)
    for task_a, task_b in _pair(a.tasks, b.tasks, lambda task: (task.task, task.metric)):
        rows += _compare(task_a, task_b, _TASK_METRICS, warnings)
    if a.smoke and b.smoke:
        failing = [float(sum(bool(case.failures) for case in result.smoke)) for result in (a, b)]
        rows.append(_exact_row("smoke prompts that fail", "count", failing[0], failing[1]))
    return ComparisonResult(
        a.quantized,
        b.quantized,
        a.baseline,
        b.baseline,
        same_protocol=not warnings,
        rows=tuple(rows),
        warnings=(*warnings, *_remarks(a, b)),
    )


def _pair(a: Sequence[Item], b: Sequence[Item], key: Callable[[Item], object]) -> list[tuple[Item | None, Item | None]]:
    """Items of equal keys together, the first of `b` that is left for each of `a`; then those of `b` alone."""
    left = list(b)
    pairs: list[tuple[Item | None, Item | None]] = []
    for item in a:
        match = next((other for other in left if key(other) == key(item)), None)
        if match is not None:
            left.remove(match)
        pairs.append((item, match))
    return pairs + [(None, other) for other in left]


def _pair_texts(a: Sequence[TextResult], b: Sequence[TextResult]) -> list[tuple[TextResult | None, TextResult | None]]:
    """Texts of the same protocol together, then of the same bytes, then of the same name; the order is A's."""
    keys: tuple[Callable[[TextResult], object], ...] = (
        lambda t: (t.dataset_sha256, t.window_tokens, t.stride_tokens, t.tokens),
        lambda t: t.dataset_sha256,
        lambda t: t.dataset,
    )
    partner: dict[int, int] = {}
    for key in keys:
        for i, text in enumerate(a):
            free = [j for j, other in enumerate(b) if j not in partner.values() and key(other) == key(text)]
            if free and i not in partner:
                partner[i] = free[0]
    pairs: list[tuple[TextResult | None, TextResult | None]] = [
        (text, b[partner[i]] if i in partner else None) for i, text in enumerate(a)
    ]
    return pairs + [(None, text) for j, text in enumerate(b) if j not in partner.values()]


def _scope(a: Item, b: Item) -> str:
    """What a pair is called; both names where they differ."""
    names = dict.fromkeys(_name(item) for item in (a, b))
    return " and ".join(names)


def _name(item: TextResult | LengthRow | TaskResult) -> str:
    if isinstance(item, TextResult):
        return f"{item.dataset}, windows of {item.window_tokens} tokens"
    return f"context of {item.window_tokens} tokens" if isinstance(item, LengthRow) else f"{item.task} ({item.metric})"


def _compare(a: Item | None, b: Item | None, metrics: Sequence[_Metric], warnings: list[str]) -> list[ComparisonRow]:
    """The rows of one pair; says in `warnings` why they are not (all) compared."""
    if a is None or b is None:
        only, where = (b, "B") if a is None else (a, "A")
        assert only is not None
        warnings.append(f"{_name(only)} is only in {where}")
        return [_row(_name(only), metric, a, b, f"only in {where}") for metric in metrics]
    scope = _scope(a, b)
    differences = _protocol_differences(a, b)
    if differences:
        warnings.append(f"{scope} is not measured in the same way: {'; '.join(differences)}")
        return [_row(scope, metric, a, b, f"{NOT_COMPARED}: another protocol") for metric in metrics]
    other_baseline = _baselines_differ(a, b)
    if other_baseline:
        warnings.append(f"{scope} has another baseline in each report: {other_baseline}")
    return [
        _row(scope, metric, a, b, f"{NOT_COMPARED}: another baseline" if other_baseline and metric.to_baseline else "")
        for metric in metrics
    ]


def _protocol_differences(a: Item, b: Item) -> list[str]:
    """In words, every part of the protocol that is not the same ([]: the same items, measured in the same way)."""
    parts = _TEXT_PROTOCOL if isinstance(a, TextResult) else _LENGTH_PROTOCOL
    found = []
    for name, words in _TASK_PROTOCOL if isinstance(a, TaskResult) else parts:
        one, other = getattr(a, name), getattr(b, name)
        if one != other:
            ends = (one[:16], other[:16]) if name == "dataset_sha256" else (one, other)
            found.append(f"{words} {ends[0]} and {ends[1]}")
    return found


def _baselines_differ(a: Item, b: Item) -> str:
    """The baselines' own figures on the same items where rounding cannot explain their difference, else ""."""
    one, other = (item.perplexity.baseline if isinstance(item, TextResult) else item.baseline for item in (a, b))
    tolerance = 0.0 if isinstance(a, TaskResult) else BASELINE_TOLERANCE
    if math.isclose(one, other, rel_tol=max(tolerance, 1e-9), abs_tol=1e-12) or (math.isnan(one) and math.isnan(other)):
        return ""
    kind = "score" if isinstance(a, TaskResult) else "perplexity"
    return f"its {kind} is {one:.6g} and {other:.6g}"


def _row(scope: str, metric: _Metric, a: Item | None, b: Item | None, reason: str) -> ComparisonRow:
    """One figure; `reason` is why it is not compared ("" where it is)."""
    values = [None if item is None else metric.value(item) for item in (a, b)]
    intervals = [None if item is None or metric.interval is None else metric.interval(item) for item in (a, b)]
    difference, overlap = None, None
    if not reason and values[0] is not None and values[1] is not None:
        difference = values[1] - values[0]
        overlap = _overlap(intervals[0], intervals[1])
        reason = _words(difference, overlap, metric)
    section = (
        LENGTH_SECTION if isinstance(a or b, LengthRow) else TASK_SECTION if isinstance(a or b, TaskResult) else scope
    )
    return ComparisonRow(
        section,
        scope,
        metric.name,
        metric.unit,
        values[0],
        values[1],
        difference,
        intervals[0],
        intervals[1],
        overlap,
        reason,
    )


def _overlap(a: Interval | None, b: Interval | None) -> bool | None:
    """Whether two intervals share a value; None where one is missing, not a number, or of another confidence."""
    if a is None or b is None or a.confidence != b.confidence:
        return None
    ends = (a.low, a.high, b.low, b.high)
    return None if any(math.isnan(end) for end in ends) else a.low <= b.high and b.low <= a.high


def _words(difference: float, overlap: bool | None, metric: _Metric) -> str:
    if overlap is None:
        return "no interval" if metric.interval is None else "the intervals cannot be compared"
    if overlap:
        return "intervals overlap: not told apart"
    better = "B" if (difference > 0) == metric.higher_is_better else "A"
    return f"intervals do not overlap: {better} is better"


def _exact_row(metric: str, unit: str, a: float, b: float) -> ComparisonRow:
    """A figure of the model that is counted and so has no interval; less is better."""
    words = "the same" if a == b else f"{'A' if a < b else 'B'} has less"
    return ComparisonRow("model", "model", metric, unit, a, b, b - a, None, None, None, words)


def _remarks(a: ValidationResult, b: ValidationResult) -> list[str]:
    """Differences that do not keep figures from being compared but that a reader should know."""
    found = []
    if a.seed != b.seed:
        found.append(f"the bootstrap seeds are {a.seed} and {b.seed}")
    if a.kv_cache != b.kv_cache:
        found.append(f"the KV caches differ: {a.kv_cache or 'none asked for'} and {b.kv_cache or 'none asked for'}")
    if a.baseline_kind != b.baseline_kind:
        found.append(f"the baselines are of another kind: {a.baseline_kind} and {b.baseline_kind}")
    names = sorted(a.versions.keys() | b.versions.keys())
    pairs = [(name, a.versions.get(name, "none"), b.versions.get(name, "none")) for name in names]
    changed = [f"{name} {one} and {other}" for name, one, other in pairs if one != other]
    if changed:
        found.append(f"computed with other versions: {', '.join(changed)}")
    for which, result in (("A", a), ("B", b)):
        found += [f"{which} warned: {text}" for text in result.warnings]
    return found
