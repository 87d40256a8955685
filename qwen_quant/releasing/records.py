"""What a release remembers of its finished stages: one JSON file a stage, written once its output is whole.

A record holds everything that decided the output (`inputs`) and the sha256 of every file of it.  A stage is skipped
when both are as recorded.  Of a file whose size and modification time are as recorded, the hash is not computed again,
as git does it; a stage that was killed has no record, or one of other inputs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import InputError, QwenQuantError
from qwen_quant.results import to_json
from qwen_quant.resume import differences, write_json_atomically

SCHEMA = "qwen-quant/release-stage/1"
FOLDER = "stages"
LOCK_FILE = ".lock"
_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class FileFacts:
    """One file of a stage's output: its hash, size in bytes and modification time in nanoseconds."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Record:
    """A finished stage.

    Attributes:
        stage: its name.
        inputs: everything that decided the output, as plain JSON.
        folder: where the output lies, below the work folder or absolute.
        files: every file of it that later stages read, by name below `folder`.
        present: names that must exist; their bytes are another stage's affair.
        figures: what it measured or made, as plain JSON. summary: the same in one line.
        seconds: what it took. finished: when, in UTC (ISO 8601).
    """

    stage: str
    inputs: dict[str, Any]
    folder: str
    files: dict[str, FileFacts]
    present: tuple[str, ...]
    figures: dict[str, Any]
    summary: str
    seconds: float
    finished: str

    @property
    def digest(self) -> str:
        """One sha256 for the output: of the lines "{sha256}  {name}\\n", sorted by name."""
        lines = "".join(f"{facts.sha256}  {name}\n" for name, facts in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Made:
    """What a stage hands back: the files of its output and what to say of it (fields as in `Record`).

    Attributes:
        error: why the release must stop although the output is there (a failed gate); such a stage is not remembered.
    """

    folder: Path
    names: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    error: QwenQuantError | None = None


def inputs_sha256(inputs: dict[str, Any]) -> str:
    """sha256 of the inputs as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_facts(folder: Path, names: Sequence[str]) -> dict[str, FileFacts]:
    """Hash every named file of `folder` (InputError when one is missing: the stage did not make it)."""
    found = {}
    for name in names:
        path = folder / name
        try:
            stat = path.stat()
            found[name] = FileFacts(file_sha256(path), stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise InputError(f"{path} is missing", str(error.strerror), "run the release again") from error
    return found


def why_run(record: Record | None, inputs: dict[str, Any], work: Path) -> str:
    """Why a stage must run, in words; "" when its recorded output is whole and was made from the same inputs."""
    if record is None:
        return "it has not run yet"
    if record.inputs != inputs:
        changes = differences(record.inputs, inputs)
        more = f" and {len(changes) - _SHOWN_DIFFERENCES} more" if len(changes) > _SHOWN_DIFFERENCES else ""
        return "; ".join(map(_short, changes[:_SHOWN_DIFFERENCES])) + more
    folder = work / record.folder
    for name in record.present:
        if not (folder / name).exists():
            return f"{folder / name} is missing"
    for name, facts in record.files.items():
        if (problem := _problem(folder / name, facts)) is not None:
            return problem
    return ""


def _short(change: str) -> str:
    return change if len(change) <= 120 else change[:117] + "..."


def _problem(path: Path, facts: FileFacts) -> str | None:
    """What is wrong with a file of an output; None where it is as recorded."""
    try:
        stat = path.stat()
        if stat.st_size == facts.size and stat.st_mtime_ns == facts.mtime_ns:
            return None
        if stat.st_size == facts.size and file_sha256(path) == facts.sha256:
            return None
    except OSError:
        return f"{path} is missing"
    return f"{path} has changed"


def write_record(work: Path, record: Record) -> None:
    """Remember a finished stage (replaced atomically)."""
    folder = work / FOLDER
    folder.mkdir(exist_ok=True)
    write_json_atomically(folder / f"{record.stage}.json", {"schema": SCHEMA, **to_json(record)})


def read_record(work: Path, stage: str) -> Record | None:
    """The record of a stage; None when there is none, or none that this version can read: the stage runs again."""
    try:
        found = json.loads((work / FOLDER / f"{stage}.json").read_text(encoding="utf-8"))
        if found.pop("schema") != SCHEMA:
            return None
        files = {name: FileFacts(**facts) for name, facts in found.pop("files").items()}
        return Record(**{**found, "files": files, "present": tuple(found["present"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the work folder (made where missing) for this process; the lock goes with the process, however it ends.

    Errors: InputError when another release works there, or the folder cannot be made.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = open(work / LOCK_FILE, "ab")
    except OSError as error:
        raise InputError(f"cannot work in {work}", error.strerror or str(error), "give another --work DIR") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            step = "wait for it to end, or give another --work DIR"
            raise InputError(f"another release is working in {work}", next_step=step) from error
        yield
