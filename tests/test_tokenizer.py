"""tokenizer.py: ids without added specials, the model's own chat template, and folders that have neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.errors import InputError
from qwen_quant.tokenizer import Tokenizer, load_tokenizer
from tests.support.checkpoints import write_tokenizer
from tests.support.qwen1_vocabulary import calibration_messages, golden, write_qwen1_tokenizer, written_files

END_OF_TEXT, START, END = 256, 257, 258
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "好"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="ascii"), max_size=40))
def test_encode_adds_nothing_and_decodes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_documents_end_with_end_of_text_and_not_with_end_of_turn(tokenizer: Tokenizer) -> None:
    assert tokenizer.separator_id == END_OF_TEXT


def test_end_of_text_counts_even_where_it_is_the_unknown_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": "<|endoftext|>"}))
    assert load_tokenizer(tmp_path).separator_id == END_OF_TEXT


def test_chat_goes_through_the_models_own_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat_ids(CHAT)
    assert ids == tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n好<|im_end|>\n")
    assert (ids.count(START), ids.count(END)) == (2, 2)


def test_no_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=False)
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="no chat template") as caught:
        tokenizer.chat_ids(CHAT)
    assert "chat_template" in caught.value.next_step


def test_a_template_that_refuses(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=False)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        load_tokenizer(tmp_path).chat_ids(CHAT)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_code_of_the_folder_is_never_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    path = tmp_path / "tokenizer_config.json"
    settings_ = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps({**settings_, "tokenizer_class": "Evil"}))
    try:
        load_tokenizer(tmp_path)
    except InputError:
        pass
    assert not (tmp_path / "ran").exists()


def test_a_first_generation_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_qwen1_tokenizer(tmp_path))
    assert tokenizer.encode("量化 2023<|im_end|>") == [108048, 220, 17, 15, 17, 18, 151645]
    assert tokenizer.decode([108048, 151645]) == "量化<|im_end|>"
    assert tokenizer.separator_id == 151643
    assert not (tmp_path / "ran").exists()


def test_first_generation_chats_are_those_of_the_published_calibration(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_qwen1_tokenizer(tmp_path))
    assert tokenizer.has_chat_template
    for case in golden("sft_preprocess.json"):
        assert tokenizer.chat_ids(calibration_messages(case))[: case["max_len"]] == case["gptq_input_ids"]


def test_a_first_generation_folder_with_its_own_template(tmp_path: Path) -> None:
    write_qwen1_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_ids([{"role": "user", "content": "a"}]) == [64, 151645]


def test_two_tokenizers_in_one_folder_must_agree(tmp_path: Path) -> None:
    write_qwen1_tokenizer(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.json").write_bytes(written_files()["tokenizer.json"])
    assert load_tokenizer(tmp_path / "both").encode("<extra>量化") == [27, 15460, 29, 108048]
    write_tokenizer(tmp_path / "both")
    with pytest.raises(InputError, match="two tokenizers that differ"):
        load_tokenizer(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path / "both")


def test_a_wrong_first_generation_vocabulary(tmp_path: Path) -> None:
    write_qwen1_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(InputError, match="1 tokens instead of 151643"):
        load_tokenizer(tmp_path)
