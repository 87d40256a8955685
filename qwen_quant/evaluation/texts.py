"""Where evaluation text comes from, and how the rows of a source become one text.

A plain text file is read as it is: no line is joined, stripped or detokenized.  Rows (JSONL, JSON, Hub data sets) are
joined by one string, which the result names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError

BUNDLED_TEXTS = {"en": "demo_eval.txt", "zh": "eval_zh.txt"}
TEXT_FIELDS = ("text", "content", "page")
ROW_FILES = (".jsonl", ".json")


@dataclass(frozen=True)
class EvaluationText:
    """One text to score: its name, sha256 of the bytes it was read from, how its rows were joined, and itself."""

    name: str
    sha256: str
    joining: str
    text: str


def read_texts(specs: Iterable[str], joining: str) -> list[EvaluationText]:
    """Every text of `specs` (see ValidationConfig.texts). Errors: InputError naming the source and what to do."""
    texts: list[EvaluationText] = []
    for spec in specs:
        if spec == "bundled":
            texts += [_bundled(language) for language in BUNDLED_TEXTS]
        elif spec.startswith("bundled:"):
            texts.append(_bundled(spec.removeprefix("bundled:")))
        elif spec.startswith("hub:"):
            texts.append(_hub(spec, joining))
        else:
            texts.append(_file(spec, joining))
    for text in texts:
        if not text.text.strip():
            raise InputError(f"the evaluation text {text.name} is empty", next_step="give a file with text")
    return texts


def _bundled(language: str) -> EvaluationText:
    if language not in BUNDLED_TEXTS:
        raise InputError(f"there is no bundled text '{language}'", next_step=f"use one of {', '.join(BUNDLED_TEXTS)}")
    data = bundled_path(BUNDLED_TEXTS[language]).read_bytes()
    return EvaluationText(f"bundled:{language}", hashlib.sha256(data).hexdigest(), "one file", data.decode("utf-8"))


def _file(spec: str, joining: str) -> EvaluationText:
    name, _, field = spec.partition("#")
    path = Path(spec) if Path(spec).is_file() else Path(name)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig" if path.suffix in ROW_FILES else "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the evaluation text {path} cannot be read", str(error), "give a UTF-8 text file") from error
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix not in ROW_FILES:
        return EvaluationText(str(path), digest, "one file", text)
    rows = _json_rows(path, text)
    return EvaluationText(spec, digest, _joined_by(joining), joining.join(_fields(rows, field, str(path))))


def _joined_by(joining: str) -> str:
    return f"rows joined by {joining!r}"


def _json_rows(path: Path, text: str) -> list[Any]:
    """Rows of a JSON array or of JSON lines."""
    if text.lstrip().startswith("["):
        return list(_parsed(text, f"{path} is not valid JSON"))
    lines = enumerate(text.splitlines(), 1)
    return [_parsed(line, f"{path} is not valid JSON (line {number})") for number, line in lines if line.strip()]


def _parsed(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(complaint, str(error), "give one JSON object a line, or one array") from error


def _fields(rows: Iterable[Any], field: str, origin: str) -> list[str]:
    """The text of every row: `field`, or the first of TEXT_FIELDS that the row has."""
    found = []
    for number, row in enumerate(rows, 1):
        value = row if isinstance(row, str) else None
        if isinstance(row, dict):
            names = (field,) if field else TEXT_FIELDS
            value = next((row[name] for name in names if name in row), None)
        if not isinstance(value, str):
            have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f"{origin}: row {number} has no text in '{field or TEXT_FIELDS[0]}'",
                f"it has: {have}",
                "name the field after the file: FILE.jsonl#field",
            )
        found.append(value)
    return found


def _hub(spec: str, joining: str) -> EvaluationText:
    """A Hub data set "hub:org/name[:config[:split[:field]]]" through `datasets`; its cache and a local copy count."""
    name, config, split, field = (spec.removeprefix("hub:").split(":") + ["", "", ""])[:4]
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{spec} needs the package 'datasets'", str(error), "pip install 'qwen-quant[eval]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # whatever the network, the hub or a parser raises: the user can only provide the data
        raise InputError(
            f"the data set {name} cannot be loaded",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            f"connect to the Hub, or put its files into the folder ./{name} here, or give a .jsonl or .txt file",
        ) from error
    text = joining.join(_fields(rows, field, spec))
    return EvaluationText(spec, hashlib.sha256(text.encode("utf-8")).hexdigest(), _joined_by(joining), text)
