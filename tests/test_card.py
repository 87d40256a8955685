"""The model card: golden cards, metadata as the Hub reads it, numbers of the evidence only, hand-written text kept."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from qwen_quant import cli
from qwen_quant.checkpoint.families import FAMILIES
from qwen_quant.checkpoint.identity import weights_sha256, weights_sha256_of
from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import read_report, report_text
from qwen_quant.hub import card_words
from qwen_quant.hub.card import add_evidence, card_problems, make_card, write_card
from qwen_quant.hub.card_markdown import code, escape, fence, signed
from qwen_quant.hub.card_source import SourceCard, read_source_card, source_card, with_licence
from qwen_quant.hub.card_state import CardRequest
from qwen_quant.inspection import inspect_path
from qwen_quant.results import GateOutcome
from qwen_quant.units import format_bytes, format_count, format_seconds
from tests.support import card as evidence
from tests.support.full_report import HOSTILE, full_result

GOLDEN = Path(__file__).parent / "golden" / "card"
UPDATE = "QWEN_QUANT_UPDATE_GOLDEN"
REPO = "acme/Qwen2-tiny-Int4"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w.]*\w)")
# Numbers that are typed, as parts of names and terms: the 16 of "16-bit" has a hyphen and the FP16 of a flag letters.
TYPED = {"256"}  # max_new_tokens of the example: part of a program, not a measurement


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evidence.make_card_folder(tmp_path_factory.mktemp("card") / "artifact", with_report=evidence.report())


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "artifact")
    return tmp_path / "artifact"


def text_of(folder: Path, language: str = "en", **changes: Any) -> str:
    return make_card(folder, CardRequest(language, **{"repo_id": REPO, **changes})).read_text(encoding="utf-8")


def set_report(folder: Path, **changes: Any) -> None:
    (folder / "report.json").write_text(report_text(evidence.report(**changes)), encoding="utf-8")


def set_manifest(folder: Path, **changes: Any) -> None:
    (folder / "qwen-quant.json").write_text(json.dumps(evidence.manifest(folder, **changes)))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_golden_card(folder: Path, language: str) -> None:
    found, path = text_of(folder, language), GOLDEN / f"{language}.md"
    if os.environ.get(UPDATE):
        path.write_text(found, encoding="utf-8")
    wanted = path.read_text(encoding="utf-8")
    difference = "\n".join(
        difflib.unified_diff(wanted.splitlines(), found.splitlines(), "golden", "found", lineterm="")
    )
    assert found == wanted, f"{difference}\n({UPDATE}=1 accepts it)"


def test_the_hubs_own_reader_takes_the_metadata(folder: Path) -> None:
    card = ModelCard(text_of(folder, "both"))
    data = card.data
    assert data.base_model == "Qwen/Qwen2-tiny" and data["base_model_relation"] == "quantized"
    assert (data.license, data.license_name, data.license_link) == ("other", "tongyi-qianwen", "LICENSE")
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"gptq", "int4", "4-bit", "qwen2", "quantized", "qwen-quant"} <= set(data.tags)
    assert data["quantized_by"] == "acme" and data.model_name == "Qwen2-tiny-Int4"
    values = {(row.dataset_type, row.metric_type): row.metric_value for row in data.eval_results}
    assert values["wiki.test.raw", "perplexity"] == 24.317
    assert values["Salesforce/wikitext", "kl_divergence"] == 0.0837
    assert values["mmlu", "accuracy"] == 0.5261
    wikitext = next(row for row in data.eval_results if row.dataset_type == "Salesforce/wikitext")
    assert (wikitext.dataset_config, wikitext.dataset_split) == ("wikitext-2-raw-v1", "test")
    # What the Hub's schema of a model-index asks for, and what its reader makes of it again.
    for result in metadata_load(folder / "README.md")["model-index"][0]["results"]:
        assert isinstance(result["task"]["type"], str)
        assert isinstance(result["dataset"]["type"], str) and isinstance(result["dataset"]["name"], str)
        assert all(isinstance(m["type"], str) and isinstance(m["value"], float) for m in result["metrics"])
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def numbers_in(text: str) -> Iterator[str]:
    """Number tokens of a card's page: not the metadata, comments, hashes, or names such as v1 and Qwen2."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).replace("\\", "").replace("&#", "")
    for found in NUMBER.finditer(body):
        yield found[0].lstrip("+")


