"""First-generation Qwen's tokenizer (`qwen.tiktoken`), read without the repository's Python: its ids, through tiktoken.

Text is put into Unicode NFC, cut by SPLIT_PATTERN (which takes digits one by one), and every piece is merged by rank.
Ids 0 .. 151642 are the ranked byte strings (0-255 the single bytes), 151643 .. 151850 the special tokens, and from
151851 on those of an extra vocabulary file.  By default the surface form of a special token in the text becomes that
token; text that a stranger wrote belongs into `encode(text, allowed_special=())`.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import logging
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import tiktoken

from qwen_quant.errors import InputError, UsageError

VOCABULARY_FILE: Final = "qwen.tiktoken"
EXTRA_VOCABULARY_FILE: Final = "qwen_extra.tiktoken"
VOCABULARY_TOKENS: Final = 151643
VOCABULARY_SHA256: Final = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
SPLIT_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
_EXTRA_TOKENS = 205
_NAMES = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{number}|>" for number in range(_EXTRA_TOKENS)))
SPECIAL_TOKENS: Final[Mapping[str, int]] = MappingProxyType(
    {name: VOCABULARY_TOKENS + offset for offset, name in enumerate(_NAMES)}
)
_SPECIAL_IDS = frozenset(SPECIAL_TOKENS.values())
_GIT_LFS_POINTER = b"version https://git-lfs"
_GET_AGAIN = f"download {VOCABULARY_FILE} again (the PyPI package dashscope also carries it)"

Allowed = Collection[str] | Literal["all"]
logger = logging.getLogger(__name__)


class Qwen1Tokenizer:
    """Text <-> token ids of first-generation Qwen.

    Args:
        ranks: byte string -> id, the vocabulary file's and any extra tokens (`read_vocabulary`, `read_extra_tokens`).
        errors: what `decode` does with bytes that are not UTF-8: "replace", "ignore" (for streaming) or "strict".
    """

    def __init__(self, ranks: Mapping[bytes, int], errors: str = "replace") -> None:
        _check_errors_mode(errors)
        self.ranks: Mapping[bytes, int] = dict(ranks)
        self.errors = errors
        self.encoding = tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens=dict(SPECIAL_TOKENS)
        )

    def __len__(self) -> int:
        """Ids there are, special tokens included; the model's embedding may have more rows."""
        return self.encoding.n_vocab

    def encode(self, text: str, *, allowed_special: Allowed = "all", disallowed_special: Allowed = ()) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text; lone surrogates become U+FFFD.
            allowed_special: surface forms that become special tokens, or "all"; others are ordinary text.
            disallowed_special: surface forms that must not occur, or "all" (all that are not allowed).

        Errors: InputError for a disallowed surface form.
        """
        allowed = "all" if allowed_special == "all" else set(allowed_special)
        forbidden = "all" if disallowed_special == "all" else set(disallowed_special)
        try:
            return self.encoding.encode(_nfc(text), allowed_special=allowed, disallowed_special=forbidden)
        except ValueError as error:
            raise InputError(
                "the text holds the surface form of a special token that is disallowed here",
                str(error).splitlines()[0],
                "take it out, or name it in allowed_special, or leave disallowed_special empty",
            ) from error

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text` in which no surface form is special: for content that a stranger wrote."""
        return self.encoding.encode_ordinary(_nfc(text))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, errors: str | None = None) -> str:
        """Text of token ids; `errors` (see the class) applies to the whole byte string at once.

        Errors: InputError for an id that is no token (rows of the embedding beyond the vocabulary are padding).
        """
        if errors is not None:
            _check_errors_mode(errors)
        kept = [token for token in ids if token not in _SPECIAL_IDS] if skip_special_tokens else list(ids)
        try:
            data = self.encoding.decode_bytes(kept)
        except (KeyError, OverflowError) as error:
            raise InputError(f"cannot decode: no token has this id: {error}", f"there are {len(self)} ids") from error
        try:
            return data.decode("utf-8", errors=errors or self.errors)
        except UnicodeDecodeError as error:
            raise InputError("the tokens are not UTF-8 text", error.reason, 'decode with errors="replace"') from error

    def token(self, index: int) -> bytes | str:
        """The byte string of an id, or the surface form of a special token (InputError when there is none)."""
        try:
            data = self.encoding.decode_single_token_bytes(index)
        except (KeyError, OverflowError) as error:
            raise InputError(f"no token has the id {index}", f"there are {len(self)} ids") from error
        return data.decode() if index in _SPECIAL_IDS else data

    def id_of(self, token: bytes | str) -> int | None:
        """Id of a byte string or of a special token's surface form; None when it is neither."""
        return SPECIAL_TOKENS.get(token) if isinstance(token, str) else self.ranks.get(token)


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _check_errors_mode(errors: str) -> None:
    try:
        codecs.lookup_error(errors)
    except LookupError as error:
        raise UsageError(f"'{errors}' is no decoding error mode", "", "use replace, ignore or strict") from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a .tiktoken file: one "base64(bytes) rank" a line.

    Errors: InputError naming the file and line for anything unreadable, malformed or listed twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read", error.strerror or str(error), _GET_AGAIN) from error
    if data.startswith(_GIT_LFS_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the vocabulary", "the repository was cloned without LFS", "git lfs pull"
        )
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{path}: line {number} is not 'base64 rank'", str(error), _GET_AGAIN) from error
        if not token or rank < 0 or token in ranks or rank in taken:
            raise InputError(f"{path}: line {number} repeats a token or a rank, or is empty", "", _GET_AGAIN)
        ranks[token] = rank
        taken.add(rank)
    return ranks


