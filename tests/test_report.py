"""report.json reads back as it was written and refuses what it is not; report.html is whole, safe and readable."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from qwen_quant.errors import InputError
from qwen_quant.evaluation import report as report_module
from qwen_quant.evaluation.report import SCHEMA, layers_of, read_report, report_text, write_report
from qwen_quant.evaluation.report_html import render_html
from qwen_quant.evaluation.report_numbers import number, percent, points
from qwen_quant.evaluation.report_plots import (
    Chart,
    ForestRow,
    Series,
    forest_plot,
    line_chart,
    linear_ticks,
    log_ticks,
)
from qwen_quant.results import GateOutcome, Interval, ValidationResult, to_json
from tests.support.browser import Page, open_browser
from tests.support.full_report import HOSTILE, full_layers, full_result

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "report.md"
VOID = {"meta", "link", "br", "img", "hr", "input"}
EMPTY = dataclasses.replace(
    full_result(), texts=(), by_length=(), tasks=(), smoke=(), gates=(), warnings=(), versions={}
)


# report.json


@pytest.mark.parametrize("result", [full_result(), EMPTY], ids=["full", "empty"])
def test_round_trip_is_exact(tmp_path: Path, result: ValidationResult) -> None:
    report, page = write_report(result, tmp_path / "new" / "folder")
    assert (report.name, page.name) == ("report.json", "report.html")
    assert read_report(report) == result
    assert sorted(p.name for p in report.parent.iterdir()) == ["report.html", "report.json"]


def test_numbers_keep_every_digit_and_texts_every_character(tmp_path: Path) -> None:
    third = dataclasses.replace(full_result(), seconds=1 / 3, override_reason='行\u2028\u0000\ud800"\\ end')
    assert read_report(write_report(third, tmp_path)[0]) == third


def test_what_is_not_finite_is_named_and_no_bare_nan(tmp_path: Path) -> None:
    wrong = dataclasses.replace(full_result().texts[0], kl_mean=Interval(math.nan, -math.inf, math.inf))
    report, _ = write_report(dataclasses.replace(full_result(), texts=(wrong,)), tmp_path)
    text = report.read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    ends = document["texts"][0]["kl_mean"]
    assert (ends["estimate"], ends["low"], ends["high"]) == ("NaN", "-Infinity", "Infinity")
    back = read_report(report).texts[0].kl_mean
    assert math.isnan(back.estimate) and (back.low, back.high) == (-math.inf, math.inf)


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(report_text(full_result()))
    change(document)
    return json.dumps(document)


DAMAGE = {
    "no such file": (None, "no such file"),
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "bare NaN": ('{"schema": NaN}', "NaN is not a JSON number"),
    "nested without end": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "does not hold a JSON object"),
    "no schema": (changed(lambda d: d.pop("schema")), "it has no key 'schema'"),
    "schema 1": (changed(lambda d: d.update(schema="qwen-quant/report/1")), "its schema is 'qwen-quant/report/1'"),
    "missing key": (changed(lambda d: d.pop("seed")), "key 'seed' is missing"),
    "missing key inside": (
        changed(lambda d: d["texts"][1]["divergence"].pop("kl_p99")),
        "key 'texts[1].divergence.kl_p99' is missing",
    ),
    "a key too many": (changed(lambda d: d["gates"][0].update(extra=1)), "key 'gates[0].extra' does not belong"),
    "text for a number": (changed(lambda d: d.update(seconds="long")), "key 'seconds' is \"long\", not a number"),
    "number for text": (changed(lambda d: d.update(baseline=3)), "key 'baseline' is 3, not text"),
    "true for a number": (changed(lambda d: d["tasks"][0].update(items=True)), "key 'tasks[0].items' is true"),
    "half a token": (changed(lambda d: d["texts"][0].update(tokens=1.5)), "not a whole number"),
    "null for a number": (changed(lambda d: d["tasks"][0].update(p_value=None)), "'tasks[0].p_value' is null"),
    "an object for an array": (changed(lambda d: d.update(texts={})), "key 'texts' is not an array"),
    "an array for an object": (changed(lambda d: d.update(versions=[])), "key 'versions' is not an object"),
    "a triple for a pair": (
        changed(lambda d: d["texts"][0].update(kl_by_position=[[1, 2.0, 3.0]])),
        "key 'texts[0].kl_by_position[0]' holds 3 values instead of 2",
    ),
    "a number beyond floats": (changed(lambda d: d.update(seconds=10**400)), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_file_and_key(tmp_path: Path, name: str) -> None:
    text, words = DAMAGE[name]
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert caught.value.next_step


def test_other_bytes_and_folders_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"bytes\.json is not JSON"):
        read_report(tmp_path / "bytes.json")
    with pytest.raises(InputError, match="it is a folder") as caught:
        read_report(tmp_path)
    assert "report.json" in caught.value.next_step


def test_null_and_whole_numbers_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(changed(lambda d: d.update(seconds=3)), encoding="utf-8")
    result = read_report(path)
    assert result.seconds == 3.0 and isinstance(result.seconds, float)
    assert result.tasks[4].only_baseline_right is None and result.tasks[3].verdict.smallest_detectable is None


def test_writing_replaces_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, page = write_report(full_result(), tmp_path)
    before = report.read_bytes(), page.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("the disk is on fire")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="on fire"):
            patch.setattr(report_module.os, function, fail)
            write_report(EMPTY, tmp_path)
        assert (report.read_bytes(), page.read_bytes()) == before
        assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_hold_a_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot hold a report"):
            write_report(EMPTY, place)
    (tmp_path / "report.json").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        write_report(EMPTY, tmp_path)


def dataclasses_in(kind: Any) -> Iterator[type]:
    """Every dataclass that a type is made of."""
    if dataclasses.is_dataclass(kind):
        yield kind  # type: ignore[misc]
        for hint in get_type_hints(kind).values():
            yield from dataclasses_in(hint)
    for inner in get_args(kind):
        yield from dataclasses_in(inner)


def test_every_field_is_documented() -> None:
    documented = set(re.findall(r"[`\"](\w+)[`\"]", DOCUMENTATION.read_text(encoding="utf-8")))
    for kind in set(dataclasses_in(ValidationResult)):
        for field in dataclasses.fields(kind):
            assert field.name in documented, f"docs/report.md does not say what {kind.__name__}.{field.name} is"
    assert SCHEMA in DOCUMENTATION.read_text(encoding="utf-8")


# layers


def write_manifest(folder: Path, layers: object) -> Path:
    (folder / "qwen-quant.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")
    return folder


def test_layers_come_from_the_artifact(tmp_path: Path) -> None:
    stored = [{k: v for k, v in to_json(layer).items() if k != "seconds"} for layer in full_layers(2)]
    assert layers_of(write_manifest(tmp_path, stored)) == full_layers(2)
    result = dataclasses.replace(EMPTY, quantized=str(tmp_path))
    assert "Error of each layer" in write_report(result, tmp_path / "out")[1].read_text(encoding="utf-8")
    page = write_report(result, tmp_path / "out", layers=())[1]
    assert "Error of each layer" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("layers", [None, 3, [3], [{"name": "x"}], {"a": 1}])
def test_a_manifest_of_another_kind_costs_the_plot_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layers: object
) -> None:
    with caplog.at_level(logging.WARNING):
        assert layers_of(write_manifest(tmp_path, layers)) == ()
    assert "no per-layer plot" in caplog.text
    assert layers_of(tmp_path / "nowhere") == ()


# report.html


class Checker(HTMLParser):
    """Tags balance, nothing is loaded from anywhere, nothing runs."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base", "form"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                assert value == "data:,", value
            self.classes += (value or "").split() if name == "class" else []
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    parser = Checker()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert page.startswith("<!DOCTYPE html>")
    for pattern in (r"@import", r"url\("):
        assert not re.search(pattern, page), pattern
    return parser


