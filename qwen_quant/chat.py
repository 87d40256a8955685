"""First-generation Qwen's chats: ChatML rendering, history truncation, stop tokens, and cutting the reply out.

A chat is `<|im_start|>role\\ncontent<|im_end|>`, blocks joined by "\\n".  Role, line break and content are encoded one
by one, so a content's own leading line breaks never merge with the one before it, and (except where asked) a surface
form such as `<|im_end|>` in a content stays text: a user cannot close their own turn.  A runtime that tokenizes the
rendered text of CHAT_TEMPLATE in one piece gives the same ids for every content that holds no surface form of a special
token and whose leading white space holds no line break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qwen_quant.errors import InputError, UsageError
from qwen_quant.qwen1_tokenizer import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS, Qwen1Tokenizer

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
MAX_WINDOW_SIZE: Final = 6144
CHAT_FORMATS: Final = ("chatml", "raw")
CHAT_TEMPLATE: Final = (
    "{%- if messages[0]['role'] != 'system' -%}\n"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)
_START, _END = SPECIAL_TOKENS[IM_START], SPECIAL_TOKENS[IM_END]
_NEWLINE = 198  # the id of "\n"


@dataclass(frozen=True)
class Context:
    """What a model is given.

    Attributes:
        text: the prompt as text; surface forms inside contents are ordinary text in `ids`.
        ids: its token ids.
    """

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the reply without prompt, stop token and surrounding white space.
        end_reason: "Gen '<|im_end|>'" (the stop token) or "Gen length N" (N: all tokens, prompt included).
    """

    text: str
    end_reason: str


@dataclass(frozen=True)
class _Block:
    """One `<|im_start|>role\\ncontent<|im_end|>`."""

    text: str
    ids: list[int]


def _block(tokenizer: Qwen1Tokenizer, role: str, content: str, *, parse_special: bool = False) -> _Block:
    inner = tokenizer.encode(content) if parse_special else tokenizer.encode_text(content)
    ids = [_START, *tokenizer.encode_text(role), _NEWLINE, *inner, _END]
    return _Block(f"{IM_START}{role}\n{content}{IM_END}", ids)


def _check_format(chat_format: str) -> None:
    if chat_format not in CHAT_FORMATS:
        raise UsageError(f"unknown chat format '{chat_format}'", "", f"use one of {', '.join(CHAT_FORMATS)}")


def make_context(
    tokenizer: Qwen1Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    system: str = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
) -> Context:
    """The prompt for the next reply.

    Turns are taken from the newest backwards while system and turns together stay under `max_window_size` tokens; the
    first one that does not fit ends it.  The query itself is never cut.

    Args:
        tokenizer: the model's.
        query: what the user says now.
        history: (query, reply) pairs, oldest first; unused by "raw".
        system: the system message (the chat models were trained with DEFAULT_SYSTEM); unused by "raw".
        max_window_size: in tokens, without query and generation prompt.
        chat_format: "chatml", or "raw" for base models: the query alone, surface forms parsed.
    """
    _check_format(chat_format)
    if chat_format == "raw":
        return Context(query, tokenizer.encode(query))
    opening = _block(tokenizer, "system", system)
    text, ids = "", list[int]()
    for turn_query, turn_reply in reversed(history):
        asked, answered = _block(tokenizer, "user", turn_query), _block(tokenizer, "assistant", turn_reply)
        turn = [_NEWLINE, *asked.ids, _NEWLINE, *answered.ids]
        if len(opening.ids) + len(turn) + len(ids) >= max_window_size:
            break
        text, ids = f"\n{asked.text}\n{answered.text}{text}", turn + ids
    asked = _block(tokenizer, "user", query)
    prompt = [_START, *tokenizer.encode_text("assistant"), _NEWLINE]
    return Context(
        f"{opening.text}{text}\n{asked.text}\n{IM_START}assistant\n",
        [*opening.ids, *ids, _NEWLINE, *asked.ids, _NEWLINE, *prompt],
    )


def chat_ids(
    tokenizer: Qwen1Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    parse_special: bool = False,
) -> list[int]:
    """Token ids of a conversation ({"role", "content"} each), as CHAT_TEMPLATE writes it, contents encoded apart.

    With `add_generation_prompt` they are those of `make_context`.  Without, every block ends with a line break, and
    with `parse_special` the ids are those of the published calibration and fine-tuning scripts, which parse surface
    forms in contents too.

    Errors: InputError for an empty conversation or a message without role and content as text.
    """
    if not messages:
        raise InputError("a chat needs at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"message {number} of a chat lacks 'role' or 'content' as text")
    opening = [] if messages[0]["role"] == "system" else [{"role": "system", "content": DEFAULT_SYSTEM}]
    ids: list[int] = []
    for message in [*opening, *messages]:
        ids += _block(tokenizer, message["role"], message["content"], parse_special=parse_special).ids
        ids.append(_NEWLINE)
    return [*ids, _START, *tokenizer.encode_text("assistant"), _NEWLINE] if add_generation_prompt else ids


def decode_tokens(
    tokens: Sequence[int],
    tokenizer: Qwen1Tokenizer,
    *,
    raw_text_len: int,
    context_length: int,
    chat_format: str = "chatml",
    errors: str = "replace",
) -> Reply:
    """Cut the reply out of prompt plus generated tokens, as the published chat code does.

    "chatml": up to the first `<|im_end|>` or `<|im_start|>` after the prompt; without one, the last token counts as
    the stop token and is dropped.  "raw": everything after the prompt, `<|endoftext|>` taken out.

    Args:
        tokens: prompt and generated ids.
        tokenizer: the model's.
        raw_text_len: characters of Context.text (the reply starts there in the decoded text).
        context_length: number of Context.ids.
        chat_format: as given to `make_context`.
        errors: as of Qwen1Tokenizer.
    """
    _check_format(chat_format)
    reason = f"Gen length {len(tokens)}"
    if chat_format == "raw":
        text = tokenizer.decode(tokens, errors=errors)[raw_text_len:]
        return Reply(text.replace(END_OF_TEXT, "").strip(), reason)
    stop = next((at for at in range(context_length, len(tokens)) if tokens[at] in (_START, _END)), None)
    if stop is not None:
        reason = f"Gen {tokenizer.decode([tokens[stop]])!r}"
    end = stop if stop is not None else max(context_length, len(tokens) - 1)
    return Reply(tokenizer.decode(tokens[:end], errors=errors)[raw_text_len:].strip(), reason)


def stop_token_ids(tokenizer: Qwen1Tokenizer, chat_format: str = "chatml") -> list[list[int]]:
    """Token sequences that end a generation in this chat format."""
    _check_format(chat_format)
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [SPECIAL_TOKENS[END_OF_TEXT]]]
    return [[_END], [_START]]


def stopped_rows(
    input_ids: Sequence[Sequence[int]], stop_words_ids: Sequence[Sequence[int]], eos_token_id: int
) -> list[bool]:
    """Which rows end in one of the stop sequences, so that end-of-sequence must follow; [eos] itself does not count.

    Errors: InputError for an empty stop sequence, which would stop everything.
    """
    sequences = [list(words) for words in stop_words_ids if list(words) != [eos_token_id]]
    if not all(sequences):
        raise InputError("a stop sequence is empty", "every row would stop at once", "leave it out")
    return [any(list(row[-len(words) :]) == words for words in sequences) for row in input_ids]
