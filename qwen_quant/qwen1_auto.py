"""First-generation Qwen's tokenizer as a transformers class, so that AutoTokenizer reads it without remote code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer

from qwen_quant.chat import CHAT_TEMPLATE, chat_ids
from qwen_quant.errors import InputError
from qwen_quant.qwen1_tokenizer import (
    END_OF_TEXT,
    EXTRA_VOCABULARY_FILE,
    SPECIAL_TOKENS,
    VOCABULARY_FILE,
    VOCABULARY_TOKENS,
    Allowed,
    Qwen1Tokenizer,
    rank_lines,
    read_extra_tokens,
    read_vocabulary,
)

_FIRST_RELEASE_KEY = "add_more_sp_tokens"  # only the tokenizer code of August 2023 knew it
_OWN_CHAT_KEYS = {"add_generation_prompt", "tokenize", "return_dict", "padding", "truncation", "max_length"}
_OWN_CHAT_KEYS |= {"return_tensors", "tokenizer_kwargs"}
logger = logging.getLogger(__name__)


class QWenTokenizer(PreTrainedTokenizer):
    """Qwen1Tokenizer behind transformers' interface, under the name the published tokenizer_config.json files give.

    Tokens are `bytes`, special tokens `str`, as in the original.  `allowed_special` and `disallowed_special` go into
    any encoding call.  `apply_chat_template` encodes contents apart from the template (see `qwen_quant.chat`), unless
    the folder brings a template of its own.

    Args:
        vocab_file: path of `qwen.tiktoken`.
        errors: "replace", "ignore" or "strict", for decoding.
        extra_vocab_file: path of an extra vocabulary file (found by itself when called `qwen_extra.tiktoken`).
        **kwargs: the rest of tokenizer_config.json.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE, "extra_vocab_file": EXTRA_VOCABULARY_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file: str, errors: str = "replace", extra_vocab_file: str | None = None, **kwargs: Any
    ) -> None:
        if kwargs.pop(_FIRST_RELEASE_KEY, None):
            logger.warning(
                "%s: settings of the August 2023 tokenizer: its special tokens after <|im_end|> (<R>, <extra_0> ...) "
                "were renamed <|extra_0|> ..., and special tokens in texts are parsed now; all ids are the same",
                vocab_file,
            )
        base = read_vocabulary(Path(vocab_file))
        extra = read_extra_tokens(Path(extra_vocab_file), base) if extra_vocab_file else {}
        self.qwen1 = Qwen1Tokenizer({**base, **extra}, errors)
        kwargs["added_tokens_decoder"] = {
            index: AddedToken(name, special=True, normalized=True) for name, index in SPECIAL_TOKENS.items()
        }
        kwargs["extra_special_tokens"] = list(kwargs["added_tokens_decoder"].values())
        for key in ("eos_token", "pad_token"):
            kwargs[key] = kwargs.get(key) or END_OF_TEXT
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATE
        super().__init__(errors=errors, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids there are, special tokens included."""
        return len(self.qwen1)

    def __len__(self) -> int:
        return len(self.qwen1)

    def get_vocab(self) -> dict[Any, int]:
        """Token -> id: byte strings, and surface forms of special tokens."""
        vocabulary: dict[Any, int] = dict(self.qwen1.ranks)
        return vocabulary | dict(SPECIAL_TOKENS)

    def tokenize(
        self, text: str, *, allowed_special: Allowed = "all", disallowed_special: Allowed = (), **kwargs: Any
    ) -> list[bytes | str]:
        """Tokens of a text (see Qwen1Tokenizer.encode)."""
        allowed = () if kwargs.get("split_special_tokens") else allowed_special
        ids = self.qwen1.encode(text, allowed_special=allowed, disallowed_special=disallowed_special)
        return [self.qwen1.token(index) for index in ids]

    def convert_tokens_to_ids(self, tokens: bytes | str | Sequence[bytes | str]) -> Any:
        """Id of a token (None for what is none), or the list of those of several."""
        if isinstance(tokens, (bytes, str)):
            return self.qwen1.id_of(tokens)
        return [self.qwen1.id_of(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: Sequence[bytes | str]) -> str:
        """Text of tokens (surface forms are ASCII, so they never complete a cut UTF-8 sequence)."""
        joined = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
        return joined.decode("utf-8", errors=self.qwen1.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `qwen.tiktoken`, and the extra vocabulary where there is one; from_pretrained finds both again."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        base = {token: rank for token, rank in self.qwen1.ranks.items() if rank < VOCABULARY_TOKENS}
        extra = {token: rank for token, rank in self.qwen1.ranks.items() if rank >= VOCABULARY_TOKENS}
        written = []
        for name, ranks in ((VOCABULARY_FILE, base), (EXTRA_VOCABULARY_FILE, extra)):
            if ranks:
                path = Path(save_directory) / f"{prefix}{name}"
                path.write_bytes(rank_lines(ranks))
                written.append(str(path))
        return tuple(written)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' method; with the standard template, contents are encoded apart and never parsed."""
        standard = self.chat_template == CHAT_TEMPLATE and not args and kwargs.get("tokenize", True)
        if not standard or any(value and key not in _OWN_CHAT_KEYS for key, value in kwargs.items()):
            return super().apply_chat_template(conversation, *args, **kwargs)
        options = {key: value for key, value in kwargs.items() if key in _OWN_CHAT_KEYS}
        options.pop("tokenize", None)
        prompt, as_dict = options.pop("add_generation_prompt", False), options.pop("return_dict", True)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        chats = conversation if batched else [conversation]
        ids = [chat_ids(self.qwen1, chat, add_generation_prompt=prompt) for chat in chats]
        out = self(
            ids if batched else ids[0],
            add_special_tokens=False,
            **(options.pop("tokenizer_kwargs", None) or {}),
            **options,
        )
        return out if as_dict else out["input_ids"]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        unknown = [str(token) for token in new_tokens or () if str(token) not in SPECIAL_TOKENS]
        if unknown:
            raise InputError(
                f"this tokenizer cannot take the new token {unknown[0]!r}",
                "ids of first-generation Qwen are fixed",
                f"use one of its <|extra_0|> ... <|extra_204|>, or an {EXTRA_VOCABULARY_FILE}",
            )
        return 0

    def _convert_id_to_token(self, index: int) -> bytes | str:
        return self.qwen1.token(index)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        if not kwargs.get("sanitize_control_tokens") and not kwargs.get("is_split_into_words"):
            text, text_pair = self._as_ids(text, kwargs), self._as_ids(text_pair, kwargs)
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)

    def _as_ids(self, text: Any, options: dict[str, Any]) -> Any:
        """Texts as ids, at tiktoken's speed: the base class takes ids as they are ("" stays: [] is a batch there)."""
        if isinstance(text, (list, tuple)) and text and isinstance(text[0], str):
            return [self._as_ids(item, options) for item in text]
        if not isinstance(text, str):
            return text
        allowed = () if options.get("split_special_tokens") else options.get("allowed_special", "all")
        disallowed = options.get("disallowed_special", ())
        return self.qwen1.encode(text, allowed_special=allowed, disallowed_special=disallowed) or ""

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.qwen1.decode(ids, skip_special_tokens=skip_special_tokens, errors=kwargs.get("errors"))


def register_auto_tokenizer(config_class: type) -> None:
    """Make AutoTokenizer use QWenTokenizer for folders of this configuration class, or that name the class."""
    AutoTokenizer.register(config_class, tokenizer_class=QWenTokenizer, exist_ok=True)
