"""First-generation Qwen's tokenizer as the files of the Qwen2 family: tokenizer.json and what goes with it.

tiktoken merges the pair of neighbours whose union has the lowest rank; `tokenizers` wants the list of pairs.  The pair
of a token is found by merging its own bytes with the ranks below its own: two parts are left, and they are the pair.
Bytes are written in GPT-2's printable alphabet.  The special tokens are matched after NFC, as the original does, so
that U+0338 after a `>` (which NFC joins to U+226F) takes the surface form apart in both.

One difference is left, as in every tokenizer.json of the Qwen2 family: the NFC of `tokenizers` 0.23 follows an older
Unicode, without 98 rare combining marks (U+07FD, U+0898 .. U+089F, U+1ABF ...) that Python 3.11 puts in order when
several stand on one letter.  Text that is in NFC already is encoded alike in any case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from qwen_quant.chat import CHAT_TEMPLATE
from qwen_quant.errors import AuditError, InputError
from qwen_quant.qwen1_tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Qwen1Tokenizer,
    load_qwen1_tokenizer,
)

TEXT_PROBES: Final = (
    "Hello, world! It's 2023-12-13; I'LL pay $1,234.50.\r\n\r\n  def f(x):\n\treturn x ** 2   \n",
    "阿里云的通义千问，你好！\u3000量化（Int4）缓存：第１２３页。",
    "Ångström e\u0301 \u1100\u1161\u11a8 ﬁ ½ ２ \u212b\u2126 \u0928\u093f \u0e33 עִברִית العربية Ελληνικά кириллица",
    "👩‍🚀🇨🇳❤️ \u200b\ufeff\x00\x7f \U0001f9e0\U000e0041",
    "<|im_start|>user\n\n  <|im_end|>\n<|endoftext|>",
)
SPECIAL_PROBES: Final = ("<|extra_0|>a<|extra_204|><|extra_205|>", "<|im_end|>\u0338 <|im_end|>\u0301")
_FIRST_GENERATION_ONLY = (
    "chat_format",
    "max_window_size",
    "max_context_size",
    "stop_words_ids",
    "transformers_version",
)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_ALPHABET = str.maketrans({chr(byte): character for byte, character in enumerate(_byte_alphabet())})


def _printable(token: bytes) -> str:
    return token.decode("latin-1").translate(_ALPHABET)


def _merged(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Parts left of a byte string after all merges to ranks below `limit`, lowest rank first, leftmost among equals."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(parts[at] + parts[at + 1], limit), at) for at in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged into `token`."""
    cuts = [
        at for at in range(1, len(token)) if ranks.get(token[:at], rank) < rank and ranks.get(token[at:], rank) < rank
    ]
    if len(cuts) == 1:  # whatever the order of merges, they can only end here
        return token[: cuts[0]], token[cuts[0] :]
    parts = _merged(token, rank, ranks)
    if len(parts) != 2:
        raise InputError(
            f"token {rank} of the vocabulary ({token!r}) is no merge of two earlier ones",
            f"its bytes merge into {len(parts)} parts",
            "make extra vocabulary files by merging (two parts at a time), lower parts first",
        )
    return parts[0], parts[1]


def bpe_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that make every token longer than one byte, in rank order.

    Errors: InputError for a token that no merge of two tokens of lower rank gives.
    """
    longer = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    return [_last_merge(token, rank, ranks) for rank, token in longer]


def fast_tokenizer(tokenizer: Qwen1Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library; surface forms of special tokens are always parsed there."""
    ranks = tokenizer.ranks
    vocabulary = {_printable(token): rank for token, rank in ranks.items()}
    if len(tokenizer) > len(SPECIAL_TOKENS) + min(SPECIAL_TOKENS.values()):
        vocabulary |= SPECIAL_TOKENS  # `tokenizers` numbers unknown added tokens from the vocabulary's size on
    merges = [(_printable(left), _printable(right)) for left, right in bpe_merges(ranks)]
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in SPECIAL_TOKENS])
    _check(tokenizer, fast)
    return fast


def first_difference(tokenizer: Qwen1Tokenizer, fast: tokenizers.Tokenizer, texts: Sequence[str]) -> str | None:
    """The first of `texts` that the two encode differently, or None."""
    same = lambda text: tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids  # noqa: E731
    return next((text for text in texts if not same(text)), None)


def _check(tokenizer: Qwen1Tokenizer, fast: tokenizers.Tokenizer) -> None:
    wrong = [name for name, index in SPECIAL_TOKENS.items() if fast.token_to_id(name) != index]
    if wrong:
        raise AuditError("the generated fast tokenizer has other ids", f"first for {wrong[0]}")
    text = first_difference(tokenizer, fast, TEXT_PROBES + SPECIAL_PROBES)
    if text is not None:
        raise AuditError("the generated fast tokenizer differs from tiktoken", f"on {text!r}")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the source folder; {} when the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON", str(error), "repair it, or remove it") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", "", "repair it, or remove it")
    return value


def _tokenizer_config(source: Path, *, chat: bool) -> dict[str, Any]:
    limit = _read_json(source / "tokenizer_config.json").get("model_max_length")
    limit = limit or _read_json(source / "config.json").get("seq_length")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "added_tokens_decoder": {str(index): {"content": name, **flags} for name, index in SPECIAL_TOKENS.items()},
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name != END_OF_TEXT],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END if chat else END_OF_TEXT,
        "errors": "replace",
        **({"model_max_length": limit} if limit else {}),
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "unk_token": None,
    }


def generation_settings(source: Path) -> dict[str, Any]:
    """generation_config.json in the Qwen2 family's terms: sampling settings kept, ChatML's stop tokens as eos ids."""
    settings = _read_json(source / "generation_config.json")
    chat = settings.get("chat_format") == "chatml"
    kept = {key: value for key, value in settings.items() if key not in _FIRST_GENERATION_ONLY}
    stops = [IM_END, IM_START, END_OF_TEXT] if chat else [END_OF_TEXT]
    ids = [SPECIAL_TOKENS[name] for name in stops]
    end = SPECIAL_TOKENS[END_OF_TEXT]
    return {**kept, "bos_token_id": end, "pad_token_id": end, "eos_token_id": ids if chat else end}


def write_fast_tokenizer(source: Path, out: Path) -> list[Path]:
    """Write what the Qwen2 family has beside its weights, from a folder with `qwen.tiktoken`.

    Written: tokenizer.json (checked against tiktoken first), tokenizer_config.json and special_tokens_map.json (208
    special tokens), chat_template.jinja, generation_config.json.  The end token is `<|im_end|>` where the source's
    generation_config.json says chat_format "chatml", `<|endoftext|>` otherwise.

    Args:
        source: the folder to read.
        out: where to write; made when missing, files of these names are replaced.

    Returns:
        The files written.

    Errors: InputError for a missing or wrong vocabulary, AuditError when the generated tokenizer would differ.
    """
    fast = fast_tokenizer(load_qwen1_tokenizer(source))
    generation = generation_settings(source)
    config = _tokenizer_config(source, chat=isinstance(generation["eos_token_id"], list))
    names = {"eos_token": config["eos_token"], "pad_token": config["pad_token"]}
    special = {"additional_special_tokens": config["additional_special_tokens"], **names}
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "tokenizer.json": fast.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": json.dumps(generation, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]
