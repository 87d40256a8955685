"""Durable progress of an unfinished run, beside its output.

`.{OUT}.partial/` holds `artifact/` (the output being built) and `state/`: what the run was asked to do (run.json), how
many blocks are done with their statistics (progress.json, replaced atomically) and the hidden states that enter the
next block (two sets of files, written alternately, so that the last complete set is never overwritten). One process at
a time works in it: a lock says so, which the system takes off a process that ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qwen_quant.environment import free_disk_bytes
from qwen_quant.errors import InputError
from qwen_quant.units import format_bytes

PROGRESS_FILE = "progress.json"
RUN_FILE = "run.json"
LOCK_FILE = "lock"


def write_json_atomically(path: Path, value: Any) -> None:
    """Write JSON beside `path`, make it durable, rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_disk(out: Path, need: int, purpose: str = "") -> None:
    """The disk of `out` has `need` bytes free, for what `purpose` says (InputError otherwise)."""
    free = free_disk_bytes(out)
    if need > free:
        raise InputError(
            f"the disk of {out.parent} is full",
            f"{format_bytes(need)} needed{purpose}, {format_bytes(free)} free",
            "free some space or give an OUT on another disk",
        )


@dataclass(frozen=True)
class WorkFolder:
    """The folder of an unfinished run of `out`."""

    out: Path
    _held: list[IO[str]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def root(self) -> Path:
        """`.{OUT}.partial` beside OUT."""
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def artifact(self) -> Path:
        """The output being built."""
        return self.root / "artifact"

    @property
    def state(self) -> Path:
        """Settings, progress and hidden states."""
        return self.root / "state"

    def check_disk(self, need: int) -> None:
        """There is room for an output of `need` bytes, of which some may be here already (InputError otherwise)."""
        already = sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file()) if self.root.exists() else 0
        check_disk(self.out, need - already)

    def hidden_file(self, stream: int, blocks_done: int) -> Path:
        """Where the hidden states of `stream` after `blocks_done` blocks lie."""
        return self.state / f"hidden-{stream}-{blocks_done % 2}.bin"

    def open(self, run: dict[str, Any], *, resume: bool) -> dict[str, Any]:
        """Create the folder for `run`, or find the same run's progress in it.

        Args:
            run: everything that decides the output's bytes, as plain JSON.
            resume: continue an earlier run; else discard it.

        Returns:
            The progress ({"blocks_done": 0, "layers": []} for a new run).
            Errors: InputError naming the difference when the earlier run was asked for something else.
        """
        run = json.loads(json.dumps(run))
        self._claim()
        if not resume:
            self._clear()
        earlier = self._read(RUN_FILE)
        if earlier is not None and earlier != run:
            raise InputError(
                f"{self.root} holds an unfinished run with other settings",
                "; ".join(differences(earlier, run)),
                "repeat the earlier command to finish it, or add --no-resume to start over",
            )
        self._make_folders()
        if earlier is None:
            write_json_atomically(self.state / RUN_FILE, run)
        return self._read(PROGRESS_FILE) or {"blocks_done": 0, "layers": [], "seconds": 0.0}

    @property
    def is_begun(self) -> bool:
        """Whether a run lies there that has said what it was asked for."""
        return (self.state / RUN_FILE).exists()

    def create(self) -> None:
        """Make the folder empty, for a run that says with `open` what it is before it commits anything."""
        self._claim()
        self._clear()
        self._make_folders()

    def _clear(self) -> None:
        for place in (self.artifact, self.state):
            shutil.rmtree(place, ignore_errors=True)

    def _make_folders(self) -> None:
        try:
            self.artifact.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.out.parent}", error.strerror or str(error), "give another OUT"
            ) from error

    def _claim(self) -> None:
        """Make the folder and lock it, once (InputError when another process works in it)."""
        if self._held:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = open(self.root / LOCK_FILE, "w", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.out.parent}", error.strerror or str(error), "give another OUT"
            ) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise InputError(
                    f"another run is writing {self.out}", f"it works in {self.root}", "wait for it, or give another OUT"
                ) from error
        self._held.append(handle)

    def holds_other(self, run: dict[str, Any]) -> bool:
        """Whether an unfinished run lies there that was asked for something else than `run`."""
        earlier = self._read(RUN_FILE)
        return earlier is not None and earlier != json.loads(json.dumps(run))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value = json.loads((self.state / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{self.state / name} is damaged", str(error), "start over with --no-resume") from error
        return value if isinstance(value, dict) else None

    def commit(self, progress: dict[str, Any]) -> None:
        """Declare blocks done; everything they wrote must be durable already."""
        write_json_atomically(self.state / PROGRESS_FILE, progress)

    def publish(self, *, force: bool) -> None:
        """Rename the finished artifact to OUT and remove the work folder; an old OUT goes once the new one stands."""
        old = self.out.parent / f".{self.out.name}.old"
        if self.out.exists():
            if not force:
                raise InputError(
                    f"{self.out} appeared while the run was going on", next_step="move it away and run again"
                )
            if old.exists():
                shutil.rmtree(old)
            os.rename(self.out, old)
        os.rename(self.artifact, self.out)
        shutil.rmtree(self.root)
        while self._held:
            self._held.pop().close()
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()


def differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """ "key was X, is now Y" for every leaf that differs between two nested JSON objects."""
    found = []
    for key in sorted(set(earlier) | set(now)):
        was, is_now = earlier.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += differences(was, is_now, f"{prefix}{key}.")
        elif was != is_now:
            found.append(f"{prefix}{key} was {was!r}, is now {is_now!r}")
    return found
