"""Calibration text -> a fixed set of token rows.

Rows are filled without padding: JSON rows are put in a seeded order, tokenized, and joined with the end-of-text token;
plain text is tokenized whole and cut from its start.  What does not fill a last row is dropped, and the number of
tokens really used is reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError
from qwen_quant.recipe import CalibrationConfig
from qwen_quant.tokenizer import Tokenizer

BUNDLED = "bundled"
BUNDLED_FILE = "calibration_bundled.jsonl"
FEW_TOKENS = 16384
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSet:
    """What the solver sees.

    Attributes:
        input_ids: int64 [rows, seq_len].
        tokens: rows * seq_len.
        source: "bundled" or the file's path.
        sha256: of the token ids (int64 little-endian, row by row, with the shape in front).
        documents: rows of the source that contributed.
        warnings: what a person should know about this set.
    """

    input_ids: Tensor
    tokens: int
    source: str
    sha256: str
    documents: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """One row of a source: its 1-based number, and text or messages."""

    number: int
    text: str | None
    messages: list[dict[str, str]] | None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"the calibration file {path} does not exist", next_step="give a .jsonl, .json or text file, or 'bundled'"
        )
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"the calibration file {path} cannot be read", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8", error.reason, "save the file as UTF-8") from error
    if not text.strip():
        raise InputError(f"the calibration file {path} is empty", next_step="give a file with text, or 'bundled'")
    return text


def _malformed(path: Path, number: int, why: str) -> InputError:
    return InputError(
        f"{path}: row {number} is malformed",
        why,
        'each row is {"text": ...}, {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}',
    )


def _messages(path: Path, number: int, row: dict[str, Any]) -> list[dict[str, str]]:
    key, role_key, text_key = (
        ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
    )
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise _malformed(path, number, f"'{key}' is not a list of turns")
    messages = []
    for turn in turns:
        role, text = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise _malformed(path, number, f"a turn lacks '{role_key}' or '{text_key}' as text")
        messages.append({"role": _ROLES.get(role, role), "content": text})
    return messages


def _row(path: Path, number: int, row: Any) -> _Row:
    if not isinstance(row, dict):
        raise _malformed(path, number, "it is not a JSON object")
    if "messages" in row or "conversations" in row:
        return _Row(number, None, _messages(path, number, row))
    if not isinstance(row.get("text"), str):
        raise _malformed(path, number, "it has neither 'text' nor 'messages' nor 'conversations'")
    return _Row(number, row["text"], None)


def _json_rows(path: Path, text: str) -> list[_Row]:
    """Rows of a .json list or of JSON lines, every one checked."""
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON", str(error), "one JSON list of rows is expected") from error
        if not isinstance(values, list):
            raise InputError(f"{path} does not hold a list", next_step="one JSON list of rows is expected")
        return [_row(path, number, value) for number, value in enumerate(values, 1)]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028 and the like
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise _malformed(path, number, f"it is not valid JSON: {error}") from error
            rows.append(_row(path, number, value))
    return rows


def _row_ids(path: Path, row: _Row, tokenizer: Tokenizer, *, chat_as_text: bool) -> list[int]:
    if row.messages is None:
        return tokenizer.encode(row.text or "")
    if chat_as_text:
        return tokenizer.encode("\n\n".join(message["content"] for message in row.messages))
    try:
        return tokenizer.chat_ids(row.messages)
    except InputError as error:
        raise InputError(
            f"{path}: row {row.number} cannot be rendered: {error.what}", error.why, error.next_step
        ) from error


def _joined(documents: Iterator[list[int]], separator: int | None, wanted: int) -> tuple[list[int], int]:
    """Tokens of documents with the separator after each, until `wanted` are there; and how many documents."""
    ids: list[int] = []
    count = 0
    for document in documents:
        if document:
            ids += document
            if separator is not None and ids[-1] != separator:
                ids.append(separator)
            count += 1
        if len(ids) >= wanted:
            break
    return ids, count


def _pack(ids: list[int], config: CalibrationConfig, path: Path) -> Tensor:
    """int64 [rows, seq_len] from consecutive tokens; fewer than one row gives one shorter row."""
    if len(ids) < 2:
        raise InputError(f"{path} holds no text to calibrate on", next_step="give a longer file, or 'bundled'")
    length = min(config.seq_len, len(ids))
    rows = min(config.num_samples, len(ids) // length)
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


def _digest(input_ids: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(list(input_ids.shape)).encode())
    digest.update(input_ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _warnings(input_ids: Tensor, config: CalibrationConfig) -> list[str]:
    found = []
    if input_ids.numel() < FEW_TOKENS:
        found.append(f"only {input_ids.numel()} calibration tokens (under {FEW_TOKENS}): expect a worse artifact")
    if input_ids.shape[0] < config.num_samples:
        rows, tokens = input_ids.shape
        found.append(f"the calibration text fills {rows} of {config.num_samples} rows of {tokens} tokens")
    return found


def load_calibration(config: CalibrationConfig, tokenizer: Tokenizer) -> CalibrationSet:
    """Read, check, tokenize and pack a calibration source.

    Chat rows go through the model's own chat template. A model without one cannot use a chat file (InputError); the
    bundled set is then joined as plain text, with a warning that goes into the artifact.

    Errors: InputError naming the file and row for anything missing, empty or malformed.
    """
    bundled = config.source == BUNDLED
    path = bundled_path(BUNDLED_FILE) if bundled else Path(config.source)
    text = _read_text(path)
    warnings: list[str] = []
    wanted = config.num_samples * config.seq_len
    if path.suffix in (".json", ".jsonl"):
        rows = _json_rows(path, text)
        random.Random(config.seed).shuffle(rows)
        as_text = bundled and not tokenizer.has_chat_template
        if as_text and any(row.messages for row in rows):
            warnings.append("the model has no chat template: the bundled chats were joined as plain text")
        encode: Callable[[_Row], list[int]] = lambda row: _row_ids(path, row, tokenizer, chat_as_text=as_text)  # noqa: E731
        ids, documents = _joined((encode(row) for row in rows), tokenizer.separator_id, wanted)
    else:
        ids, documents = tokenizer.encode(text), 1
    input_ids = _pack(ids, config, path)
    warnings += _warnings(input_ids, config)
    for line in warnings:
        logger.warning("%s", line)
    return CalibrationSet(input_ids, input_ids.numel(), config.source, _digest(input_ids), documents, tuple(warnings))
