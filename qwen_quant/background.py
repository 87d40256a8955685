"""One piece of work in a thread of its own, for what lets go of Python's lock (hashing, reading, writing)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Found = TypeVar("Found")


def in_background(work: Callable[[], Found]) -> Callable[[], Found]:
    """Start `work` in a thread that an exit does not wait for; what is returned waits for its result, or raises."""
    future: Future[Found] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised again by whoever waits)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result