def sections(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    parser = check(render_html(full_result(), full_layers()))
    assert "default-src 'none'" in render_html(EMPTY, ())
    text = " ".join(parser.text)
    for words in (
        "1.0412 to 1.0618",
        "86.23%",
        "3.22 GiB",
        "2.13.0",
        "1 h 19 min",
        "sha256 abab",
        "0101" * 16,
        "2323" * 16,
        "KV cache: int8 against plain, on other weights",
    ):
        assert words in text, words


def test_hostile_texts_are_text() -> None:
    page = render_html(full_result(), full_layers())
    parser = check(page)
    assert "<script" not in page and "\x00" not in page and "\x1b" not in page
    shown = "".join(parser.text)
    assert shown.count("<script>alert('x')</script>") >= 5
    assert r"\x00\x1b[31m \u202eabc" in shown and "\u202e" not in page
    for field in ("baseline", "quantized", "baseline_kind", "quantized_kind", "override_reason"):
        check(render_html(dataclasses.replace(full_result(), **{field: HOSTILE}), ()))
    check(render_html(dataclasses.replace(EMPTY, versions={HOSTILE: HOSTILE}, warnings=(HOSTILE,)), ()))
    named = [dataclasses.replace(layer, name=HOSTILE + str(i)) for i, layer in enumerate(full_layers(1))]
    check(render_html(EMPTY, named))
    case = dataclasses.replace(full_result().smoke[0], language='en" onload="x', failures=(HOSTILE,), name=HOSTILE)
    check(render_html(dataclasses.replace(EMPTY, smoke=(case,)), ()))
    text = dataclasses.replace(full_result().texts[0], dataset=HOSTILE, joining=HOSTILE, dataset_sha256=HOSTILE)
    check(render_html(dataclasses.replace(EMPTY, texts=(text,)), ()))


def test_every_plot_is_there() -> None:
    page = render_html(full_result(), full_layers())
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions.count("KL divergence by position in the window") == 2
    for words in ("Perplexity by context length", "Accuracy difference by task, with intervals", "mlp.down_proj"):
        assert words in captions
    assert page.count('<svg class="plot"') == len(captions) == 2 + 1 + 1 + 7
    # Every point is drawn: 64 positions a text, 2 x 6 lengths, 6 tasks, 2 x 7 x 24 layers; a legend has one a curve.
    dots = len(re.findall(r'<circle class="dot', page)) - len(re.findall(r'<span class="key">', page))
    assert dots == 2 * 64 + 12 + 6 + 2 * 7 * 24


def test_blocks_are_whole_numbers() -> None:
    page = render_html(EMPTY, full_layers(4))
    plot = page[page.index("self_attn.q_proj") :].split("</figure>")[0]
    assert re.findall(r'text-anchor="middle">([^<]*)<', plot) == ["0", "1", "2", "3", "block"]
    page = render_html(EMPTY, full_layers(1))
    plot = page[page.index("self_attn.q_proj") :].split("</figure>")[0]
    assert re.findall(r'text-anchor="middle">([^<]*)<', plot) == ["0", "block"]


def test_sections_without_data_are_left_out() -> None:
    assert sections(render_html(EMPTY, ())) == ["This run"]
    assert "<svg" not in render_html(EMPTY, ())
    whole = ["Warnings", "Text: bundled:demo_eval.txt", "Text: bundled:eval_zh.txt", "Perplexity by context length"]
    whole += ["Benchmark tasks", "Error of each layer", "Smoke prompts", "This run"]
    assert sections(render_html(full_result(), full_layers())) == whole
    check(render_html(EMPTY, ()))


def test_the_verdict_comes_first_in_words() -> None:
    result = full_result()
    failed = render_html(result, ())
    assert "Failed: 1 of 3 gates (max_perplexity_ratio on bundled:demo_eval.txt)." in failed
    assert failed.index("Failed: 1 of 3") < failed.index("<h2>")
    assert '<div class="verdict bad">' in failed
    overridden = render_html(dataclasses.replace(result, override_reason="a <b> trial"), ())
    assert "Overridden: 1 of 3 gates failed" in overridden and "a &lt;b&gt; trial" in overridden
    assert '<div class="verdict warn">' in overridden
    held = render_html(dataclasses.replace(result, gates=result.gates[::2]), ())
    assert (
        "Passed: all 2 gates held. A loss was detected, within the limits." in held
        and '<div class="verdict good">' in held
    )
    assert "No limit was set" in render_html(EMPTY, ())
    smoke = dataclasses.replace(result, gates=(GateOutcome("smoke prompts that fail", 0.0, 0.0, True),))
    assert "The smoke prompts pass. No limit was set for any metric" in render_html(smoke, ())
    assert "Passed" not in render_html(smoke, ()).split("<h2>")[0]
    fine = dataclasses.replace(result, gates=result.gates[:1], texts=(), tasks=())
    assert "Passed: the one gate held.</p>" in render_html(fine, ())
    assert "Smoke prompts: 3 of 4 pass (failing: loop)" in failed
    assert "loss: mmlu_abstract_algebra" in failed


def test_figures_that_are_not_finite_do_not_break_the_page() -> None:
    nan = math.nan
    text = dataclasses.replace(
        full_result().texts[0],
        kl_mean=Interval(nan, nan, nan),
        perplexity_ratio=Interval(math.inf, nan, math.inf),
        kl_by_position=((0, nan), (16, 0.2), (32, math.inf)),
    )
    length = dataclasses.replace(full_result().by_length[0], baseline=math.inf, quantized=nan)
    task = dataclasses.replace(full_result().tasks[0], difference=Interval(nan, nan, nan), p_value=nan)
    result = dataclasses.replace(EMPTY, texts=(text,), by_length=(length,), tasks=(task,))
    layers = [dataclasses.replace(layer, relative_error=0.0, rounding_error=nan) for layer in full_layers(2)]
    page = render_html(result, layers)
    check(page)
    assert "2 point(s) without a finite value are not drawn." in page and "not a number" in page
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1023, [0, 500, 1000]), (-3, 3, [-3, -2, -1, 0, 1, 2, 3])],
)
def test_even_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert linear_ticks(low, high, 6 if low else 5 if high == 1 else 3) == ticks


