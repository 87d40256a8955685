"""Real `qwen-quant` processes without their start-up: a process that has imported torch forks for every command line.

Each command runs in a process of its own, with its own environment, working directory and output, and can be killed by
its id. The hub client reads its settings when it is imported, so it is not among what is imported beforehand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SERVER = """
import json, os, sys
sys.argv[0] = "qwen-quant"  # the package then leaves transformers alone, as in the command's own process
import qwen_quant.cli, qwen_quant.hub.card, qwen_quant.hub.push, qwen_quant.hub.consumer_rules
assert "huggingface_hub" not in sys.modules and "transformers" not in sys.modules
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    code = 1
    try:
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        qwen_quant.cli.main(request["arguments"])
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@dataclass
class Running:
    """One command line under way."""

    pid: int
    _zygote: Zygote
    _folder: tempfile.TemporaryDirectory[str]

    def communicate(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr), once it has ended; a signal's number is negative, as in subprocess."""
        code = self._zygote.ask({"wait": self.pid})
        out, err = ((Path(self._folder.name) / name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return code, out, err

    def kill(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


class Zygote:
    """Starts command lines. Close it at the end."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", _SERVER]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> Running:
        """`qwen-quant ARGUMENTS` in `folder`."""
        place = tempfile.TemporaryDirectory(prefix="zygote-")
        paths = {"out": f"{place.name}/out", "err": f"{place.name}/err"}
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder), **paths}
        return Running(self.ask(request), self, place)

    def ask(self, request: Mapping[str, object]) -> int:
        """The number that answers a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
