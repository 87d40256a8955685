"""One surface over tokenizers: encode, decode, chat. Never runs a repository's code.

A folder with `qwen.tiktoken` is first-generation Qwen's and is read by `qwen_quant.qwen1_auto`, whatever Python class
its tokenizer_config.json names.  That file is the model's own: a tokenizer.json beside it is not used, but it must
agree with it, because other runtimes would use it.  All other folders are read by transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from qwen_quant.chat import CHAT_TEMPLATE, chat_ids
from qwen_quant.errors import InputError
from qwen_quant.qwen1_auto import QWenTokenizer
from qwen_quant.qwen1_fast import TEXT_PROBES, first_difference
from qwen_quant.qwen1_tokenizer import VOCABULARY_FILE

Message = dict[str, str]
VOCABULARY_FILES = (VOCABULARY_FILE, "tokenizer.json", "vocab.json", "tokenizer.model")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)


class Tokenizer:
    """A checkpoint's own tokenizer.

    Args:
        folder: where it was read from, for errors.
        inner: the transformers tokenizer.
    """

    def __init__(self, folder: Path, inner: Any) -> None:
        self.folder, self._inner = folder, inner
        self._inner.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    @property
    def separator_id(self) -> int | None:
        """Token that ends a document (end of text), or None."""
        end = self._inner.get_vocab().get("<|endoftext|>")  # its id may also be the one of unknown tokens
        if end is not None:
            return int(end)
        eos = self._inner.eos_token_id
        return int(eos) if eos is not None else None

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how its chats are written."""
        return bool(getattr(self._inner, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without added special tokens."""
        return list(self._inner(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._inner.decode(list(ids)))

    def backend_text(self) -> str:
        """The tokenizer as the text of a tokenizer.json, as it runs here (InputError for one without such a form)."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"the tokenizer of {self.folder} has no tokenizer.json form")
        return str(backend.to_str())

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a whole conversation ({"role", "content"} each) through the model's own chat template.

        First-generation Qwen's contents are encoded one by one, as its published calibration and fine-tuning did.

        Errors: InputError when there is no template or it refuses these messages.
        """
        if not self.has_chat_template:
            raise InputError(
                f"{self.folder} has no chat template",
                "chat rows cannot be written the way this model was trained on",
                "add chat_template.jinja (or chat_template in tokenizer_config.json), or calibrate on text rows",
            )
        if isinstance(self._inner, QWenTokenizer) and self._inner.chat_template == CHAT_TEMPLATE:
            return chat_ids(self._inner.qwen1, messages, parse_special=True)
        from jinja2 import TemplateError

        try:
            text = self._inner.apply_chat_template(list(messages), tokenize=False)
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"the chat template of {self.folder} refuses these messages", str(error)) from error
        return self.encode(text)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (InputError when there is none that loads without remote code)."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):  # transformers would make up an empty one
        raise InputError(
            f"{folder} has no tokenizer",
            f"it holds none of {', '.join(VOCABULARY_FILES)}",
            "put the model's tokenizer files beside its weights",
        )
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    first_generation = (folder / VOCABULARY_FILE).is_file()
    try:
        if first_generation:
            return Tokenizer(folder, _first_generation(folder))
        return Tokenizer(folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    except _UNREADABLE as error:
        raise InputError(
            f"{folder} has no tokenizer that can be read",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "put the model's tokenizer.json and tokenizer_config.json beside its weights",
        ) from error


def _first_generation(folder: Path) -> QWenTokenizer:
    """The tokenizer of `qwen.tiktoken`; InputError when a tokenizer.json beside it is damaged or gives other ids."""
    path = folder / "tokenizer.json"
    companion = _read_fast(path) if path.is_file() else None
    inner = QWenTokenizer.from_pretrained(folder, local_files_only=True)
    text = first_difference(inner.qwen1, companion, TEXT_PROBES) if companion is not None else None
    if text is not None:
        raise InputError(
            f"{folder} holds two tokenizers that differ",
            f"{VOCABULARY_FILE} and tokenizer.json give other ids for {text!r}",
            f"remove tokenizer.json: {VOCABULARY_FILE} is the model's own",
        )
    return inner


def _read_fast(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for a damaged file
        raise InputError(f"{path} cannot be read", str(error), f"remove it: {VOCABULARY_FILE} is used") from error
