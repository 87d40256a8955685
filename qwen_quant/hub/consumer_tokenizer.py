"""A folder's tokenizer and chat template as readers see them, without loading transformers where that is not needed.

transformers costs more memory (150 MiB) than a push of any size does. A tokenizer.json under a class that transformers
reads from that file alone is therefore read by the tokenizers library, and its template rendered by Jinja with the
names that transformers gives it. Whatever that refuses, and every other kind, is judged by transformers itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_quant.hub.consumers import Artifact
from qwen_quant.qwen1_tokenizer import VOCABULARY_FILE

# tokenizer_class values whose tokenizer is what tokenizer.json says.
_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast"}


@dataclass(frozen=True)
class Reader:
    """What the rules ask of a tokenizer: text to ids, how many tokens it has, a user's question rendered as a chat."""

    encode: Callable[[str], list[int]]
    size: int
    render: Callable[[str], str]


def open_tokenizer(artifact: Artifact) -> Reader:
    """The folder's tokenizer (InputError when none loads without remote code)."""
    plain = artifact.tokenizer_config.get("tokenizer_class") in _PLAIN_CLASSES
    if plain and "tokenizer.json" in artifact.files and VOCABULARY_FILE not in artifact.files:
        light = _light(artifact)
        if light is not None:
            return light
    from qwen_quant.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(artifact.folder)
    inner = tokenizer._inner  # the template as readers apply it, to a conversation that waits for an answer

    def render(question: str) -> str:
        message = {"role": "user", "content": question}
        return str(inner.apply_chat_template([message], tokenize=False, add_generation_prompt=True))

    return Reader(tokenizer.encode, len(inner), render)


def _light(artifact: Artifact) -> Reader | None:
    """By the tokenizers library and Jinja, None where they fail on it."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(artifact.folder / "tokenizer.json"))
        template = _template(artifact)
        template("x")
    except Exception:  # noqa: BLE001  whatever it is, transformers judges and words it
        return None

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return Reader(encode, tokenizer.get_vocab_size(with_added_tokens=True), template)


def _template(artifact: Artifact) -> Callable[[str], str]:
    """question -> the chat template's text for it, rendered in a sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(artifact.chat_template)
    tokens = {key: _text(value) for key, value in artifact.tokenizer_config.items() if key.endswith("_token")}

    def render(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return compiled.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens)

    return render


def _text(token: Any) -> str:
    """A special token as text; older files keep an object with its `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
