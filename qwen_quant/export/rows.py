"""Rows of stored tensors, so that the largest matrix is never in memory whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import TensorInfo

_PIECE_BYTES = 32 << 20


def stored_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop (dimension 0; None: to the end) of a tensor as stored; a scalar is read as it is."""
    count = info.shape[0] if info.shape else 1
    stop = count if stop is None else min(stop, count)
    row_bytes = info.nbytes // max(count, 1)
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    nbytes = (stop - start) * row_bytes
    raw = np.fromfile(info.file, dtype=np.uint8, count=nbytes, offset=info.offset + start * row_bytes)
    return torch.from_numpy(raw).view(info.dtype).view(shape)


def row_pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows of about 32 MiB; a scalar is one run."""
    count = info.shape[0] if info.shape else 1
    step = max(1, _PIECE_BYTES * count // max(info.nbytes, 1))
    for start in range(0, count, step):
        yield start, min(start + step, count)
