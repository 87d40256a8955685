"""Hidden states of the calibration set: the only thing that grows with the data.

Held in BF16 (evaluation asks for FP32), in memory up to a limit and in a plain file beyond it.  The file is read and
written in batches with ordinary file calls, so that it lives in the page cache, which the kernel can reclaim, and not
in the resident set.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

RAM_LIMIT_BYTES = 2 << 30
BYTES_PER_VALUE = 2


class ActivationStore:
    """Values [rows, tokens, width] in `dtype`, in memory or, when `path` is given, in that file.

    Errors: OSError from the file system (disk full among them) is passed on to the caller's boundary.
    """

    def __init__(
        self, shape: tuple[int, int, int], path: Path | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._memory = torch.empty(shape, dtype=dtype) if path is None else None
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.posix_fallocate(self._file, 0, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store."""
        rows, tokens, width = self.shape
        return rows * tokens * width * self.dtype.itemsize

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def load(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as [stop - start, tokens, width]; not to be written to."""
        if self._memory is not None:
            return self._memory[start:stop]
        assert self._file is not None
        buffer = bytearray((stop - start) * self._row_bytes)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = os.preadv(self._file, [view[done:]], start * self._row_bytes + done)
            if not count:
                raise OSError("the file of hidden states was truncated while it was in use")
            done += count
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *self.shape[1:])

    def gather(self, tokens: Tensor) -> Tensor:
        """The states of single tokens (int64 [n], row * row length + place) as [n, width], in memory of their own."""
        if self._memory is not None:
            return self._memory.view(-1, self.shape[2])[tokens]
        assert self._file is not None
        size = self.shape[2] * self.dtype.itemsize
        buffer = bytearray(tokens.numel() * size)
        view = memoryview(buffer)
        for k, token in enumerate(tokens.tolist()):
            if os.preadv(self._file, [view[k * size : (k + 1) * size]], token * size) != size:
                raise OSError("the file of hidden states was truncated while it was in use")
        return torch.frombuffer(buffer, dtype=self.dtype).view(-1, self.shape[2])

    def save(self, start: int, values: Tensor) -> None:
        """Store rows from `start` on; `values` [n, tokens, width] is rounded to `dtype`."""
        rounded = values.detach().to("cpu", self.dtype)
        if self._memory is not None:
            self._memory[start : start + values.shape[0]] = rounded
            return
        assert self._file is not None
        view, done = rounded.contiguous().view(torch.uint8).numpy().data.cast("B"), 0
        while done < len(view):
            done += os.pwritev(self._file, [view[done:]], start * self._row_bytes + done)

    def dump(self, path: Path) -> None:
        """Make the content durable at `path` (a store in a file must already be that file)."""
        if self._memory is None:
            assert self._file is not None
            os.fdatasync(self._file)
            return
        with open(path, "wb") as file:
            file.write(self._memory.view(torch.uint8).numpy().data.cast("B"))
            file.flush()
            os.fdatasync(file.fileno())

    def restore(self, path: Path) -> None:
        """Fill a store in memory from what `dump` wrote."""
        if self._memory is not None:
            with open(path, "rb") as file:
                file.readinto(self._memory.view(torch.uint8).numpy().data.cast("B"))

    def close(self) -> None:
        """Release the memory or the file handle."""
        self._memory = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