def evidence_numbers(folder: Path) -> tuple[list[float], set[str]]:
    """Every number of the evidence, and every number token of its texts, versions, sizes, times and counts."""
    values: list[float] = []
    words: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(key)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
            values.append(float(len(value)))
        elif isinstance(value, str):
            words.update(NUMBER.findall(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            values.append(float(value))

    for name in ("report.json", "profile.json", "qwen-quant.json", "config.json"):
        walk(json.loads((folder / name).read_text(encoding="utf-8")))
    for value in list(values):
        shown = [format_seconds(value), format_bytes(value)] + ([format_count(int(value))] if value >= 1 else [])
        words.update(token for text in shown for token in NUMBER.findall(text))
    return values, words


def unexplained(folder: Path, text: str) -> set[str]:
    """Numbers of the card that are no rounding of a number of the evidence, or of it in percent or GiB."""
    values, words = evidence_numbers(folder)
    manifest = read_manifest(folder)
    counts = {str(list(manifest["audit"]["kept"].values()).count(why)) for why in manifest["audit"]["kept"].values()}
    linears = [layer["name"].split(".", 3)[3] for layer in manifest["layers"]]
    counts |= {str(linears.count(kind)) for kind in linears}
    passed = str(sum(not case["failures"] for case in json.loads((folder / "report.json").read_text())["smoke"]))
    read = inspect_path(folder)  # parameters are counted from the headers
    counts |= set(NUMBER.findall(f"{format_count(read.parameters)} {format_count(read.quantized_parameters)}"))
    known = words | counts | TYPED | {passed}
    scaled = [value * scale for value in values for scale in (1, 100, 2**-30)]
    strange = set()
    for token in numbers_in(text):
        digits = len(token.partition(".")[2])
        near = (abs(float(token) - value) <= 0.5 * 10**-digits + 1e-9 for value in scaled)
        if token not in known and not any(near):
            strange.add(token)
    return strange


def test_every_number_is_one_of_the_evidence(folder: Path) -> None:
    text = text_of(folder, "both")
    assert len(set(numbers_in(text))) > 80
    assert not unexplained(folder, text)
    assert unexplained(folder, text + "\n73.42 tokens") == {"73.42"}, "the search itself finds nothing"


def test_numbers_follow_the_evidence(folder: Path) -> None:
    before = set(numbers_in(text_of(folder)))
    assert {"52.6", "24.32", "0.0837", "42.37", "1234"} - before == {"1234"}
    tasks = (evidence.task("mmlu", 0.5393, 0.5111, 5),)
    set_report(folder, tasks=tasks)
    after = set(numbers_in(text_of(folder)))
    assert "51.1" in after and "52.6" not in after and "40.2" not in after


def test_what_is_not_measured_is_left_out(folder: Path) -> None:
    (folder / "profile.json").unlink()
    set_report(folder, tasks=(), smoke=(), gates=())
    text = text_of(folder)
    assert "## Speed" not in text and "## Peak memory" not in text and "KV cache" not in text
    assert "### Benchmarks" not in text and "MMLU" not in text
    assert "No benchmark tasks were run" in text and "No quality gate was set" in text
    (folder / "report.json").unlink()
    text = text_of(folder)
    assert "## Quality" not in text and "| Perplexity" not in text and "model-index" not in text
    assert "The quality of this artifact was not measured." in text
    assert not re.search(r"\b(None|nan|NaN)\b|[{}]", re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL))


def test_tables_have_the_form_of_the_published_cards(folder: Path) -> None:
    text = text_of(folder)
    assert "| Quantization | MMLU (5-shot) | GSM8K (8-shot) | C-Eval (val) (0-shot) |" in text
    assert "| BF16 | 53.9 | 41.2 | 54.3 |" in text and "| Int4 | 52.6 | 40.2 | 54.7 |" in text
    assert "| Quantization | Speed (2048 tokens) | Speed (8192 tokens) |" in text
    assert "| Int4 | 42.37 (42.06 to 42.80) | ~42.51 (42.20 to 42.94) |" in text
    assert "| Quantization | Encoding 2048 tokens | Generating 8192 tokens |" in text
    assert "| BF16, `bf16` cache | 10.61 GiB | OOM |" in text
    assert "55.37" not in text, "a model of somebody else is in the profile and must not be in the card"


def test_folders_of_the_maker_are_not_told(folder: Path) -> None:
    assert "secret" not in text_of(folder, "both") and "/home" not in text_of(folder, "both")


def test_failed_gates_are_told_at_the_top_with_the_reason(folder: Path) -> None:
    set_report(folder, gates=(GateOutcome("min_top1 on wiki.test.raw", 0.9001, 0.8319, False),))
    text = text_of(folder)
    assert text.index("Published although a quality gate failed") < text.index("## At a glance")
    assert "No reason was given." in text and "**FAILED**" in text
    assert any("failed and no reason" in problem for problem in card_problems(folder))
    write_card(folder, repo_id=REPO, language="zh", override_reason="chat use <only>")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "理由：chat use &lt;only&gt;" in text and not card_problems(folder)
    assert "No reason was given." in text_of(folder), "a reason is for one report and is not carried to the next card"


def test_hand_written_text_survives_byte_for_byte(folder: Path) -> None:
    text_of(folder)
    path = folder / "README.md"
    mine = b"\r\n# Mine\r\n\r\n| a | b |\n\n\xff\xfe not UTF-8 {braces} <!-- a comment -->\n  \n"
    data = path.read_bytes()
    for name in (b"intro-en", b"notes-en"):
        mark = b"<!-- qwen-quant:begin %s: text up to the end mark is kept -->\n" % name
        assert data.count(mark) == 1
        data = data.replace(mark, mark + mine)
    path.write_bytes(data)
    set_report(folder, tasks=())
    for language in ("en", "both", "both"):
        make_card(folder, CardRequest(language, repo_id=REPO))
        assert path.read_bytes().count(mine) == 2
    with pytest.raises(InputError, match="hand-written text in 'intro-en'"):
        make_card(folder, CardRequest("zh", repo_id=REPO))
    assert path.read_bytes().count(mine) == 2
    assert not card_problems(folder)


def test_text_without_a_last_line_end_is_kept_when_people_edit_the_marks(folder: Path) -> None:
    text = text_of(folder)
    begin, end = "<!-- qwen-quant:begin notes-en", "<!-- qwen-quant:end notes-en -->"
    for damaged, why in (
        (text.replace(end, ""), "has no end"),
        (text.replace(end, end + "\n" + end), "has no partner"),
        (text.replace(begin, "<!-- qwen-quant:begin intro-en"), "has no partner"),
    ):
        (folder / "README.md").write_text(damaged)
        with pytest.raises(InputError, match=why):
            make_card(folder, CardRequest())
        assert (folder / "README.md").read_text() == damaged
        assert any("marked places are damaged" in problem for problem in card_problems(folder))


def test_a_readme_of_somebody_else_is_never_lost(folder: Path) -> None:
    theirs = "---\nlicense: mit\n---\n# Hand-made\n\nWords.\n"
    (folder / "README.md").write_text(theirs)
    with pytest.raises(InputError, match=r"README.md was not written by qwen-quant") as refused:
        write_card(folder, repo_id=None, language="en")
    assert f"qwen-quant card {folder} --force" in refused.value.next_step  # push has no such option
    assert (folder / "README.md").read_text() == theirs
    assert card_problems(folder) == ["README.md was not written by qwen-quant card"]
    text = text_of(folder, force=True)
    assert "-->\n# Hand-made\n\nWords.\n<!-- qwen-quant:end notes-en -->" in text and "license: mit" not in text
    assert text_of(folder) == text


def test_writing_again_changes_nothing_and_keeps_what_was_asked(folder: Path) -> None:
    text = text_of(folder, "both", base_model="Qwen/Other")
    again = make_card(folder, CardRequest()).read_text(encoding="utf-8")
    assert again == text and REPO in again and "base_model: Qwen/Other" in again
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## English", "## 中文"]
    assert "[English](#english) | [中文](#中文)" in text


def test_evidence_and_card_are_sealed(folder: Path) -> None:
    text_of(folder)
    hashes = read_manifest(folder)["output"]["sha256"]
    assert set(hashes) >= {"README.md", "report.json", "profile.json"} and not card_problems(folder)
    assert {name: hashes[name] for name in evidence.OUTPUT} == evidence.OUTPUT


def test_problems_name_what_is_missing_or_untrue(folder: Path) -> None:
    assert card_problems(folder) == ["there is no README.md: run qwen-quant card"]
    text = text_of(folder)
    path = folder / "README.md"
    path.write_text(text.replace("24.32", "22.32"))
    problems = card_problems(folder)
    assert {"At a glance", "Perplexity"} == {re.findall("'(.*?)'", line)[0] for line in problems if "evidence" in line}
    assert any(line.startswith("README.md is not the file that the manifest records") for line in problems)
    path.write_text(text.replace("license: other", "license: mit"))
    assert "'the metadata' of README.md" in card_problems(folder)[0]
    path.write_text(text)
    set_report(folder, quantized_sha256="00" * 32)
    assert "report of another artifact" in card_problems(folder)[0]
    (folder / "report.json").unlink()
    assert any("there is no report.json" in line for line in card_problems(folder))
    (folder / "README.md").write_text(text.replace('qwen-quant:card {"', 'qwen-quant:card {{"'))
    assert "is damaged" in card_problems(folder)[0]


def test_a_report_or_profile_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "report.json"
    other.write_text(report_text(evidence.report(quantized_sha256="00" * 32)))
    with pytest.raises(InputError, match="is the report of another artifact"):
        add_evidence(folder, report=other)
    other.write_text(report_text(evidence.report(baseline_sha256="00" * 32)))
    with pytest.raises(InputError, match="compares with another model than the source"):
        add_evidence(folder, report=other)
    document = json.loads((folder / "profile.json").read_text())
    document["models"][1]["sha256"] = "00" * 32
    (tmp_path / "profile.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="is the profile of another artifact"):
        add_evidence(folder, profile=tmp_path / "profile.json")
    del document["models"][1]["kind"]
    (tmp_path / "profile.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="is damaged"):
        add_evidence(folder, profile=tmp_path / "profile.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_hash_from_the_manifest_is_that_of_the_folder(folder: Path) -> None:
    from qwen_quant.checkpoint.reader import file_sha256

    hashes = {path.name: file_sha256(path) for path in folder.iterdir()}
    assert weights_sha256_of(hashes) == weights_sha256(folder)
    assert weights_sha256_of({"config.json": "00" * 32}) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"bits": 5}},
        {"settings": []},
        {"audit": None},
        {"calibration": {"shape": [1]}},
        {"layers": [{"name": "x"}]},
        {"method": "convert"},
        {"method": None},
    ],
)
def test_a_damaged_manifest_is_an_error_and_no_card(folder: Path, changes: dict[str, Any]) -> None:
    set_manifest(folder, **changes)
    with pytest.raises(InputError):
        text_of(folder)
    assert not (folder / "README.md").exists()


