"""qwen1_auto.py: transformers' AutoTokenizer reads published folders without their code, with the original's ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto import tokenization_auto

from qwen_quant.chat import make_context
from qwen_quant.errors import InputError
from qwen_quant.qwen1_auto import QWenTokenizer, register_auto_tokenizer
from tests.support.qwen1_vocabulary import golden, write_qwen1_tokenizer

GOLDEN = golden("tokenizer_golden.json")
EXTRA = golden("tokenizer_extra_vocab.json")


class FirstGenerationConfig(PretrainedConfig):
    model_type = "qwen-for-this-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen1_tokenizer(tmp_path_factory.mktemp("qwen1"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(folder)


def test_every_golden_string(tokenizer: QWenTokenizer) -> None:
    for case in GOLDEN["cases"]:
        text, ids = case["text"], case["ids"]
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == ids
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == case["decoded"]
        assert tokenizer(text, allowed_special=set())["input_ids"] == case["ids_no_special"]
        assert tokenizer.encode(text, split_special_tokens=True) == case["ids_no_special"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 151851


def test_batches_pad_and_truncate(tokenizer: QWenTokenizer) -> None:
    tokenizer.padding_side = "left"
    batch = tokenizer(["a", "", "量化缓存<|im_end|>"], padding=True, return_tensors="pt")
    longest = tokenizer.encode("量化缓存<|im_end|>")
    assert batch["input_ids"].tolist()[2] == longest
    assert batch["input_ids"].tolist()[0] == [151643] * (len(longest) - 1) + [64]
    assert batch["attention_mask"].tolist()[1] == [0] * len(longest)
    assert tokenizer("a b c d", truncation=True, max_length=2)["input_ids"] == tokenizer.encode("a b c d")[:2]
    assert tokenizer("")["input_ids"] == []
    tokenizer.padding_side = "right"


def test_the_template_gives_every_golden_context(tokenizer: QWenTokenizer) -> None:
    for case in golden("chat.json")["contexts"]:
        if case["chat_format"] == "raw":
            continue
        kept = case["raw_text"].count("<|im_start|>assistant\n") - 1
        messages = [{"role": "system", "content": case["system"]}]
        for asked, answered in (case["history"] or [])[-kept:] if kept > 0 else []:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": case["query"]})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        out = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert (text, out["input_ids"]) == (case["raw_text"], case["context_tokens"])


def test_template_batches_default_system_and_tensors(tokenizer: QWenTokenizer) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("\n\nHi", "你好<|im_end|>")]
    expected = [
        make_context(tokenizer.qwen1, chat[0]["content"], system="You are a helpful assistant.").ids for chat in chats
    ]
    out = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert out == expected
    tensor = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, return_tensors="pt")
    assert tensor["input_ids"].tolist() == [expected[0]]
    own = tokenizer.apply_chat_template(chats[0], chat_template="{{ messages[0]['content'] }}", return_dict=False)
    assert own == tokenizer.encode("\n\nHi")


def test_sanitized_contents_of_another_template_hold_no_special_token(tokenizer: QWenTokenizer) -> None:
    chat = [{"role": "user", "content": "a<|im_end|>b"}]
    template = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    ids = tokenizer.apply_chat_template(chat, chat_template=template, sanitize_control_tokens=True, return_dict=False)
    assert ids == [151644, *tokenizer.qwen1.encode_text("a<|im_end|>b"), 151645]


def test_saved_and_read_again(tokenizer: QWenTokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "plain")
    again = QWenTokenizer.from_pretrained(tmp_path / "plain")
    assert again.encode("量化 <|extra_7|>") == tokenizer.encode("量化 <|extra_7|>")
    path = tmp_path / "extra.tiktoken"
    path.write_text("\n".join(EXTRA["extra_tiktoken"]))
    extended = QWenTokenizer.from_pretrained(folder, extra_vocab_file=str(path))
    extended.save_pretrained(tmp_path / "extended")
    again = QWenTokenizer.from_pretrained(tmp_path / "extended")
    for case in EXTRA["cases"]:
        assert extended.encode(case["text"]) == again.encode(case["text"]) == case["ids_extra"]


def test_new_tokens_are_refused(tokenizer: QWenTokenizer, folder: Path) -> None:
    assert tokenizer.add_special_tokens({"bos_token": "<|extra_0|>"}) == 0
    with pytest.raises(InputError, match="cannot take the new token '<pad>'"):
        QWenTokenizer.from_pretrained(folder, pad_token="<pad>")


def test_settings_of_the_first_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_qwen1_tokenizer(tmp_path)
    settings = {"model_max_length": 2048, "add_more_sp_tokens": True, "add_bos_token": False, "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = QWenTokenizer.from_pretrained(tmp_path)
    assert "August 2023" in caplog.text
    assert tokenizer.encode("<|im_start|>a<extra_0>")[0] == 151644
    assert tokenizer.model_max_length == 2048


def test_auto_tokenizer_uses_it_and_never_the_folders_code(folder: Path) -> None:
    config = FirstGenerationConfig()
    registered = dict(tokenization_auto.REGISTERED_TOKENIZER_CLASSES)
    register_auto_tokenizer(FirstGenerationConfig)
    try:
        for trust in (None, False):
            loaded = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust)
            assert type(loaded) is QWenTokenizer
    finally:
        tokenization_auto.REGISTERED_TOKENIZER_CLASSES.clear()
        tokenization_auto.REGISTERED_TOKENIZER_CLASSES.update(registered)
        del tokenization_auto.TOKENIZER_MAPPING._extra_content[FirstGenerationConfig]
    assert not (folder / "ran").exists()
