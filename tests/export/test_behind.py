"""Writing behind: in order, within its room, and never silently lost."""

from __future__ import annotations

import threading

import pytest

from qwen_quant.export import behind as module
from qwen_quant.export.behind import Behind


def test_calls_run_in_order_and_are_all_done_after_drain() -> None:
    done: list[int] = []
    with Behind() as behind:
        for k in range(50):
            behind.submit(1, lambda k=k: done.append(k))
        behind.drain()
        assert done == list(range(50))
        behind.submit(1, lambda: done.append(50))
    assert done[-1] == 50


def test_a_failed_write_is_raised() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Behind() as behind:
        behind.submit(1, full)


def test_no_more_waits_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM_BYTES", 10)
    gate, done, waits = threading.Event(), [], []
    with Behind() as behind:
        behind.submit(6, gate.wait)
        threading.Timer(0.05, lambda: (waits.append(len(done)), gate.set())).start()
        behind.submit(6, lambda: done.append(1))  # comes back only when the first is through
        assert waits == [0]
    assert done == [1]


def test_what_has_not_begun_is_dropped_after_an_error() -> None:
    gate, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Behind() as behind:
        behind.submit(1, gate.wait)
        behind.submit(1, lambda: done.append(1))
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt
    assert done == []
