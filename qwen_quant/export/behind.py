"""Writing in a thread of its own, so that the next tensor is read and converted meanwhile.

Writing lets go of Python's lock, and so does torch; on two cores an export is about as slow as the slower of the two.
That takes a processor for each: a torch thread that waits for one of the two (writing, hashing the source) holds up all
others at the end of every small operation (GGUF on 2 cores: 14.6 s with two torch threads, 7.8 s with one).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import raw_bytes
from qwen_quant.checkpoint.writer import PlannedWriter

ROOM_BYTES = 128 << 20  # that may wait to be written
_BESIDE = 2  # threads beside torch's: writing and hashing


class Behind:
    """Runs calls in order in one thread; `drain` waits for all of them and raises what one of them raised.

    Nobody may change a tensor that was handed over.  With an exception in the `with` block, calls that have not begun
    are dropped.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._calls: deque[tuple[Future[None], int]] = deque()
        self._waiting = 0
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Behind:
        torch.set_num_threads(max(1, self._threads - _BESIDE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            torch.set_num_threads(self._threads)
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, nbytes: int, call: Callable[[], None]) -> None:
        """Have `call` run after those before it; waits while more than ROOM_BYTES of them have not."""
        self._calls.append((self._pool.submit(call), nbytes))
        self._waiting += nbytes
        while self._waiting > ROOM_BYTES:
            self._finish_first()

    def drain(self) -> None:
        """Wait for every call."""
        while self._calls:
            self._finish_first()

    def _finish_first(self) -> None:
        call, nbytes = self._calls.popleft()
        self._waiting -= nbytes
        call.result()


def write_part(writer: PlannedWriter, behind: Behind, name: str, start: int, values: Tensor) -> int:
    """`PlannedWriter.write_bytes`, behind; returns the bytes."""
    behind.submit(values.nbytes, lambda: writer.write_bytes(name, start, values))
    return values.nbytes


def write_tensor(writer: PlannedWriter, behind: Behind, name: str, tensor: Tensor) -> int:
    """`PlannedWriter.write`, behind; returns the bytes."""
    behind.submit(tensor.nbytes, lambda: writer.write(name, tensor))
    return tensor.nbytes


def write_at(handle: int, behind: Behind, offset: int, values: Tensor) -> int:
    """The bytes of contiguous `values` into an open file at `offset`, behind; returns how many."""
    behind.submit(values.nbytes, lambda: _pwrite(handle, offset, values))
    return values.nbytes


def _pwrite(handle: int, offset: int, values: Tensor) -> None:
    data, sent = raw_bytes(values), 0
    while sent < len(data):
        sent += os.pwrite(handle, data[sent:], offset + sent)