def test_hostile_names_stay_text(folder: Path) -> None:
    link = "[click](javascript:alert(1)) ![x](http://evil.example/a.png) `code` | cell\n# Title\n| a |\n@u www.evil.io"
    result = full_result()
    texts = tuple(
        dataclasses.replace(text, dataset=name) for text, name in zip(result.texts, (HOSTILE, link), strict=True)
    )
    gates = (GateOutcome(f"max_kl on {link}", 0.1, 0.2, False), GateOutcome(HOSTILE, 0.1, 0.2, False))
    set_report(folder, texts=texts, tasks=result.tasks, warnings=(HOSTILE, link), gates=gates, override_reason=link)
    set_manifest(
        folder,
        source={"id": f"x{HOSTILE}", "revision": f"`{HOSTILE}", "sha256": evidence.SOURCE},
        warnings=[f"--> {HOSTILE}", "{0} {name}"],
        versions={HOSTILE: link},
    )
    text = text_of(folder, "both")
    page = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").parse(page)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    html = [token.content for token in flat if token.type in ("html_inline", "html_block")]
    assert html and all(
        part.strip().startswith("<!-- qwen-quant:") for block in html for part in block.splitlines() if part
    )
    links = {token.attrGet("href") for token in flat if token.type == "link_open"}
    assert links == {"#english", "#%E4%B8%AD%E6%96%87"} and not [token for token in flat if token.type == "image"]
    seen = re.sub(r"<!--.*?-->|^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?i)(https?://|www\.)evil", seen), "the Hub makes links of bare addresses"
    headings = [after.content for token, after in zip(flat, flat[1:], strict=False) if token.type == "heading_open"]
    assert "Title" not in headings
    assert metadata_load(folder / "README.md")["tags"]
    assert not [
        problem for problem in card_problems(folder) if "licence" not in problem and "source's id" not in problem
    ]


