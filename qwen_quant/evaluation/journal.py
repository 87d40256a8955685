"""What a task run has already answered, on disk, so that a killed run continues from its last finished request.

One JSON object a line: {"key", "value", "truncated_tokens"}. The key is a sha256 of the request and of the model, so
the file can be shared by runs of several models and tasks; a line that was cut off by the kill is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_quant.evaluation.language_model import Answer

_HASHED_BYTES = 16 << 20  # larger files (weights) are known by their size and time


def model_identity(folder: Path, setting: str) -> str:
    """sha256 (hex) of what decides a model's answers: its files, and `setting` (device and dtype).

    Files up to 16 MiB count by content; weights by name, size and time of change, since reading 30 GB takes minutes.
    """
    digest = hashlib.sha256(setting.encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        facts = path.stat()
        small = facts.st_size <= _HASHED_BYTES
        digest.update(f"{path.name} {facts.st_size} {0 if small else facts.st_mtime_ns}\n".encode())
        if small:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def request_key(identity: str, kind: str, arguments: Any) -> str:
    """sha256 (hex) of one request to one model; `arguments` are JSON values."""
    text = json.dumps([identity, kind, arguments], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _whole_lines(path: Path) -> list[bytes]:
    """The complete lines of the file; an unfinished last one is cut off, so that the next one starts its own."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].splitlines()


class RequestJournal:
    """Answers by request key, read from `path` at the start and appended to it batch by batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in _whole_lines(path):
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = Answer(entry["value"], entry["truncated_tokens"])
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line is answered again

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep a batch of answers, on disk before this returns."""
        lines = []
        for key, answer in answers:
            self._answers[key] = answer
            entry = {"key": key, "value": answer.value, "truncated_tokens": answer.truncated_tokens}
            lines.append(json.dumps(entry, ensure_ascii=True) + "\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
