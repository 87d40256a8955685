"""What every consumer program does: read a request, run strangers' code on a folder, write what came out.

    VENV/bin/python run_NAME.py FOLDER REQUEST.json OUT.npz

REQUEST.json has `ids` (token ids of one row), `new_tokens` (how many to generate) and `texts` (strings to tokenize).
OUT.npz gets `logits` float32 [T, V] and `greedy` int64 [new_tokens]; OUT.json, beside it, the versions of the packages,
the tokens of `texts` (where the format carries a tokenizer), the seconds and whatever the program wants to say.
Nothing of qwen_quant is imported: the question is whether strangers read the folder as we do.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Runner:
    """A loaded model. `logits`: ids -> [T, V]; `greedy`: (ids, count) -> the consumer's own greedy continuation."""

    logits: Callable[[list[int]], Any]
    greedy: Callable[[list[int], int], list[int]] | None = None
    tokenize: Callable[[str], list[int]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def recompute(runner: Runner, ids: list[int], count: int) -> list[int]:
    """Greedy tokens by a full pass each, for consumers whose cached path is not reached from Python."""
    row = list(ids)
    for _ in range(count):
        row.append(int(np.argmax(np.asarray(runner.logits(row))[-1])))
    return row[len(ids) :]


def main(load: Callable[[Path], Runner], packages: tuple[str, ...]) -> None:
    """Run the program: `load` a folder, answer the request, write the answer; stdout stays free."""
    folder, request_file, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        runner = load(folder)
        loaded = time.perf_counter()
        logits = np.asarray(runner.logits(request["ids"]), dtype=np.float32)
        make = runner.greedy or (lambda ids, count: recompute(runner, ids, count))
        greedy = make(request["ids"], request["new_tokens"])
        tokens = None if runner.tokenize is None else [list(runner.tokenize(text)) for text in request["texts"]]
    np.savez(out, logits=logits, greedy=np.asarray(greedy, dtype=np.int64))
    answer = {"versions": {name: version(name) for name in packages}, "tokens": tokens, "facts": runner.facts}
    seconds = {"load_seconds": loaded - start, "run_seconds": time.perf_counter() - loaded}
    out.with_suffix(".json").write_text(json.dumps({**answer, **seconds}), encoding="utf-8")