def test_markdown_pieces() -> None:
    assert escape("a<b>&*_`|[]\n\tc\u202e\x00") == r"a&lt;b&gt;&amp;\*\_\`\|\[\] c"
    assert code("a b") == "`a b`" and code("a|b") == r"a\|b" and code("") == ""
    assert fence("x", "```\na\n````") == "`````x\n```\na\n````\n`````"
    assert [signed(x, 1) for x in (1.26, -1.26, 0.01, -0.01)] == ["+1.3", "-1.3", "0.0", "-0.0"]


def test_licence_from_metadata_or_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://example.org/L\n"
        "language: [en, zh, no]\ntags: [chat, 'region:us']\npipeline_tag: text-generation\n---\nWords\n"
    )
    card = read_source_card(tmp_path / "README.md")
    assert card is not None
    assert (card.license, card.license_name, card.language, card.tags) == (
        "other",
        "qwen-research",
        ("en", "zh"),
        ("chat",),
    )
    for text, wanted in (
        ("  Apache License\n  Version 2.0, January 2004", ("apache-2.0", "", "")),
        ("MIT License\n\nCopyright", ("mit", "", "")),
        ("Qwen LICENSE AGREEMENT", ("other", "qwen", "LICENSE")),
        ("Qwen RESEARCH LICENSE AGREEMENT", ("other", "qwen-research", "LICENSE")),
        ("Tongyi Qianwen RESEARCH LICENSE AGREEMENT", ("other", "tongyi-qianwen-research", "LICENSE")),
        ("Some House's Own Terms", ("other", "some-house-s-own-terms", "LICENSE")),
    ):
        (tmp_path / "LICENSE").write_text(text)
        found = with_licence(SourceCard(), tmp_path)
        assert (found.license, found.license_name, found.license_link) == wanted
        assert with_licence(card, tmp_path).license_name == "qwen-research", "metadata comes first"
    assert source_card({"license": 3, "language": None, "tags": {"a": 1}}) == SourceCard()
    (tmp_path / "README.md").write_text("---\n- a: [\n---\n")
    assert read_source_card(tmp_path / "README.md") is None
    assert read_source_card(tmp_path / "absent.md") is None


