"""What is printed where: units, tables, JSON without NaN, log records, the progress bar."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest

from qwen_quant import console
from qwen_quant.console import Output, Report, Table
from qwen_quant.errors import GateError, InputError
from qwen_quant.progress import no_progress
from qwen_quant.units import format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 1536, "1.50 KiB"),
        (format_bytes, 15 * 2**20, "15.0 MiB"),
        (format_bytes, 5000 * 2**40, "5000.0 TiB"),
        (format_seconds, 4.21, "4.2 s"),
        (format_seconds, 59.97, "1 min 00 s"),
        (format_seconds, 75, "1 min 15 s"),
        (format_seconds, 7199.9, "2 h 00 min"),
        (format_seconds, 7260, "2 h 01 min"),
        (format_count, 1920, "1920"),
        (format_count, 28800, "28.8 k"),
        (format_count, 134515008, "134.5 M"),
        (format_count, 72 * 10**9, "72.0 B"),
    ],
)
def test_units(function: object, value: float, text: str) -> None:
    assert function(value) == text


def test_tables_align_wide_characters_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    table = Table("title", ("name", "figure"), (("中文", "1"), (long, "20")))
    console.show(Report("c", {}, ("first line", table)), Output())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "first line" and lines[2] == "title"
    assert lines[3].startswith("  name") and lines[3].endswith("figure")
    assert lines[5] == "  中文" + " " * 296 + "  " + "     1"
    assert lines[6] == f"  {long}      20"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Report("c", {"a": float("nan"), "b": [float("inf"), 1.5]}), Output(json=True))
    text = capsys.readouterr().out
    assert json.loads(text) == {"schema": "qwen-quant/1", "command": "c", "a": None, "b": [None, 1.5]}


def test_a_result_and_its_error_are_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Report("c", {"a": 1}), Output(json=True), GateError("too far", next_step="stop"))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["exit_code"] == 4
    assert printed.err == "error: too far\n  next: stop\n"


def test_an_error_says_what_why_and_next(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_error(InputError("a.json cannot be read", "row 3", "fix row 3"), as_json=False)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: a.json cannot be read: row 3\n  next: fix row 3\n")


@pytest.mark.parametrize(("quiet", "levels"), [(False, ["warning", "error"]), (True, ["error"])])
def test_log_records_reach_stderr_once(capsys: pytest.CaptureFixture[str], quiet: bool, levels: list[str]) -> None:
    logger = logging.getLogger("qwen_quant.somewhere")
    with console.running(Output(quiet=quiet)) as progress:
        assert progress is no_progress
        for _ in range(2):
            logger.info("small talk")
            logger.warning("careful")
            logger.error("broken")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[0] for line in printed.err.splitlines()] == levels
    assert logging.getLogger("qwen_quant").handlers == []


def test_the_bar_shows_label_count_and_rate_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with console.running(Output()) as progress:
        for done in range(4):
            progress("quantizing blocks", done, 30)
        time.sleep(0.3)  # the bar draws ten times a second
        progress("auditing [x]", 0, 5)
        logging.getLogger("qwen_quant.x").warning("a [bracket] warning")
    text = stderr.getvalue()
    assert "quantizing blocks" in text and "3/30" in text and "auditing [x]" in text
    assert "warning: a [bracket] warning" in text


def test_rates_are_readable() -> None:
    assert (console._rate(None), console._rate(2.0), console._rate(0.05)) == ("", "2.0/s", "20.0 s each")