def rank_lines(ranks: Mapping[bytes, int]) -> bytes:
    """The bytes of a .tiktoken file with these ranks, in rank order."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def read_vocabulary(path: Path) -> dict[bytes, int]:
    """Read `qwen.tiktoken` and check that it is the one vocabulary of first-generation Qwen (line ends do not matter).

    Errors: InputError for another size or other contents: every id would then mean something else to the model.
    """
    ranks = read_ranks(path)
    if len(ranks) != VOCABULARY_TOKENS:
        raise InputError(
            f"{path} is not the vocabulary of first-generation Qwen",
            f"it holds {len(ranks)} tokens instead of {VOCABULARY_TOKENS}",
            f"{_GET_AGAIN}; tokens of your own belong into {EXTRA_VOCABULARY_FILE}",
        )
    found = hashlib.sha256(rank_lines(ranks)).hexdigest()
    if found != VOCABULARY_SHA256:
        raise InputError(
            f"{path} is not the vocabulary of first-generation Qwen",
            f"its contents have sha256 {found[:12]}... instead of {VOCABULARY_SHA256[:12]}...",
            _GET_AGAIN,
        )
    return ranks


def read_extra_tokens(path: Path, ranks: Mapping[bytes, int]) -> dict[bytes, int]:
    """The tokens that an extra vocabulary file adds to `ranks`.

    Lines whose token exists already, or whose id is taken by another token or a special one, are left out with a
    warning.

    Errors: InputError when the new ids leave a gap after the last id in use.
    """
    taken = set(ranks.values()) | _SPECIAL_IDS
    listed = read_ranks(path)
    added = {token: rank for token, rank in listed.items() if token not in ranks and rank not in taken}
    if len(added) < len(listed):
        logger.warning("%s: %d tokens exist already or have a taken id: ignored", path, len(listed) - len(added))
    if added and max(added.values()) + 1 != len(taken) + len(added):
        raise InputError(
            f"{path} leaves a gap between its ids",
            f"{len(added)} new tokens end at id {max(added.values())}",
            f"number the new tokens from {len(taken)} on",
        )
    return added


def load_qwen1_tokenizer(
    folder: Path, *, extra_vocabulary: Path | None = None, errors: str = "replace"
) -> Qwen1Tokenizer:
    """The tokenizer of a folder with `qwen.tiktoken`; `qwen_extra.tiktoken` beside it is read too.

    Args:
        folder: a checkpoint folder.
        extra_vocabulary: an extra vocabulary file elsewhere.
        errors: see Qwen1Tokenizer.
    """
    ranks = read_vocabulary(folder / VOCABULARY_FILE)
    beside = folder / EXTRA_VOCABULARY_FILE
    extra = extra_vocabulary or (beside if beside.is_file() else None)
    return Qwen1Tokenizer({**ranks, **(read_extra_tokens(extra, ranks) if extra else {})}, errors)
