"""The only module that prints.

stdout carries the result: a table for people, or with --json exactly one JSON document. stderr carries progress (only
on a terminal), warnings and errors. A reader that closes the pipe early does not change a command's exit code.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import QwenQuantError
from qwen_quant.progress import ProgressFn, no_progress
from qwen_quant.results import to_json

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "qwen-quant/1"
LOGGER = "qwen_quant"


@dataclass(frozen=True)
class Table:
    """A titled table; `columns` are its headings (all empty: none), the first `text_columns` are left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


@dataclass(frozen=True)
class Report:
    """What a command has to say: `data` for --json, `parts` (lines and tables, in order) for people."""

    command: str
    data: dict[str, Any]
    parts: tuple[str | Table, ...] = field(default=())


@dataclass(frozen=True)
class Output:
    """How this run speaks: `json` is one document on stdout, `quiet` is no progress, no notes and no warnings."""

    json: bool = False
    quiet: bool = False

    @property
    def interactive(self) -> bool:
        """Whether progress may be drawn: stderr is a terminal and --quiet was not given."""
        return not self.quiet and sys.stderr.isatty()


def show(report: Report, output: Output, error: QwenQuantError | None = None) -> None:
    """Print a result on stdout; an `error` that belongs to it (a failed gate) goes along in the same document."""
    if output.json:
        document = {"schema": SCHEMA, "command": report.command, **to_json(report.data)}
        if error is not None:
            document["error"] = error_fields(error)
        _write_json(document)
    else:
        _write_stdout("".join(_render(part) for part in report.parts))
    if error is not None:
        _write_stderr(error_text(error))


def show_error(error: QwenQuantError, *, as_json: bool) -> None:
    """Print an error as one message on stderr and, with --json, as one document on stdout."""
    _write_stderr(error_text(error))
    if as_json:
        _write_json({"schema": SCHEMA, "error": error_fields(error)})


def note(text: str, output: Output) -> None:
    """Print one remark about the run on stderr (not with --quiet)."""
    if not output.quiet:
        _write_stderr(text.rstrip("\n") + "\n")


def write_line(text: str, *, to_stderr: bool = False) -> None:
    """Print plain text that is neither a result nor an error (the version, the help text)."""
    (_write_stderr if to_stderr else _write_stdout)(text.rstrip("\n") + "\n")


def error_fields(error: QwenQuantError) -> dict[str, Any]:
    """The JSON form of an error: type, message, what, why, next_step and exit_code."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "what": error.what,
        "why": error.why,
        "next_step": error.next_step,
        "exit_code": error.exit_code,
    }


def error_text(error: QwenQuantError) -> str:
    """The form of an error for people: "error: what: why", then what to do next on a line of its own."""
    lines = [f"error: {error}"]
    if error.next_step:
        lines.append(f"  next: {error.next_step}")
    return "\n".join(lines) + "\n"


@contextmanager
def running(output: Output) -> Iterator[ProgressFn]:
    """Attach the one log handler and, on a terminal, a progress bar with ETA and rate; yields the ProgressFn."""
    logger = logging.getLogger(LOGGER)
    handler = _StderrHandler(logging.ERROR if output.quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        if not output.interactive:
            yield no_progress
            return
        with _Bar() as bar:
            handler.console = bar.console
            yield bar.update
    finally:
        logger.removeHandler(handler)


class _StderrHandler(logging.Handler):
    """Writes log records to stderr, above the progress bar when there is one; the same text only once a run."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.console: Console | None = None
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if text in self._seen:
            return
        self._seen.add(text)
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _write_stderr(text + "\n")


class _Bar:
    """One rich progress bar on stderr; a new `total` or a smaller `done` starts its clock again."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), rate)
        times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=self.console, transient=True)
        self._task = self._progress.add_task("", total=None, visible=False, rate="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, label: str, done: int, total: int) -> None:
        """The ProgressFn of this bar."""
        task = self._progress.tasks[0]
        if task.total != total or done < task.completed:
            self._progress.reset(self._task, total=total, completed=done, visible=True, description=label)
        self._progress.update(self._task, description=label, completed=done, rate=_rate(task.speed))


def _rate(steps_per_second: float | None) -> str:
    if not steps_per_second:
        return ""
    return f"{steps_per_second:.1f}/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s each"


def _render(part: str | Table) -> str:
    """Text of one part. Tables are plain text of their full width: a pipe or a log never cuts a column."""
    if isinstance(part, str):
        return part.rstrip("\n") + "\n"
    from rich.cells import cell_len

    rows = [row for row in (part.columns, *part.rows) if any(row)]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(part.columns))]
    lines = ["  ".join(_pad(cell, i, widths, part) for i, cell in enumerate(row)).rstrip() for row in rows]
    if any(part.columns):
        lines.insert(1, "  ".join("-" * width for width in widths))
    title = [part.title] if part.title else []
    return "\n".join(["", *title, *(f"  {line}" for line in lines), "", ""])


def _pad(cell: str, column: int, widths: list[int], table: Table) -> str:
    """The cell at its column's width, counting East Asian characters as two."""
    from rich.cells import cell_len

    space = " " * (widths[column] - cell_len(cell))
    return cell + space if column < table.text_columns else space + cell


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: such a number becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _write_json(document: dict[str, Any]) -> None:
    _write_stdout(json.dumps(_finite(to_json(document)), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        close_stdout()
        if not isinstance(error, BrokenPipeError):
            raise


def _write_stderr(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def close_stdout() -> None:
    """Point stdout at nothing once it takes no more, so that the interpreter's last flush is silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
