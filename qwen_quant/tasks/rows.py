"""Where the tasks' data comes from, and what the environment allows them.

Environment variables, set by whoever runs the tasks:

    QWEN_QUANT_DATA_DIR              folder with `hub/`, `tooluse/` and `codeinterp/` as in the project's data (or that
                                     `hub/` itself); default: the current directory
    QWEN_QUANT_ALLOW_CODE_EXECUTION  1 lets tasks execute the code that the model wrote (`--allow-code-execution`)
    QWEN_QUANT_TOKENIZER_DIR         checkpoint folder whose tokenizer cuts text for scores that depend on it
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError

DATA_DIR = "QWEN_QUANT_DATA_DIR"
ALLOW_CODE_EXECUTION = "QWEN_QUANT_ALLOW_CODE_EXECUTION"
TOKENIZER_DIR = "QWEN_QUANT_TOKENIZER_DIR"
Row = dict[str, Any]


def data_file(name: str) -> Path:
    """The file `name` (for example "hub/openai/gsm8k/test.jsonl") under the data folder.

    Errors: InputError naming the file that is missing.
    """
    root = Path(os.environ.get(DATA_DIR) or ".").resolve()
    candidates = [root / name, root / name.removeprefix("hub/"), *([root.parent / name] if root.name == "hub" else [])]
    for path in candidates:
        if path.exists():
            return path
    raise InputError(
        f"{candidates[0]} is not there",
        "the task reads its rows from this file",
        f"give --data-dir (or set {DATA_DIR} to) a folder that holds {name}",
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file (InputError naming file and line where it is none, or when it has no row)."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON", str(error), "repair or replace the file") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object", next_step="repair or replace the file")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows", next_step="replace the file")
    return rows


def with_fields(rows: Iterable[Row], fields: Sequence[str], path: Path) -> list[Row]:
    """The rows reduced to `fields` (InputError naming a row's missing field)."""
    reduced = []
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if field not in row]
        if missing:
            raise InputError(f"{path}, row {number} has no field {missing[0]}", next_step="replace the file")
        reduced.append({field: row[field] for field in fields})
    return reduced


def as_splits(**splits: list[Row]) -> dict[str, Any]:
    """Rows as the mapping of splits that the harness wants (`datasets.Dataset` each)."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise InputError(
            "the tasks need the package datasets", "it comes with the harness", 'run: pip install "qwen-quant[eval]"'
        ) from error
    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


def require_code_execution(task: str) -> None:
    """InputError unless whoever runs this allowed generated code to be executed."""
    if os.environ.get(ALLOW_CODE_EXECUTION) != "1":
        raise InputError(
            f"task {task} executes code that the model wrote",
            "that was not allowed",
            f"add --allow-code-execution (or set {ALLOW_CODE_EXECUTION}=1); the code runs in a sandbox, see "
            "qwen_quant/evaluation/sandbox.py for what that holds",
        )


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Any:
    from qwen_quant.tokenizer import load_tokenizer

    return load_tokenizer(Path(folder))


def tokenizer_pieces(text: str) -> list[str] | None:
    """The decoded tokens of `text` under QWEN_QUANT_TOKENIZER_DIR's tokenizer; None where that is not set."""
    folder = os.environ.get(TOKENIZER_DIR)
    if not folder:
        return None
    tokenizer = _tokenizer(folder)
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]
