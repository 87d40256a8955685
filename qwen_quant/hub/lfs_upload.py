"""Large files by git LFS: what the hub stores already is not sent again, so an interrupted push goes on file by file.

A file is read in small pieces as it is sent; memory does not grow with it. A piece of state is deliberately absent: the
hub's own answer to "what do you have?" is asked anew in every round.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from qwen_quant.errors import NetworkError
from qwen_quant.hub.failures import client_errors
from qwen_quant.hub.session import Session, ask
from qwen_quant.hub.target import UploadFile
from qwen_quant.hub.transport import RetryPolicy, StoppedError, is_passing, pause, wait_seconds
from qwen_quant.progress import ProgressFn

_MIB = 1 << 20
_THREADS = 4
_POLICY = RetryPolicy(attempts=4, first_wait_seconds=1.0)
_BATCH = 256
_MALFORMED = (ValueError, KeyError)


class _Meter:
    """Bytes that all threads have handed to the network, as progress; `stop` ends their reading."""

    def __init__(self, files: Sequence[UploadFile], progress: ProgressFn) -> None:
        self.stop = threading.Event()
        self._total = sum(file.size for file in files)
        self._places: dict[str, int] = {}
        self._progress, self._lock = progress, threading.Lock()

    def reached(self, name: str, place: int) -> None:
        """A thread has read `name` up to byte `place`."""
        with self._lock:
            self._places[name] = place
            done = sum(self._places.values())
            self._progress("uploading (MiB)", done // _MIB, max(1, self._total // _MIB))


class _CountedFile(io.FileIO):
    """A file that reports how far it has been read; a link in its place is not followed."""

    def __init__(self, file: UploadFile, meter: _Meter) -> None:
        super().__init__(os.open(file.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
        self._name, self._meter = file.name, meter

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes (StoppedError when the run is stopped)."""
        if self._meter.stop.is_set():
            raise StoppedError
        data = super().read(-1 if size is None else size)
        self._meter.reached(self._name, self.tell())
        return data or b""


def upload_lfs(session: Session, files: Sequence[UploadFile], progress: ProgressFn) -> None:
    """Bring the content of `files` into the hub's LFS storage. Raises what the client raises."""
    meter, left, failures = _Meter(files, progress), list(files), 0
    while left:
        done, error = _round(session, left, meter)
        left = [file for file in left if file.name not in done]
        if error is None:
            return
        failures = 1 if done else failures + 1
        # The storage answers 400 to bytes that were damaged on the way: sending them again mends that.
        mendable = is_passing(error) or getattr(getattr(error, "response", None), "status_code", 0) == 400
        if failures >= _POLICY.attempts or not mendable:
            raise error
        pause(wait_seconds(error, failures, _POLICY), meter.stop)


def _round(session: Session, files: Sequence[UploadFile], meter: _Meter) -> tuple[set[str], Exception | None]:
    """Try every file once: names of those that are stored now, and the first error."""
    additions = {file.sha256: _addition(file, meter) for file in files}
    by_sha256 = {file.sha256: file for file in files}
    actions = [
        action for start in range(0, len(files), _BATCH) for action in _actions(session, files, start, additions)
    ]
    waiting = {action["oid"] for action in actions if action.get("actions")}
    done = {file.name for file in files if file.sha256 not in waiting}
    for name in done:
        meter.reached(name, next(file.size for file in files if file.name == name))
    first: Exception | None = None
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="push")
    try:
        futures = {
            by_sha256[action["oid"]].name: pool.submit(_send, session, additions[action["oid"]], action)
            for action in actions
            if action["oid"] in waiting
        }
        for name, future in futures.items():
            try:
                future.result()
                done.add(name)
            except client_errors() as error:
                first = first or error
    except BaseException:
        meter.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return done, first


def _actions(session: Session, files: Sequence[UploadFile], start: int, additions: dict[str, Any]) -> list[Any]:
    """What the hub wants done for one batch of files: nothing for what it has."""
    from huggingface_hub.lfs import post_lfs_batch_info

    infos = [additions[file.sha256].upload_info for file in files[start : start + _BATCH]]
    revision = None if session.create_pr else session.quoted_branch
    try:
        found, refused, _ = ask(
            lambda: post_lfs_batch_info(
                infos,
                token=None,
                repo_type="model",
                repo_id=session.repo_id,
                revision=revision,
                endpoint=session.endpoint,
                headers=session.headers,
            )
        )
    except client_errors():
        raise  # some of them are ValueErrors too
    except _MALFORMED as error:
        raise _unusable(session, str(error)) from error
    if refused:
        raise _unusable(session, str(refused[0]["error"]["message"]))
    return list(found)


def _send(session: Session, addition: Any, action: dict[str, Any]) -> None:
    from huggingface_hub.lfs import lfs_upload

    try:
        lfs_upload(operation=addition, lfs_batch_action=action, headers=session.headers, endpoint=session.endpoint)
    except client_errors():
        raise  # some of them are ValueErrors too
    except _MALFORMED as error:
        raise _unusable(session, str(error)) from error


def _unusable(session: Session, why: str) -> NetworkError:
    return NetworkError(f"cannot push to '{session.repo_id}'", f"LFS storage refuses: {why}", "run the command again")


def _addition(file: UploadFile, meter: _Meter) -> Any:
    """The client's own record of a file to add, reading through `_CountedFile` and with its sha256 known already."""
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            with _CountedFile(file, meter) as stream:
                yield cast(BinaryIO, stream)

    addition = Addition(path_in_repo=file.name, path_or_fileobj=str(file.path))
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition
