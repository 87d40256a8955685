"""Plots of report.html as inline SVG text: no script and no library; colours come from the page's style sheet.

Every plot is drawn WIDTH units wide and scales with its place on the page. Series differ by dash and by marker as well
as by colour, and each point carries its figures as an SVG title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_quant.evaluation.report_numbers import escaped, number

WIDTH = 440.0
HEIGHT = 240.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 16.0, 28.0, 40.0
FOREST_ROW = 40.0
LABEL_CHARACTERS = 34
_LOG_TICK_SPAN = 10.0  # axes that span less than this factor have even ticks: 1, 2, 5 would be too few
_MOST_LOG_TICKS = 7
_ROOM_OF_A_TICK = 44.0


@dataclass(frozen=True)
class Series:
    """One curve: its points (x, y) from left to right; `style` is its colour class in the page's style sheet."""

    name: str
    style: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over common axes.

    Attributes:
        title: what it shows, also for screen readers.
        y_range: the values at the ends of the y axis; None: from the points (from 0 on an even axis).
        x_ticks: where the x axis has ticks; (): chosen.
        own_legend: False where the page says elsewhere which curve is which.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    x_ticks: tuple[float, ...] = ()
    own_legend: bool = True


@dataclass(frozen=True)
class ForestRow:
    """One estimate with its interval; `value` is how its figures are written, `style` its colour class."""

    label: str
    value: str
    estimate: float
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class Axis:
    """Values low..high drawn from `start` to `stop`, evenly or by their logarithms."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False


def position(axis: Axis, value: float) -> float:
    """Where `value` lies on the drawing."""
    low, high, at = (math.log(v) if axis.log else v for v in (axis.low, axis.high, value))
    return axis.start + (axis.stop - axis.start) * (at - low) / (high - low)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values within low..high for a logarithmic axis: 1, 2, 5 of each decade, fewer on long axes."""
    if high / low < _LOG_TICK_SPAN:
        return [tick for tick in linear_ticks(low, high, 4) if tick > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{m}e{d}") for d in decades for m in multiples if low <= float(f"{m}e{d}") <= high]
        if len(ticks) <= _MOST_LOG_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / _MOST_LOG_TICKS)]


def value_range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """The ends of an axis that shows `values` with a little room; an even axis of positive values starts at 0."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.02)
        return low / room, high * room
    low = min(low, 0.0)
    room = 0.06 * (high - low) or 1.0
    return (low if low == 0 else low - room), high + room


def line_chart(chart: Chart) -> str:
    """The chart as a <figure> ("" when it has no point to draw); points that are not finite are counted below it."""
    drawn, lost = _drawable(chart)
    xs, ys = ([point[k] for line in drawn for point in line.points] for k in (0, 1))
    if not xs:
        return ""
    x_low, x_high = value_range(xs, log=True) if chart.log_x else (min(xs), max(xs))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    across = Axis(x_low, x_high, LEFT + 6, WIDTH - RIGHT, chart.log_x)
    y_low, y_high = chart.y_range or value_range(ys, log=chart.log_y)
    up = Axis(y_low, y_high, HEIGHT - BOTTOM, TOP, chart.log_y)
    parts = [*_y_axis(up, chart.y_label), *_x_axis(across, chart)]
    for line in drawn:
        parts += _curve(line, across, up)
    notes = [f"{lost} point(s) without a finite value are not drawn."] if lost else []
    return figure(
        chart.title, _svg(chart.title, HEIGHT, parts), legend(chart.series) if chart.own_legend else "", notes
    )


def forest_plot(title: str, axis_label: str, rows: Sequence[ForestRow]) -> str:
    """Estimates with their intervals, one below the other, with a line at 0, as a <figure> ("" without rows)."""
    kept = [row for row in rows if all(math.isfinite(v) for v in (row.estimate, row.low, row.high))]
    if not kept:
        return ""
    reach = 1.08 * max(abs(v) for row in kept for v in (row.low, row.high, row.estimate)) or 1.0
    across = Axis(-reach, reach, 10.0, WIDTH - 10)
    bottom = 8 + FOREST_ROW * len(kept)
    parts = [f'<line class="zero" x1="{_n(position(across, 0))}" x2="{_n(position(across, 0))}" y1="4" y2="{bottom}"/>']
    for tick in linear_ticks(-reach, reach, 6):
        x = _n(position(across, tick))
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 17, tick_label(tick), "middle"))
    parts.append(_text(_n(WIDTH / 2), bottom + 34, axis_label, "middle", "axis-label"))
    for i, row in enumerate(kept):
        parts += _forest_row(row, across, 8 + FOREST_ROW * i)
    lost = len(rows) - len(kept)
    notes = [f"{lost} row(s) without a finite interval are not drawn."] if lost else []
    return figure(title, _svg(title, bottom + 42, parts), "", notes)


def tick_label(value: float) -> str:
    """A tick's figure: whole numbers in full, others without trailing zeros."""
    return str(int(value)) if value == int(value) and abs(value) < 1e7 else f"{value:g}"


