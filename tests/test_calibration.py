"""calibration.py: how rows are packed, what is reported, and every file that cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from qwen_quant.calibration import CalibrationSet, load_calibration
from qwen_quant.errors import InputError
from qwen_quant.recipe import CalibrationConfig
from qwen_quant.tokenizer import Tokenizer, load_tokenizer
from tests.support.checkpoints import write_tokenizer

END_OF_TEXT = 256
CHAT_ROW = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
SHAREGPT_ROW = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bare")
    write_tokenizer(folder, chat_template=False)
    return load_tokenizer(folder)


def load(path: Path, tokenizer: Tokenizer, samples: int = 4, seq_len: int = 16, seed: int = 0) -> CalibrationSet:
    return load_calibration(CalibrationConfig(str(path), samples, seq_len, seed), tokenizer)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_plain_text_gives_consecutive_rows_from_its_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.raw"
    path.write_text("".join(chr(65 + i % 26) for i in range(200)))
    found = load(path, tokenizer, samples=3, seed=9)
    assert found.input_ids.dtype == torch.int64
    assert torch.equal(found.input_ids.flatten(), torch.tensor(tokenizer.encode(path.read_text())[:48]))
    assert (tuple(found.input_ids.shape), found.tokens, found.source) == ((3, 16), 48, str(path))


def test_rows_are_packed_without_padding_and_end_with_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "rows.jsonl", *({"text": letter * 5} for letter in "abcdefgh"))
    found = load(path, tokenizer, samples=3)
    ids = found.input_ids.flatten().tolist()
    assert len(ids) == 48  # 8 documents of 5 letters and a separator fill 3 rows of 16 exactly
    assert all(ids[i] == END_OF_TEXT for i in range(5, 48, 6)) and ids.count(END_OF_TEXT) == 8
    documents = {tokenizer.decode(ids[i : i + 5]) for i in range(0, 48, 6)}
    assert documents == {letter * 5 for letter in "abcdefgh"}
    assert found.documents == 8


def test_the_seed_orders_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "rows.jsonl", *({"text": f"document {i:03d}"} for i in range(60)))
    first, again, other = (load(path, tokenizer, samples=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids) and first.sha256 == again.sha256
    assert not torch.equal(first.input_ids, other.input_ids) and first.sha256 != other.sha256
    assert first.documents < 60


def test_the_hash_covers_the_shape(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x" * 64)
    one, two = load(path, tokenizer, samples=2, seq_len=32), load(path, tokenizer, samples=4, seq_len=16)
    assert torch.equal(one.input_ids.flatten(), two.input_ids.flatten()) and one.sha256 != two.sha256


@pytest.mark.parametrize("row", [CHAT_ROW, SHAREGPT_ROW])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_chat_rows_use_the_chat_template(tmp_path: Path, tokenizer: Tokenizer, row: dict, suffix: str) -> None:
    path = tmp_path / f"chat{suffix}"
    path.write_text(json.dumps([row] * 4) if suffix == ".json" else (json.dumps(row) + "\n\n") * 4)
    expected = [*tokenizer.chat_ids(CHAT_ROW["messages"]), END_OF_TEXT]
    assert load(path, tokenizer).input_ids.flatten()[: len(expected)].tolist() == expected


def test_fewer_tokens_than_asked_are_reported(tmp_path: Path, tokenizer: Tokenizer, caplog) -> None:
    path = tmp_path / "short.txt"
    path.write_text("y" * 40)
    with caplog.at_level(logging.WARNING):
        found = load(path, tokenizer, samples=8)
    assert (tuple(found.input_ids.shape), found.tokens) == ((2, 16), 32)
    assert any("only 32 calibration tokens" in line for line in found.warnings)
    assert any("2 of 8 rows" in line for line in found.warnings)
    assert set(found.warnings) <= {record.getMessage() for record in caplog.records}


def test_less_than_one_row_gives_one_shorter_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("hello")
    assert tuple(load(path, tokenizer).input_ids.shape) == (1, 5)


def test_enough_tokens_do_not_warn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "long.txt"
    path.write_text("z" * 20000)
    assert load(path, tokenizer, samples=16, seq_len=1024).warnings == ()


def test_bundled(tokenizer: Tokenizer) -> None:
    found = load_calibration(CalibrationConfig(num_samples=8, seq_len=64), tokenizer)
    assert (found.tokens, found.source) == (512, "bundled")
    assert not any("chat template" in line for line in found.warnings)


def test_bundled_chats_become_text_with_a_warning_where_there_is_no_template(bare: Tokenizer) -> None:
    found = load_calibration(CalibrationConfig(num_samples=8, seq_len=64), bare)
    assert any("no chat template" in line for line in found.warnings)
    assert "<|im_start|>" not in bare.decode(found.input_ids.flatten().tolist())


def test_a_users_chat_file_needs_a_template(tmp_path: Path, bare: Tokenizer) -> None:
    path = lines(tmp_path / "chat.jsonl", CHAT_ROW)
    with pytest.raises(InputError, match=r"row 1 .*no chat template") as caught:
        load(path, bare)
    assert "chat_template" in caught.value.next_step


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "odd.jsonl", {"text": "one\u2028two\x85three"})
    assert load(path, tokenizer).documents == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b" \n\n", "is empty"),
        ("nothing.json", b"[]", "no text"),
        ("notext.jsonl", b'{"text": ""}\n', "no text"),
        ("list.json", b'{"text": "x"}', "does not hold a list"),
        ("broken.json", b'[{"text": "x"},\n{"text": }]', r"broken.json.*line 2"),
        ("broken.jsonl", b'{"text": "fine"}\n\n{"text": \n', "row 3 is malformed"),
        ("scalar.jsonl", b'{"text": "fine"}\n7\n', "row 2 is malformed: it is not a JSON object"),
        ("keys.json", b'[{"text": "fine"}, {"prompt": "x"}]', "row 2 is malformed: it has neither"),
        ("number.jsonl", b'{"text": 5}\n', "row 1 is malformed"),
        ("turns.jsonl", b'{"messages": []}\n', "row 1 is malformed: 'messages' is not a list of turns"),
        ("turn.jsonl", b'{"messages": [{"role": "user"}]}\n', "row 1 is malformed: a turn lacks"),
        ("from.jsonl", b'{"conversations": [{"from": "human", "value": null}]}\n', "row 1 is malformed: a turn lacks"),
        ("latin.txt", "first\nsecond\ncaf\xe9".encode("latin-1"), "latin.txt: line 3 is not UTF-8"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "latin.jsonl: line 2 is not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / name, tokenizer)
    assert caught.value.exit_code == 3


def test_a_missing_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl does not exist"):
        load(tmp_path / "nowhere.jsonl", tokenizer)


def test_a_folder_is_not_a_calibration_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError):
        load(tmp_path, tokenizer)
