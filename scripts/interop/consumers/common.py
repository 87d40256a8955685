"""What every consumer program does: read a request, run strangers' code on a folder, write what came out.

    VENV/bin/python run_NAME.py FOLDER REQUEST.json OUT.npz [FOLDER REQUEST.json OUT.npz ...]

REQUEST.json has `ids` (token ids of one row), `new_tokens` (how many to generate) and `texts` (strings to tokenize).
OUT.npz gets `logits` float32 [T, V] and `greedy` int64 [new_tokens]; OUT.json, beside it, the versions of the packages,
the tokens of `texts` (where the format carries a tokenizer), the seconds and whatever the program wants to say.
A folder that fails leaves its traceback on stderr, after the line `MARK` and its number, and no answer; the others are
still read. Nothing of qwen_quant is imported: the question is whether strangers read the folder as we do.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

MARK = "=== folder "  # scripts/interop/running.py looks for it


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
    """Run the program on each folder of the command line; exit status 1 when one of them failed."""
    jobs = [tuple(map(Path, sys.argv[k : k + 3])) for k in range(1, len(sys.argv), 3)]
    failed = False
    for number, (folder, request, out) in enumerate(jobs):
        print(f"\n{MARK}{number}", file=sys.stderr, flush=True)
        try:
            _answer(load, folder, json.loads(request.read_text(encoding="utf-8")), out, packages)
        except Exception:  # noqa: BLE001 (strangers' code: its last words are the result)
            traceback.print_exc()
            failed = True
        gc.collect()
    sys.stderr.flush()
    raise SystemExit(1 if failed else 0)


def _answer(
    load: Callable[[Path], Runner], folder: Path, request: dict[str, Any], out: Path, packages: tuple[str, ...]
) -> None:
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        runner = load(folder)
        loaded = time.perf_counter()
        logits = np.asarray(runner.logits(request["ids"]), dtype=np.float32)
        make = runner.greedy or (lambda ids, count: recompute(runner, ids, count))
        greedy = make(request["ids"], request["new_tokens"])
        tokens = None if runner.tokenize is None else [list(runner.tokenize(text)) for text in request["texts"]]
    np.savez(out, logits=logits, greedy=np.asarray(greedy, dtype=np.int64))
    answer = {"versions": _versions(packages), "tokens": tokens, "facts": runner.facts}
    seconds = {"load_seconds": loaded - start, "run_seconds": time.perf_counter() - loaded}
    out.with_suffix(".json").write_text(json.dumps({**answer, **seconds}), encoding="utf-8")


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed: one program may serve environments with and without a package."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
