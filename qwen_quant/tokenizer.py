"""One surface over tokenizers: encode, decode, chat. Never runs a repository's code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qwen_quant.errors import InputError

Message = dict[str, str]
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


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

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a whole conversation ({"role", "content"} each) through the model's own chat template.

        Errors: InputError when there is no template or it refuses these messages.
        """
        if not self.has_chat_template:
            raise InputError(
                f"{self.folder} has no chat template",
                "chat rows cannot be written the way this model was trained on",
                "add chat_template.jinja (or chat_template in tokenizer_config.json), or calibrate on text rows",
            )
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
    try:
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise InputError(
            f"{folder} has no tokenizer that can be read",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "put the model's tokenizer.json and tokenizer_config.json beside its weights",
        ) from error
    return Tokenizer(folder, inner)
