"""One piece of work in a thread of its own, for what lets go of Python's lock (hashing, reading, writing)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def in_background(work: Callable[[], Found]) -> Callable[[], Found]:
    """Start `work` in a thread that an exit does not wait for; what is returned waits for its result, or raises."""
    found: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again by whoever waits)
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Found:
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    return wait
