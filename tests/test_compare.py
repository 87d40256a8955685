"""Two reports side by side: what may be compared is, what may not is shown with the reason, and nothing silently."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant import cli
from qwen_quant.evaluation.compare import ComparisonResult, ComparisonRow, compare_reports
from qwen_quant.evaluation.report import write_report
from qwen_quant.results import Interval, PerplexityPair, TextResult, ValidationResult
from tests.support.full_report import full_result, make_text

BASE = dataclasses.replace(full_result(), texts=(make_text(),), by_length=(), tasks=(), smoke=(), warnings=())


def with_text(**changes: object) -> ValidationResult:
    """BASE with its one text changed."""
    return dataclasses.replace(BASE, texts=(dataclasses.replace(BASE.texts[0], **changes),))


def row(result: ComparisonResult, metric: str) -> ComparisonRow:
    found = [row for row in result.rows if row.metric == metric]
    assert len(found) == 1, metric
    return found[0]


def test_a_report_and_itself() -> None:
    result = compare_reports(full_result(), full_result())
    assert result.same_protocol
    assert result.warnings == tuple(f"{which} warned: {text}" for which in "AB" for text in full_result().warnings)
    assert all(row.difference == 0 and row.a == row.b for row in result.rows)
    assert {row.overlap for row in result.rows if row.a_interval} == {True}
    assert row(result, "smoke prompts that fail").a == 1
    # Size, 10 figures a text, 2 a length, 2 a task, the smoke prompts.
    assert len(result.rows) == 1 + 2 * 10 + 6 * 2 + 6 * 2 + 1


@pytest.mark.parametrize(
    ("low", "high", "overlap", "words"),
    [
        (0.0858, 0.09, True, "intervals overlap: not told apart"),  # they share one end
        (0.0859, 0.09, False, "intervals do not overlap: A is better"),
        (0.05, 0.0807, False, "intervals do not overlap: B is better"),
        (0.05, 0.0808, True, "intervals overlap: not told apart"),
        (0.0, 1.0, True, "intervals overlap: not told apart"),
        (math.nan, math.nan, None, "the intervals cannot be compared"),
    ],
)
def test_overlap_in_words(low: float, high: float, overlap: bool | None, words: str) -> None:
    first = with_text(kl_mean=Interval(0.0833, 0.0808, 0.0858))
    second = with_text(kl_mean=Interval((low + high) / 2, low, high))
    found = row(compare_reports(first, second), "KL divergence, mean")
    assert (found.overlap, found.words) == (overlap, words)


def test_more_agreement_is_better() -> None:
    first = with_text(top1_agreement=Interval(0.8, 0.79, 0.81))
    second = with_text(top1_agreement=Interval(0.9, 0.89, 0.91))
    found = row(compare_reports(first, second), "top-1 agreement")
    assert found.words == "intervals do not overlap: B is better"
    assert found.difference == pytest.approx(0.1)
    assert "A is better" in row(compare_reports(second, first), "top-1 agreement").words


def test_intervals_of_another_confidence_are_not_compared() -> None:
    result = compare_reports(BASE, with_text(kl_mean=Interval(0.5, 0.4, 0.6, confidence=0.9)))
    assert row(result, "KL divergence, mean").overlap is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_sha256": "ef" * 32}, "sha256 of the text abababababababab and efefefefefefefef"),
        ({"window_tokens": 2048, "stride_tokens": 2048}, "tokens a window 1024 and 2048"),
        ({"stride_tokens": 512}, "stride in tokens 1024 and 512"),
        ({"tokens": 1023, "windows": 1}, "windows 64 and 1; tokens scored 65472 and 1023"),
        ({"joining": "rows joined by newlines"}, "joining one file, as it is and rows joined by newlines"),
    ],
)
def test_another_protocol_is_shown_and_not_compared(change: dict[str, object], words: str) -> None:
    result = compare_reports(BASE, with_text(**change))
    assert not result.same_protocol and words in result.warnings[0]
    rows = [row for row in result.rows if row.scope != "model"]
    assert len(rows) == 10
    for found in rows:
        assert found.words == "not compared: another protocol"
        assert found.a is not None and found.b is not None
        assert found.difference is None and found.overlap is None


def test_another_baseline_leaves_only_what_does_not_depend_on_it() -> None:
    other = with_text(perplexity=PerplexityPair(19.0, 19.6021, 1.03, 65472))
    result = compare_reports(BASE, other)
    assert not result.same_protocol and "its perplexity is 18.6513 and 19" in result.warnings[0]
    for metric in ("perplexity", "bits per byte", "perplexity of the baseline"):
        assert row(result, metric).difference is not None
    for metric in ("perplexity ratio", "KL divergence, mean", "KL divergence, max", "top-1 agreement"):
        assert row(result, metric).words == "not compared: another baseline"
    noise = with_text(perplexity=PerplexityPair(18.6515, 19.6021, 1.05097, 65472))
    assert compare_reports(BASE, noise).same_protocol


def test_texts_are_paired_by_content_before_name() -> None:
    def texts(*found: TextResult) -> ValidationResult:
        return dataclasses.replace(BASE, texts=found)

    english, chinese = make_text("en.txt", "ab"), make_text("zh.txt", "cd", 0.2)
    renamed = dataclasses.replace(english, dataset="copy/en.txt")
    result = compare_reports(texts(english, chinese), texts(chinese, renamed))
    assert result.same_protocol
    assert [r.difference for r in result.rows if r.metric == "KL divergence, mean"] == [0, 0]
    short = dataclasses.replace(english, window_tokens=512, stride_tokens=512)
    result = compare_reports(texts(english), texts(short, english))
    assert [r.words[:4] for r in result.rows if r.metric == "KL divergence, mean"] == ["inte", "only"]
    assert result.warnings == ("en.txt, windows of 512 tokens is only in B",)
    result = compare_reports(texts(english), texts(chinese))
    assert [warning[-9:] for warning in result.warnings] == ["only in A", "only in B"]


def test_tasks_and_lengths_need_the_same_items() -> None:
    whole = full_result()
    task = dataclasses.replace(whole.tasks[0], items=100)
    length = dataclasses.replace(whole.by_length[1], windows=1, tokens=2047)
    other = dataclasses.replace(
        whole, tasks=(task, *whole.tasks[2:]), by_length=(whole.by_length[0], length, *whole.by_length[2:])
    )
    result = compare_reports(whole, other)
    assert not result.same_protocol
    said = "\n".join(result.warnings)
    for words in (
        "context of 2048 tokens is not measured in the same way: windows 64 and 1; tokens scored 131008 and 2047",
        "gsm8k (exact_match) is not measured in the same way: items 1319 and 100",
        "mmlu_abstract_algebra_with_a_very_long_name_indeed (exact_match) is only in A",
    ):
        assert words in said
    assert [r.words for r in result.rows if r.scope.startswith("mmlu")] == ["only in A"] * 2


def test_remarks_name_seeds_and_versions() -> None:
    other = dataclasses.replace(BASE, seed=8, versions={"torch": "2.14.0"}, baseline_kind="gptq 8 bit", kv_cache="")
    result = compare_reports(BASE, other)
    assert result.same_protocol
    said = "\n".join(result.warnings)
    for words in ("seeds are 7 and 8", "torch 2.13.0 and 2.14.0", "python 3.11.9 and none", "16-bit and gptq 8 bit"):
        assert words in said


# The command


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`qwen-quant compare` in a folder with a/report.json and b/report.json (another text for b)."""
    monkeypatch.chdir(tmp_path)
    write_report(full_result(), Path("a"), layers=())
    write_report(dataclasses.replace(full_result(), texts=(make_text(kl=0.2),)), Path("b"), layers=())

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(["compare", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_tables_and_warnings(call: Call) -> None:
    code, out, err = call("a/report.json", "b/report.json")
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if "KL divergence, mean" in line)
    assert line.split("  ")[0] == "" and "+0.1167" in line and "intervals do not overlap: A is better" in line
    for words in (
        "A: /models/Qwen2.5-0.5B-Int4 (baseline /models/Qwen2.5-0.5B)",
        "436.2 MiB",
        "warning: bundled:eval_zh.txt, windows of 1024 tokens is only in A",
        "NOT everything was measured in the same way",
    ):
        assert words in out
    assert "same way against the same baseline" in call("a/report.json", "a/report.json")[1]


def test_lengths_and_tasks_are_one_table_each_and_terminal_codes_are_not_obeyed(call: Call) -> None:
    _, out, _ = call("a/report.json", "a/report.json")
    assert out.count("\ncontext lengths\n") == out.count("\nbenchmark tasks\n") == 1
    assert "  context of 2048 tokens: perplexity ratio " in out and "  gsm8k (exact_match): score - baseline " in out
    assert "\x1b" not in out and r"\x00\x1b[31m \u202eabc" in out
    smoke = next(line for line in out.splitlines() if "smoke prompts that fail" in line)
    assert smoke.split() == ["smoke", "prompts", "that", "fail", "1", "1", "0", "the", "same"]


def test_the_command_as_json(call: Call) -> None:
    code, out, _ = call("a/report.json", "b/report.json", "--json", "--quiet")
    document = json.loads(out)
    assert code == 0
    assert (document["schema"], document["command"], document["same_protocol"]) == ("qwen-quant/1", "compare", False)
    kl = next(r for r in document["rows"] if r["metric"] == "KL divergence, mean")
    assert (kl["overlap"], kl["unit"]) == (False, "nats") and kl["difference"] == pytest.approx(0.1167)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("a/report.json", "none.json"), 3, "none.json cannot be read: no such file"),
        (("a/report.json", "b"), 3, "b cannot be read: it is a folder"),
        (("a/report.html", "a/report.json"), 3, "a/report.html is not JSON"),
        (("a/report.json",), 2, "B.json"),
        (("a/report.json", "b/report.json", "--nosuch"), 2, "--nosuch"),
    ],
)
def test_bad_input_is_one_message(call: Call, arguments: tuple[str, ...], code: int, words: str) -> None:
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert words in err and err.count("error: ") == 1 and "Traceback" not in err


def test_help_has_examples(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for words in ("Usage: qwen-quant compare", "Examples:", "--json", "--quiet"):
        assert words in out
