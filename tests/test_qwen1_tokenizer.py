"""qwen1_tokenizer.py against what the original tokenizer gave, and vocabulary files that are not the one."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest

from qwen_quant.errors import InputError, UsageError
from qwen_quant.qwen1_tokenizer import (
    SPECIAL_TOKENS,
    Qwen1Tokenizer,
    load_qwen1_tokenizer,
    rank_lines,
    read_extra_tokens,
    read_vocabulary,
)
from tests.support.qwen1_vocabulary import golden, vocabulary_bytes, write_qwen1_tokenizer

GOLDEN = golden("tokenizer_golden.json")
EXTRA = golden("tokenizer_extra_vocab.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen1_tokenizer(tmp_path_factory.mktemp("qwen1"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Qwen1Tokenizer:
    return load_qwen1_tokenizer(folder)


def test_sizes_and_special_ids(tokenizer: Qwen1Tokenizer) -> None:
    assert dict(SPECIAL_TOKENS) == GOLDEN["special_tokens"]
    assert len(tokenizer) == GOLDEN["len_tokenizer"] == 151851


def test_every_golden_string(tokenizer: Qwen1Tokenizer) -> None:
    assert len(GOLDEN["cases"]) == 300
    for case in GOLDEN["cases"]:
        text, ids = case["text"], case["ids"]
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, allowed_special=()) == tokenizer.encode_text(text) == case["ids_no_special"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


def test_disallowed_surface_forms_are_refused(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["cases"]:
        if case["disallowed_all_raises"]:
            with pytest.raises(InputError, match="disallowed"):
                tokenizer.encode(case["text"], allowed_special=(), disallowed_special="all")
        else:
            assert (
                tokenizer.encode(case["text"], allowed_special=(), disallowed_special="all") == case["ids_no_special"]
            )


def test_subsets_of_special_tokens(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["allowed_special_subsets"]:
        assert tokenizer.encode(case["text"], allowed_special=case["allowed_special"]) == case["ids"]


def test_cut_utf8_is_replaced_or_ignored(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["partial_decode"]:
        assert tokenizer.decode(case["ids"], errors="replace") == case["replace"]
        assert tokenizer.decode(case["ids"], errors="ignore") == case["ignore"]
    with pytest.raises(InputError, match="not UTF-8"):
        tokenizer.decode([131], errors="strict")
    with pytest.raises(UsageError, match="error mode"):
        tokenizer.decode([131], errors="guess")


def test_token_surfaces(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["token_surfaces"]:
        data, token = base64.b64decode(case["bytes_b64"]), tokenizer.token(case["id"])
        assert token == (data.decode() if case["special"] else data)
        assert tokenizer.id_of(token) == case["id"]


@pytest.mark.parametrize("index", [151851, 151935, -1, 2**40])
def test_ids_without_a_token(tokenizer: Qwen1Tokenizer, index: int) -> None:
    with pytest.raises(InputError, match="151851"):
        tokenizer.decode([index])


def test_lone_surrogates_and_pickle(tokenizer: Qwen1Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode_text("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("量化<|im_end|>") == tokenizer.encode("量化<|im_end|>")


def test_extra_vocabulary(folder: Path, tokenizer: Qwen1Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "extra.tiktoken"
    path.write_text("\n".join(EXTRA["extra_tiktoken"]))
    extended = load_qwen1_tokenizer(folder, extra_vocabulary=path)
    assert len(extended) == EXTRA["n_vocab"]
    for case in EXTRA["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids_base"]
        assert extended.encode(case["text"]) == case["ids_extra"]
        assert extended.decode(case["ids_extra"]) == case["decoded"]


def test_skipping_special_tokens_keeps_extra_ones(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "extra.tiktoken"
    path.write_text("\n".join(EXTRA["extra_tiktoken"]))
    extended = load_qwen1_tokenizer(folder, extra_vocabulary=path)
    assert extended.decode([151863, 151645], skip_special_tokens=True) == "我是一只猫"


def test_extra_lines_that_are_taken_are_left_out_and_gaps_refused(
    tokenizer: Qwen1Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "extra.tiktoken"
    path.write_bytes(b"YQ== 151851\n" + base64.b64encode(b"qwenish") + b" 151645\n" + b"cXdlbg== 151852")
    with pytest.raises(InputError, match="gap"):
        read_extra_tokens(path, tokenizer.ranks)
    assert "2 tokens exist already" in caplog.text
    path.write_bytes(b"YQ== 151852\ncXdlbg== 151851\n")
    assert read_extra_tokens(path, tokenizer.ranks) == {b"qwen": 151851}


def test_rank_lines_give_the_file_back(tokenizer: Qwen1Tokenizer) -> None:
    assert rank_lines(tokenizer.ranks) == vocabulary_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "151642 tokens"),
        (lambda data: data.replace(b" 300\n", b" 151643\n"), "sha256"),
        (lambda data: data.replace(b" 300\n", b" 301\n"), "line 302 repeats"),
        (lambda data: data[:1000] + b"\xff\xfe" + data[1000:], "is not 'base64 rank'"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:b2b1\nsize 2561218\n", "LFS pointer"),
        (lambda _: b"", "0 tokens"),
    ],
)
def test_files_that_are_not_the_vocabulary(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(change(vocabulary_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_vocabulary(path)
    assert caught.value.next_step


def test_a_missing_file_and_other_line_ends(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_qwen1_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(vocabulary_bytes().replace(b"\n", b"\r\n"))
    assert len(load_qwen1_tokenizer(tmp_path)) == 151851
