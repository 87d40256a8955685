"""One file from a source to its place: continued where it was left, hashed when it is complete, fetched again once.

A partial file survives whatever happens; only a wrong hash removes it. The rename to the file's own name comes after
the hash, so a name that is there is a file that was right.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from qwen_quant.errors import NetworkError
from qwen_quant.hub.failures import client_errors, redact
from qwen_quant.hub.fingerprint import git_blob_id, matches, sha256
from qwen_quant.hub.plan_files import Listing, RemoteFile
from qwen_quant.hub.store import Store, Verified, guard, link
from qwen_quant.hub.transport import (
    Body,
    Broken,
    RetryPolicy,
    Source,
    StoppedError,
    is_passing,
    pause,
    wait_seconds,
)
from qwen_quant.progress import ProgressFn

_LOG = logging.getLogger(__name__)
_GAIN_BYTES = 1 << 20
_PLAIN_AFTER_FAILURES = 2
_MIB = 1 << 20


@dataclass(frozen=True)
class FetchedFile:
    """What became of one file.

    Attributes:
        path: as the hub names it.
        size: bytes.
        sha256: the listed sha256, None where the hub lists a git blob id only.
        blob_id: git's id.
        how: "reused" (complete before), "fetched", "resumed" (continued) or "fetched twice" (the first copy was wrong).
        bytes_fetched: received in this run.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str | None
    how: str
    bytes_fetched: int = 0


class Meter:
    """Bytes received by all threads, as progress in MiB (the bar then shows MiB per second and the time left)."""

    def __init__(self, progress: ProgressFn, label: str, total: int) -> None:
        self._progress, self._label, self._total = progress, label, max(1, -(-total // _MIB))
        self._done, self._shown = 0, -1
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` bytes more (less, when a wrong copy is thrown away)."""
        with self._lock:
            self._done += count
            now = min(self._done // _MIB, self._total)
            if now != self._shown:
                self._shown = now
                self._progress(self._label, now, self._total)


@dataclass(frozen=True)
class Transfer:
    """What all threads of a run share."""

    source: Source
    listing: Listing
    store: Store
    verified: Verified
    meter: Meter
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stop: threading.Event = field(default_factory=threading.Event)


def fetch_file(run: Transfer, file: RemoteFile) -> FetchedFile:
    """Bring `file` to its place in the store.

    Errors: NetworkError naming the file when two copies had the wrong content; what the client raises when it gives up.
    """
    partial, home = run.store.partial(file), run.store.home(file)
    for path in (partial, home):
        guard(run.store, path)
        path.parent.mkdir(parents=True, exist_ok=True)
    begun = partial.stat().st_size if _is_plain(partial) else 0
    received = _receive(run, file, partial, plain=False)
    how = "resumed" if begun and received < file.size else "fetched"
    if not _is_right(partial, file):
        _LOG.warning("%s arrived with the wrong content: fetching it again", file.path)
        run.meter.add(-file.size)
        partial.unlink()
        received += _receive(run, file, partial, plain=True)
        how = "fetched twice"
        if not _is_right(partial, file):
            raise _wrong_twice(run.listing, file, partial)
    os.replace(partial, home)
    run.verified.add(home, file)
    link(run.store, file)
    return FetchedFile(file.path, file.size, file.sha256, file.blob_id, how, received)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_right(partial: Path, file: RemoteFile) -> bool:
    return matches(partial, file.size, file.sha256, file.blob_id)


def _wrong_twice(listing: Listing, file: RemoteFile, partial: Path) -> NetworkError:
    """Both copies were wrong: say what came and what was listed; nothing of it is kept."""
    got = sha256(partial) if file.sha256 else git_blob_id(partial)
    partial.unlink()
    return NetworkError(
        f"'{file.path}' of '{listing.name}' arrived damaged twice",
        f"its {'sha256' if file.sha256 else 'git blob id'} is {got}, the hub lists {file.content_id}",
        "run the same command again; if it stays so, a proxy or the hub's own copy is damaged",
    )


def _receive(run: Transfer, file: RemoteFile, partial: Path, *, plain: bool) -> int:
    """Fill `partial` up to the file's size, continuing what is there; returns the bytes received."""
    received, failures = 0, 0
    if not _is_plain(partial) or partial.stat().st_size > file.size:
        partial.unlink(missing_ok=True)
        partial.touch()
    while (have := partial.stat().st_size) < file.size:
        try:
            with run.source.open(run.listing, file, have, plain=plain or failures >= _PLAIN_AFTER_FAILURES) as body:
                _append(run, body, partial, file.size)
            gained = partial.stat().st_size - have
            if partial.stat().st_size < file.size:
                raise Broken(f"{file.path} ended after {partial.stat().st_size} of {file.size} bytes")
        except client_errors() as error:
            gained = partial.stat().st_size - have
            failures = 1 if gained >= _GAIN_BYTES else failures + 1
            _give_up_or_wait(run, file, partial, error, failures)
        received += max(0, gained)
    return received


def _append(run: Transfer, body: Body, partial: Path, size: int) -> None:
    """Write a body at its place and make it durable, however it ends; bytes past `size` are refused."""
    with open(partial, "r+b", buffering=0) as file:
        place = file.seek(0, os.SEEK_END)
        if body.start != place:
            # The server gives the whole file again: what was counted is counted anew.
            run.meter.add(body.start - place)
            file.truncate(body.start)
            place = file.seek(body.start)
        try:
            for chunk in body.chunks:
                if run.stop.is_set():
                    raise StoppedError
                if place + len(chunk) > size:
                    file.truncate(0)
                    run.meter.add(-place)
                    raise Broken(f"{partial.name}: more than the listed {size} bytes")
                file.write(chunk)
                place += len(chunk)
                run.meter.add(len(chunk))
        finally:
            os.fsync(file.fileno())


def _give_up_or_wait(run: Transfer, file: RemoteFile, partial: Path, error: Exception, failures: int) -> None:
    """Raise what will not pass by itself; wait for the rest."""
    if run.stop.is_set():
        raise StoppedError from error
    if getattr(getattr(error, "response", None), "status_code", None) == 416:
        run.meter.add(-partial.stat().st_size)
        partial.write_bytes(b"")
    elif not is_passing(error):
        raise error
    if failures >= run.policy.attempts:
        raise error
    wait = wait_seconds(error, failures, run.policy)
    _LOG.info("%s: %s; again in %.1f s", file.path, redact(str(error)), wait)
    started = time.monotonic()
    pause(wait, run.stop)
    _LOG.debug("waited %.1f s", time.monotonic() - started)