def test_the_sources_own_card_is_found_beside_the_measured_baseline(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "baseline"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [zh]\ntags: [chat]\n---\n")
    set_report(folder, baseline=str(source))
    data = ModelCard(text_of(folder)).data
    assert data.license == "apache-2.0" and data.language == ["zh"] and data.tags[0] == "chat"
    shutil.rmtree(source)
    assert ModelCard(text_of(folder)).data.language == ["zh"], "an earlier card remembers"


def test_words_of_both_languages_fit_together() -> None:
    fields = [
        {name for _, name, _, _ in Formatter().parse(text) if name}
        for pair in card_words.TEXTS.values()
        for text in pair
    ]
    assert fields[::2] == fields[1::2]
    hub = Path(card_words.__file__).parent
    paths = [*hub.glob("card*.py"), *hub.glob("export*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    uses = {key: len(re.findall(f"['\"]{key}['\"]", sources)) for key in card_words.TEXTS}
    unused = [key for key, count in uses.items() if count < 2 and not key.startswith("method_")]
    assert not unused
    reasons = {reason for family in FAMILIES.values() for _, reason in family.keep_rules}
    assert reasons <= set(card_words.PHRASES_ZH), "say it in Chinese too: PHRASES_ZH of hub/card_words.py"
    assert "\u2014" not in "".join(text for pair in card_words.TEXTS.values() for text in pair)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "elsewhere.json"
    (folder / "report.json").rename(moved)
    assert cli.run(["card", str(folder), "--report", str(moved), "--repo", REPO, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["copied"] == ["report.json"] and document["problems"] == []
    given, published = read_report(moved), read_report(folder / "report.json")
    assert "/home/somebody" in moved.read_text() and "/home/somebody" not in (folder / "report.json").read_text()
    assert (published.baseline, published.quantized) == ("Qwen2-tiny", "artifact")
    assert published.texts[0].dataset == "wiki.test.raw" and published.texts[0].kl_mean == given.texts[0].kl_mean
    assert [gate.name for gate in published.gates] == ["max_kl on wiki.test.raw"]
    assert "secret" not in (folder / "profile.json").read_text()
    for arguments, code_ in (
        (["--repo", "no repository"], 3),
        (["--base-model", "a/b@main"], 3),
        (["--card-language", "fr"], 2),
        (["--report", str(tmp_path / "absent.json")], 3),
        (["--profile", str(moved)], 3),
    ):
        assert cli.run(["card", str(folder), *arguments]) == code_
        assert "Traceback" not in capsys.readouterr().err
    assert cli.run(["card", str(tmp_path)]) == 3
