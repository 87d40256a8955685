"""`qwen-quant compare`: two reports of `validate` side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, show
from qwen_quant.results import Interval, to_json
from qwen_quant.units import format_bytes

if TYPE_CHECKING:
    from qwen_quant.evaluation.compare import ComparisonResult, ComparisonRow

First = Annotated[Path, typer.Argument(metavar="A.json", help="report.json of one validation")]
Second = Annotated[Path, typer.Argument(metavar="B.json", help="report.json of the other")]


def compare(first: First, second: Second, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show two reports side by side: each figure, their difference, and whether their intervals overlap.

    Figures that were not measured in the same way (another text, other windows, other items, another baseline) are
    shown without a difference and named in a warning. The exit code is 0 all the same; --json has same_protocol.

    \b
    Examples:
      qwen-quant compare int4/report.json int3/report.json
      qwen-quant compare ours/report.json theirs/report.json --json
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.evaluation.compare import compare_reports
    from qwen_quant.evaluation.report import read_report

    result = compare_reports(read_report(first), read_report(second))
    show(Report("compare", to_json(result), report_parts(result)), output)


def report_parts(result: ComparisonResult) -> tuple[str | Table, ...]:
    """What is A and what is B, one table for each text, one for all lengths, one for all tasks, and the warnings."""
    from qwen_quant.evaluation.report_numbers import visible

    head = f"A: {result.a} (baseline {result.a_baseline})\nB: {result.b} (baseline {result.b_baseline})"
    columns = ("", "A", "B", "B - A", "interval of A", "interval of B", "")
    sections = dict.fromkeys(row.section for row in result.rows)
    tables = [
        Table(visible(name), columns, tuple(_cells(row) for row in result.rows if row.section == name))
        for name in sections
    ]
    protocol = (
        "both were measured in the same way against the same baseline"
        if result.same_protocol
        else "NOT everything was measured in the same way: see the warnings"
    )
    tail = "intervals that overlap do not prove that two models are equal; each is that of one report on its own"
    return (visible(head), *tables, *(f"warning: {visible(text)}" for text in result.warnings), protocol, tail)


def _cells(row: ComparisonRow) -> tuple[str, ...]:
    from qwen_quant.evaluation.report_numbers import visible

    name = row.metric if row.scope == row.section else f"{row.scope}: {row.metric}"
    values = ("-" if value is None else _figure(value, row.unit) for value in (row.a, row.b))
    change = "-" if row.difference is None else _change(row.difference, row.unit)
    spans = (_span(interval, row.unit) for interval in (row.a_interval, row.b_interval))
    return (visible(name), *values, change, *spans, row.words)


def _figure(value: float, unit: str) -> str:
    from qwen_quant.evaluation.report_numbers import number, percent

    if unit == "bytes":
        return format_bytes(value)
    if unit in ("ratio", "count"):
        return f"{value:.{0 if unit == 'count' else 4}f}"
    return percent(value) if unit == "share" else number(value)


def _change(value: float, unit: str) -> str:
    """A difference with its sign; of shares in percentage points."""
    from qwen_quant.evaluation.report_numbers import points

    if unit == "share":
        return f"{points(value)} points"
    return ("+" if value > 0 else "") + _figure(value, unit)


def _span(interval: Interval | None, unit: str) -> str:
    return "" if interval is None else f"{_figure(interval.low, unit)} to {_figure(interval.high, unit)}"