def test_log_ticks() -> None:
    assert log_ticks(3, 600) == [5, 10, 20, 50, 100, 200, 500]
    assert log_ticks(0.9, 1.1e6) == [1, 10, 100, 1000, 10000, 100000, 1000000]
    assert log_ticks(0.03, 0.11) == [0.04, 0.06, 0.08, 0.1]
    for decades in range(1, 300, 13):
        assert 2 <= len(log_ticks(1e-5, 10.0 ** (decades - 5))) <= 8


def test_points_lie_where_their_values_are() -> None:
    chart = Chart("t", "x", "y", (Series("one", "quantized", ((1, 10.0), (10, 100.0), (100, 1000.0))),), True, True)
    found = re.search(r'points="([^"]*)"', line_chart(chart))
    assert found
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in found[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02) and y0 > y1
    rows = [ForestRow("a", "v", -1.0, -3.0, 1.0, "bad-mark"), ForestRow("b", "v", 3.0, 2.0, 4.0, "good-mark")]
    plot = forest_plot("t", "x", rows)
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', plot)[1])  # type: ignore[index]
    dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', plot)]
    assert dots[0] < zero < dots[1] and (zero - dots[0]) * 3 == pytest.approx(dots[1] - zero, abs=0.1)
    assert line_chart(dataclasses.replace(chart, series=())) == "" and forest_plot("t", "x", []) == ""


