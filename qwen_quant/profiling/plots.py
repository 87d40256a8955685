"""The plots of a profile: what they show, as inline SVG for the page, and as SVG files that stand alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from qwen_quant.evaluation.report_plots import Chart, Series, line_chart
from qwen_quant.evaluation.report_style import STYLE
from qwen_quant.profiling.results import Measurement, ProfileResult

_STYLES = ("baseline", "quantized", "rounding", "good-mark", "bad-mark")
_SVG = re.compile(r"<svg class=\"plot\".*?</svg>", re.DOTALL)
Value = Callable[[Measurement], float | None]


def charts(result: ProfileResult) -> dict[str, Chart]:
    """File name without suffix -> chart, of every plot that has something to show."""
    drawn = {
        "time-per-token": _latency(result),
        "memory-by-new-tokens": _sweep(result, "new_tokens", "new tokens", _gibibytes, "peak memory, GiB"),
        "memory-by-batch-size": _sweep(result, "batch_size", "rows", _gibibytes, "peak memory, GiB"),
        "speed-by-new-tokens": _sweep(result, "new_tokens", "new tokens", _speed, "tokens per second"),
        "speed-by-batch-size": _sweep(result, "batch_size", "rows", _speed, "tokens per second"),
    }
    return {name: chart for name, chart in drawn.items() if chart.series}


def figures(found: Mapping[str, Chart]) -> dict[str, str]:
    """File name without suffix -> <figure>."""
    return {name: line_chart(chart) for name, chart in found.items()}


def standalone(figure: str) -> str:
    """The drawing of a <figure> as a file of its own: with its namespace and its style, captions left out."""
    found = _SVG.search(figure)
    assert found is not None
    drawing = found[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    background = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    head, _, rest = drawing.partition(">")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{STYLE}</style>{background}{rest}\n'


def _gibibytes(m: Measurement) -> float | None:
    return None if m.memory is None else m.memory.generation_peak_bytes / 2**30


def _speed(m: Measurement) -> float | None:
    return None if m.speed is None else m.speed.tokens_per_second.median


def _series(rows: Sequence[tuple[str, tuple[tuple[float, float], ...]]]) -> tuple[Series, ...]:
    filled = [row for row in rows if row[1]]
    return tuple(Series(name, _STYLES[i % len(_STYLES)], points) for i, (name, points) in enumerate(filled))


def _latency(result: ProfileResult) -> Chart:
    """Milliseconds of a token against the tokens in the cache: the longest single-row cell of each model and cache."""
    chosen: dict[str, Measurement] = {}
    for m in result.measurements:
        if m.speed is None or len(m.speed.latency_curve) < 2:
            continue
        name = f"{m.model}, {m.cache_name} cache"
        kept = chosen.get(name)
        key = (-m.cell.batch_size, m.cell.new_tokens)
        if kept is None or key > (-kept.cell.batch_size, kept.cell.new_tokens):
            chosen[name] = m
    rows = [
        (name, tuple((float(m.cell.context_tokens + at), 1e3 * s) for at, s in m.speed.latency_curve if m.speed))
        for name, m in chosen.items()
        if m.speed is not None
    ]
    return Chart("Time per token", "tokens in the cache", "milliseconds per token", _series(rows))


def _sweep(result: ProfileResult, axis: str, x_label: str, value: Value, y_label: str) -> Chart:
    """One curve for each model, cache and value of the other axis, over cells that differ in `axis` only."""
    other = "batch_size" if axis == "new_tokens" else "new_tokens"
    curves: dict[str, list[tuple[float, float]]] = {}
    sizes = {getattr(m.cell, other) for m in result.measurements}
    for m in result.measurements:
        y = value(m)
        if y is None:
            continue
        name = f"{m.model}, {m.cache_name} cache"
        if len(sizes) > 1:
            name += f", {getattr(m.cell, other)} {'rows' if other == 'batch_size' else 'new tokens'}"
        if m.cell.context_tokens > 1:
            name += f", context {m.cell.context_tokens}"
        curves.setdefault(name, []).append((float(getattr(m.cell, axis)), y))
    rows = [(name, tuple(sorted(points))) for name, points in curves.items() if len(points) > 1]
    return Chart(f"{y_label[0].upper()}{y_label[1:]} by {x_label}", x_label, y_label, _series(rows))
