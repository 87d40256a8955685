"""Measurements of an interrupted profile, kept until the profile is written: hours of them are not lost to a Ctrl-C."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.profiling.results import MEASURED
from qwen_quant.resume import write_json_atomically

FOLDER = ".profile.partial"
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Journal:
    """Answers a request from an earlier run, or asks and keeps the answer. Failures and "oom" are asked again.

    Attributes:
        ask: the child (profiling/parent.py).
        folder: where answers are kept; None keeps none.
        identity: what else decides an answer: versions, and the weights in each folder.
        reused: answers that came from an earlier run.
    """

    ask: Ask
    folder: Path | None
    identity: dict[str, Any]
    reused: int = field(default=0, init=False)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        if self.folder is None:
            return self.ask(request)
        digest = hashlib.sha256(json.dumps([request, self.identity], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{digest[:32]}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = self.ask(request)
            if found["status"] == MEASURED:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json_atomically(path, found)
            return found
        self.reused += 1
        return found