def test_the_forest_plot_shows_the_intervals_of_the_tasks() -> None:
    page = render_html(dataclasses.replace(EMPTY, tasks=full_result().tasks[:2]), ())
    rows = re.findall(
        r'<line class="whisker [\w-]+" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="\3"/>.*?cx="([\d.]+)"', page
    )
    (low, high, _, middle), (lower, _, _, other) = ([float(v) for v in row] for row in rows)
    points_wide = (high - low) / 5.0  # 2.5 points to either side
    assert middle == pytest.approx((low + high) / 2, abs=0.02)
    assert middle - other == pytest.approx(4.5 * points_wide, abs=0.05)  # -1.6 and -6.1 points
    assert other - lower == pytest.approx(2.5 * points_wide, abs=0.05)


def test_numbers_for_people() -> None:
    assert [number(v) for v in (0, 20.0, 0.083123, 65536.4, 0.0000123, 1000.0)] == [
        "0", "20.00", "0.08312", "65536", "1.23e-05", "1000"
    ]  # fmt: skip
    assert (number(math.nan), number(-math.inf)) == ("not a number", "minus infinite")
    assert (percent(0.91234), points(-0.012), points(0.02)) == ("91.23%", "-1.20", "+2.00")


# In a browser

OVERLAPS = """(() => { const found = [];
  for (const svg of document.querySelectorAll('svg.plot')) {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [text, b] of boxes)
      if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
        found.push('clipped: ' + text);
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [s, a] = boxes[i], [t, b] = boxes[j];
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
        found.push(s + ' over ' + t);
    } }
  return found; })()"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('svg.plot')].map(
  s => 12 * s.getBoundingClientRect().width / s.viewBox.baseVal.width))"""
CUT_TABLES = """[...document.querySelectorAll('.scroll')].filter(
  e => !e.closest('details') && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 80))"""
WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("content", ["full", "empty"])
def test_in_a_browser(tmp_path: Path, browser: Page, content: str, width: int, dark: bool) -> None:
    result, layers = (full_result(), full_layers()) if content == "full" else (EMPTY, ())
    _, page = write_report(result, tmp_path, layers)
    browser.show(page, width, dark=dark)
    shot = tmp_path / f"{content}-{width}-{'dark' if dark else 'light'}.png"
    browser.screenshot(shot)
    assert shot.stat().st_size > 5000, "an empty picture"
    assert browser.of("Log.entryAdded") == [] and browser.of("Runtime.consoleAPICalled") == []
    assert browser.of("Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDER) == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    if content == "full":
        assert browser.evaluate(OVERLAPS) == []
        assert browser.evaluate(SMALLEST_TEXT) >= 9.5
        assert browser.evaluate(CUT_TABLES) == []


@pytest.mark.browser
def test_it_prints(tmp_path: Path, browser: Page) -> None:
    _, page = write_report(full_result(), tmp_path, full_layers())
    browser.show(page, 1200, dark=True)
    browser.pdf(tmp_path / "report.pdf")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 20_000
