"""chat.py against the contexts, replies and stop words of the original chat code, and the calibration rendering."""

from __future__ import annotations

import pytest

from qwen_quant.chat import (
    chat_ids,
    decode_tokens,
    make_context,
    stop_token_ids,
    stopped_rows,
)
from qwen_quant.errors import InputError, UsageError
from qwen_quant.qwen1_tokenizer import Qwen1Tokenizer, load_qwen1_tokenizer
from tests.support.qwen1_vocabulary import calibration_messages, golden, write_qwen1_tokenizer

GOLDEN = golden("chat.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Qwen1Tokenizer:
    return load_qwen1_tokenizer(write_qwen1_tokenizer(tmp_path_factory.mktemp("qwen1")))


def turns(case: dict) -> list[tuple[str, str]]:
    return [(asked, answered) for asked, answered in case["history"] or ()]


def test_every_golden_context(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["contexts"]:
        context = make_context(
            tokenizer,
            case["query"],
            turns(case),
            system=case["system"],
            max_window_size=case["max_window_size"],
            chat_format=case["chat_format"],
        )
        assert (context.text, context.ids) == (case["raw_text"], case["context_tokens"])


def test_golden_contexts_cut_the_history() -> None:
    cut = [c for c in GOLDEN["contexts"] if c["chat_format"] == "chatml" and c["history"]]
    assert any(c["raw_text"].count("<|im_start|>assistant\n") <= len(c["history"]) for c in cut)


def test_a_turn_that_just_fills_the_window_is_left_out(tokenizer: Qwen1Tokenizer) -> None:
    """4 tokens open the chat; each one-token message takes line break, start, role, line break, itself, end."""
    kept = make_context(tokenizer, "c", [("a", "b")], max_window_size=4 + 12 + 1)
    assert "a<|im_end|>" in kept.text
    assert "a<|im_end|>" not in make_context(tokenizer, "c", [("a", "b")], max_window_size=4 + 12).text


def test_chat_ids_are_those_of_make_context(tokenizer: Qwen1Tokenizer) -> None:
    history = [("\n\n  你好<|im_end|>", "\nHello<|endoftext|>")]
    context = make_context(tokenizer, "<|im_start|>\r\n", history, system="\tBe brief.")
    messages = [
        {"role": "system", "content": "\tBe brief."},
        {"role": "user", "content": history[0][0]},
        {"role": "assistant", "content": history[0][1]},
        {"role": "user", "content": "<|im_start|>\r\n"},
    ]
    assert chat_ids(tokenizer, messages, add_generation_prompt=True) == context.ids


def test_every_golden_reply(tokenizer: Qwen1Tokenizer) -> None:
    for case in GOLDEN["decodes"]:
        reply = decode_tokens(
            case["tokens"],
            tokenizer,
            raw_text_len=case["raw_text_len"],
            context_length=case["context_length"],
            chat_format=case["chat_format"],
        )
        assert (reply.text, reply.end_reason) == (case["text"], case["end_reason"])


def test_stop_words(tokenizer: Qwen1Tokenizer) -> None:
    for chat_format, ids in GOLDEN["stop_words"].items():
        assert stop_token_ids(tokenizer, chat_format) == ids
    for case in GOLDEN["stop_processor"]:
        assert stopped_rows(case["input_ids"], case["stop_words_ids"], case["eos_token_id"]) == case["forced"]
    assert stopped_rows([[5, 19]], [[19]], eos_token_id=19) == [False]
    with pytest.raises(InputError, match="empty"):
        stopped_rows([[1]], [[]], eos_token_id=19)


def test_calibration_rows_of_the_published_script(tokenizer: Qwen1Tokenizer) -> None:
    for case in golden("sft_preprocess.json"):
        ids = chat_ids(tokenizer, calibration_messages(case), parse_special=True)
        assert ids[: case["max_len"]] == case["gptq_input_ids"]


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": 1, "content": "a"}]])
def test_malformed_chats(tokenizer: Qwen1Tokenizer, messages: list) -> None:
    with pytest.raises(InputError, match="chat"):
        chat_ids(tokenizer, messages)


def test_unknown_format(tokenizer: Qwen1Tokenizer) -> None:
    with pytest.raises(UsageError, match="chat format"):
        make_context(tokenizer, "a", chat_format="alpaca")
