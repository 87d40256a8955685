"""Start a measurement in a fresh process and read its answer, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import qwen_quant
from qwen_quant.errors import InputError
from qwen_quant.profiling.results import FAILED, OOM

CHILD = "qwen_quant.profiling.child"
# What C and C++ code says on its way out when memory is short.
_NO_MEMORY = ("bad_alloc", "Cannot allocate memory", "Thread creation failed", "can't allocate memory", "out of memory")
_TAIL = 3


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Run `request` (profiling/child.py) in a new Python process and return its answer.

    A process that the system killed is {"status": "oom"}; one that died otherwise {"status": "failed"}, with the last
    lines it said.

    Errors: InputError where the child met one (a bad folder, no such device).
    """
    with tempfile.TemporaryDirectory(prefix="qwen-quant-profile-") as name:
        folder = Path(name)
        request_path, answer_path, said_path = (folder / file for file in ("request.json", "answer.json", "said.txt"))
        request_path.write_text(json.dumps(request), encoding="utf-8")
        with said_path.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", CHILD, str(request_path), str(answer_path)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
        if answer_path.is_file():
            found: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
        else:
            found = death(code, said_path.read_text(encoding="utf-8", errors="replace"))
    return checked(found)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """The answer itself; bad input that the child met is an InputError here."""
    if found["status"] == "error":
        raise InputError(found["what"], found["why"], found["next_step"])
    return found


def death(code: int, said: str) -> dict[str, Any]:
    """The answer of a process that left none: its exit code (negative: a signal) and everything it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return {"status": OOM, "reason": "the system killed the process: it ran out of memory"}
    short = next((line for line in lines if any(word in line for word in _NO_MEMORY)), None)
    if short is not None:
        return {"status": OOM, "reason": short}
    return {"status": FAILED, "reason": f"the process ended with {code}: " + " | ".join(lines[-_TAIL:])}


def _environment() -> dict[str, str]:
    """This environment, with the package importable from wherever it was imported here."""
    package = str(Path(qwen_quant.__file__).parents[1])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package)))
    return {**os.environ, "PYTHONPATH": path}
