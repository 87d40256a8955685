"""qwen1_fast.py: the generated tokenizer.json gives the original's ids, on golden strings and on random Unicode."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers
from transformers import AutoTokenizer

from qwen_quant.errors import AuditError, InputError
from qwen_quant.qwen1_fast import (
    bpe_merges,
    fast_tokenizer,
    first_difference,
    generation_settings,
    write_fast_tokenizer,
)
from qwen_quant.qwen1_tokenizer import SPECIAL_TOKENS, Qwen1Tokenizer, load_qwen1_tokenizer
from tests.support.qwen1_vocabulary import CHAT_SETTINGS, golden, write_qwen1_tokenizer, written_files

GOLDEN = golden("tokenizer_golden.json")
EXTRA = golden("tokenizer_extra_vocab.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_qwen1_tokenizer(tmp_path_factory.mktemp("qwen1"))
    (source / "generation_config.json").write_text(json.dumps(CHAT_SETTINGS))
    return source


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Qwen1Tokenizer:
    return load_qwen1_tokenizer(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    for name, data in written_files().items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    return out


@pytest.fixture(scope="module")
def fast(written: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))


def encode(fast: tokenizers.Tokenizer, text: str) -> list[int]:
    return fast.encode(text, add_special_tokens=False).ids


def test_every_golden_string(fast: tokenizers.Tokenizer) -> None:
    for case in GOLDEN["cases"]:
        assert encode(fast, case["text"]) == case["ids"]
        assert fast.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
        assert fast.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]


def random_text(rng: random.Random) -> str:
    """Code points of all planes in runs, mixed with digits, white space, marks and surface forms."""
    pieces = ["\n", "\r\n", "  ", "\t", "\u3000", "7", "12", "'s", "'LL", " the", "量化", "\u0301", "\u0338"]
    pieces += [*random.Random(5).sample(list(SPECIAL_TOKENS), 8), "<|im_end", "<|extra_205|>", ">", "<|"]
    text = ""
    while len(text) < 60:
        if rng.random() < 0.5:
            text += rng.choice(pieces)
            continue
        start = rng.choice([0, 0x250, 0x600, 0xE00, 0x1100, 0x2000, 0x3000, 0x4E00, 0xAC00, 0xFB00, 0x1F300, 0x10FF00])
        points = (start + rng.randrange(0x500) for _ in range(rng.randrange(1, 6)))
        if rng.random() < 0.3:
            points = (rng.randrange(0x110000) for _ in range(4))
        text += "".join(chr(p) for p in points if p < 0x110000 and unicodedata.category(chr(p)) != "Cs")
    return text


def test_agrees_with_tiktoken_on_random_unicode(tokenizer: Qwen1Tokenizer, fast: tokenizers.Tokenizer) -> None:
    rng, same_nfc = random.Random(20231213), normalizers.NFC().normalize_str
    texts = [random_text(rng) for _ in range(3000)]
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    assert first_difference(tokenizer, fast, normal) is None
    known = [text for text, nfc in zip(texts, normal, strict=True) if same_nfc(text) == nfc]
    assert len(known) > 2950  # the others hold marks that are newer than the Unicode of `tokenizers`
    assert first_difference(tokenizer, fast, known) is None
    for text, nfc in zip(texts[:500], normal, strict=False):
        ids = tokenizer.encode(text)
        assert fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == nfc


def test_agrees_with_tiktoken_on_random_bytes_decoded(tokenizer: Qwen1Tokenizer, fast: tokenizers.Tokenizer) -> None:
    rng = random.Random(7)
    for _ in range(300):
        ids = [rng.randrange(151851) for _ in range(rng.randrange(1, 8))]
        assert fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_every_token_is_one_merge(tokenizer: Qwen1Tokenizer) -> None:
    merges = json.loads(written_files()["tokenizer.json"])["model"]["merges"]
    assert len(merges) == len({left + right for left, right in merges}) == 151387 == 151643 - 256
    assert bpe_merges({b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"bab": 4}) == [(b"a", b"b"), (b"b", b"a"), (b"b", b"ab")]


def test_a_token_that_is_no_merge() -> None:
    with pytest.raises(InputError, match="no merge of two"):
        bpe_merges({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_extra_vocabulary_keeps_its_ids(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "extra.tiktoken"
    path.write_text("\n".join(EXTRA["extra_tiktoken"]))
    extended = load_qwen1_tokenizer(folder, extra_vocabulary=path)
    fast = fast_tokenizer(extended)
    fast = tokenizers.Tokenizer.from_str(fast.to_str())
    for case in EXTRA["cases"]:
        assert encode(fast, case["text"]) == case["ids_extra"]
    assert fast.get_vocab_size(with_added_tokens=True) == EXTRA["n_vocab"]


def test_a_wrong_generated_tokenizer_is_never_returned(
    tokenizer: Qwen1Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_quant.qwen1_fast.SPLIT_PATTERN", r"\p{N}+|\P{N}+")
    monkeypatch.setattr("qwen_quant.qwen1_fast.bpe_merges", lambda _: [(b"a", b"b")])
    with pytest.raises(AuditError, match="differs from tiktoken"):
        fast_tokenizer(tokenizer)


def test_transformers_reads_the_written_folder(written: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(written, trust_remote_code=False)
    assert type(loaded).__name__ == "Qwen2Tokenizer"
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (151645, 151643, 8192)
    assert len(loaded) == 151851
    for case in GOLDEN["cases"]:
        assert loaded(case["text"])["input_ids"] == case["ids"]


def test_the_written_template_gives_the_golden_contexts(written: Path) -> None:
    """All whose contents hold no surface form of a special token; the others need `qwen_quant.chat`."""
    loaded = AutoTokenizer.from_pretrained(written, trust_remote_code=False)
    equal = 0
    for case in golden("chat.json")["contexts"]:
        kept = case["raw_text"].count("<|im_start|>assistant\n") - 1
        history = (case["history"] or [])[-kept:] if kept > 0 else []
        contents = [text for turn in history for text in turn] + [case["query"], case["system"]]
        if case["chat_format"] == "raw" or any(name in text for text in contents for name in SPECIAL_TOKENS):
            continue
        messages = [{"role": "system", "content": case["system"]}]
        for asked, answered in history:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": case["query"]})
        assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == case["raw_text"]
        ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == case["context_tokens"]
        equal += 1
    assert equal == 7


def test_generation_settings(folder: Path, tmp_path: Path) -> None:
    chat = generation_settings(folder)
    assert chat["eos_token_id"] == [151645, 151644, 151643]
    assert (chat["top_k"], chat["top_p"], chat["pad_token_id"]) == (0, 0.8, 151643)
    assert "chat_format" not in chat and "max_window_size" not in chat
    assert generation_settings(tmp_path)["eos_token_id"] == 151643
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        generation_settings(tmp_path)


def test_a_folder_without_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"qwen\.tiktoken cannot be read"):
        write_fast_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