def figure(title: str, drawing: str, key: str = "", notes: Sequence[str] = ()) -> str:
    """A <figure> of a caption, a legend (HTML), the drawing (HTML), and notes (text)."""
    below = "".join(f'<p class="note">{escaped(text)}</p>' for text in notes)
    return f"<figure><figcaption>{escaped(title)}</figcaption>{key}{drawing}{below}</figure>"


def legend(series: Sequence[Series]) -> str:
    """Which curve is which ("" for a single curve)."""
    if len(series) < 2:
        return ""
    keys = [
        f'<span class="key"><svg width="26" height="12" viewBox="0 0 26 12" aria-hidden="true">'
        f'<line class="curve {line.style}" x1="0" x2="26" y1="6" y2="6"/>'
        f'<circle class="dot {line.style}" cx="13" cy="6" r="3"/></svg>{escaped(line.name)}</span>'
        for line in series
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def _drawable(chart: Chart) -> tuple[list[Series], int]:
    """The series with only the points that can be drawn, and how many cannot."""

    def fits(point: tuple[float, float]) -> bool:
        logs = (chart.log_x, chart.log_y)
        return all(math.isfinite(v) and (v > 0 or not log) for v, log in zip(point, logs, strict=True))

    kept = [Series(s.name, s.style, tuple(p for p in s.points if fits(p))) for s in chart.series]
    return kept, sum(len(s.points) for s in chart.series) - sum(len(s.points) for s in kept)


def _x_axis(axis: Axis, chart: Chart) -> list[str]:
    y = HEIGHT - BOTTOM
    chosen = log_ticks(axis.low, axis.high) if axis.log else linear_ticks(axis.low, axis.high, 6)
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    last = -math.inf
    for tick in (tick for tick in chart.x_ticks or chosen if axis.low <= tick <= axis.high):
        at = position(axis, tick)
        parts.append(f'<line class="tick" x1="{_n(at)}" x2="{_n(at)}" y1="{y}" y2="{y + 4}"/>')
        if at - last >= _ROOM_OF_A_TICK:
            parts.append(_text(_n(at), y + 17, tick_label(tick), "middle"))
            last = at
    middle = _n((LEFT + WIDTH - RIGHT) / 2)
    return [*parts, _text(middle, HEIGHT - 6, chart.x_label, "middle", "axis-label")]


def _y_axis(axis: Axis, label: str) -> list[str]:
    """Grid lines with their figures; the label lies level above the axis, where it can be read."""
    parts = [_text("4", 14, label, "start", "axis-label")]
    for tick in log_ticks(axis.low, axis.high) if axis.log else linear_ticks(axis.low, axis.high):
        y = _n(position(axis, tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(_n(LEFT - 6), float(y) + 4, tick_label(tick), "end"))
    return parts


def _curve(line: Series, across: Axis, up: Axis) -> list[str]:
    placed = [(_n(position(across, x)), _n(position(up, y)), x, y) for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y, _, _ in placed)
    radius = 2.2 if len(placed) > 40 else 3 if line.style == "quantized" else 4.2  # a ring around what hides it
    dots = [
        f'<circle class="dot {line.style}" cx="{px}" cy="{py}" r="{radius}">'
        f"<title>{escaped(line.name)}: {number(y)} at {tick_label(x)}</title></circle>"
        for px, py, x, y in placed
    ]
    return [f'<polyline class="curve {line.style}" points="{path}"/>', *dots]


def _forest_row(row: ForestRow, across: Axis, top: float) -> list[str]:
    low, high, middle = (_n(position(across, v)) for v in (row.low, row.high, row.estimate))
    y, style = _n(top + 26), row.style
    short = row.label if len(row.label) <= LABEL_CHARACTERS else row.label[: LABEL_CHARACTERS - 1] + "\u2026"
    ends = "".join(
        f'<line class="whisker {style}" x1="{x}" x2="{x}" y1="{top + 21}" y2="{top + 31}"/>' for x in (low, high)
    )
    return [
        f"<g><title>{escaped(row.label)}: {escaped(row.value)}</title>",
        _text("10", top + 12, short, "start", "label"),
        _text(_n(WIDTH - 10), top + 12, row.value, "end"),
        f'<line class="whisker {style}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>{ends}',
        f'<circle class="dot {style}" cx="{middle}" cy="{y}" r="4.5"/></g>',
    ]


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    box = f"0 0 {_n(WIDTH)} {_n(height)}"
    return f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escaped(title)}">{"".join(parts)}</svg>'


def _text(x: str, y: float, text: str, anchor: str, style: str = "figure-text") -> str:
    return f'<text class="{style}" x="{x}" y="{_n(y)}" text-anchor="{anchor}">{escaped(text)}</text>'


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
