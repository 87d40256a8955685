"""The plots of a profile as PNG files, for slides and trackers that show no SVG. Needs matplotlib (extra `plots`).

The same charts as in profile.svg and profile.html, with the same curves; drawn without a display.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from qwen_quant.errors import InputError
from qwen_quant.evaluation.report_numbers import visible
from qwen_quant.evaluation.report_plots import Chart

INSTALL = "pip install 'qwen-quant[plots]'"
INCHES, DOTS_PER_INCH = (7.2, 4.2), 160
_MARKERS, _DASHES = "osD^v", ("-", "--", "-.", ":")


def require_matplotlib() -> None:
    """InputError naming the extra where matplotlib is not installed: asked before anything is measured."""
    if find_spec("matplotlib") is None:
        raise InputError("PNG plots need matplotlib", "it is not installed", f"{INSTALL}, or leave out --png")


def write_pngs(charts: Mapping[str, Chart], folder: Path) -> tuple[Path, ...]:
    """Draw each chart into folder/NAME.png (each replaced as a whole); returns the files in order.

    Errors: InputError where matplotlib is not installed.
    """
    require_matplotlib()
    written = []
    for name, chart in charts.items():
        path = folder / f"{name}.png"
        partial = folder / f".{name}.png.partial"
        _draw(chart, partial)
        os.replace(partial, path)
        written.append(path)
    return tuple(written)


def _draw(chart: Chart, path: Path) -> None:
    # The object interface with its own canvas: pyplot would pick a display and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, series in enumerate(chart.series):
        xs, ys = zip(*series.points, strict=True)
        marker, dashes = _MARKERS[number % len(_MARKERS)], _DASHES[number % len(_DASHES)]
        axes.plot(xs, ys, markersize=4, label=_plain(series.name), marker=marker, linestyle=dashes)
    axes.set_title(_plain(chart.title))
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.y_label))
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    if not chart.log_y:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png")


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is: $ would begin a formula, and a leading _ hide a curve from the legend."""
    shown = visible(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
