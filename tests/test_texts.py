"""Evaluation texts: files, rows and how they are joined, data sets that are not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qwen_quant.errors import InputError
from qwen_quant.evaluation.texts import read_texts


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b" one\r\n\n two \n")
    (found,) = read_texts((str(path),), "|")
    assert (found.text, found.joining) == (" one\r\n\n two \n", "one file")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("array", [False, True])
def test_rows_are_joined_by_what_is_said(tmp_path: Path, array: bool) -> None:
    rows = [{"text": "one", "other": "x"}, {"text": "two", "other": "y"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows) if array else "\n\n".join(map(json.dumps, rows)))
    (found,) = read_texts((str(path),), "\n\n")
    assert (found.text, found.joining) == ("one\n\ntwo", "rows joined by '\\n\\n'")
    (found,) = read_texts((f"{path}#other",), " ")
    assert found.text == "x y"


def test_bundled_names() -> None:
    assert [text.name for text in read_texts(("bundled", "bundled:zh"), "")] == [
        "bundled:en",
        "bundled:zh",
        "bundled:zh",
    ]
    with pytest.raises(InputError, match="no bundled text 'fr'"):
        read_texts(("bundled:fr",), "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{broken', r"not valid JSON \(line 2\)"),
        ('{"text": "a"}\n{"title": "b"}', "row 2 has no text in 'text': it has: title"),
        ("[1, 2]", "row 1 has no text"),
        ("", "is empty"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_texts((str(path),), "")


def test_a_data_set_that_is_not_there_says_what_to_provide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        read_texts(("hub:nobody/nothing:config:test",), "")
    assert "nobody/nothing" in str(caught.value) or "datasets" in str(caught.value)
    assert caught.value.next_step


def test_a_local_copy_of_a_data_set_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "someone" / "texts"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (found,) = read_texts(("hub:someone/texts::test:text",), "-")
    assert found.text == "one-two"
