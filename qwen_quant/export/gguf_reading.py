"""GGUF files read back by gguf-py, every value in the place and order of the source."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export.formats import ExportOptions, Piece, require
from qwen_quant.export.gguf_layout import PLAIN, Entry, entries_of
from qwen_quant.export.pivot import row_slices
from qwen_quant.export.rows import row_pieces

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

_RELEASED_BYTES = 256 << 20  # of a mapped file, read and given back to the kernel at a time


class _Written:
    """Tensors of written files by name, through gguf-py, whose maps of the files are given back piece by piece."""

    def __init__(self, folder: Path) -> None:
        gguf: Any = require("gguf", "gguf", "gguf")
        self.quants = gguf.quants
        self.readers = [gguf.GGUFReader(str(path)) for path in sorted(folder.glob("*.gguf"))]
        self.tensors = {tensor.name: tensor for reader in self.readers for tensor in reader.tensors}
        self._read = 0

    def values(self, name: str, index: int | None, rows: slice = slice(None)) -> tuple[Tensor, str]:
        """(FP32 rows of a matrix or of one of a stack, flat values of a vector; type)."""
        tensor = self.tensors[name]
        data = np.array((tensor.data if index is None else tensor.data[index])[rows])
        found = np.asarray(self.quants.dequantize(data, tensor.tensor_type), dtype=np.float32)
        self._read += data.nbytes
        if self._read > _RELEASED_BYTES:
            for reader in self.readers:
                reader.data._mmap.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return torch.from_numpy(found), str(tensor.tensor_type.name)


def read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    """Pieces of every linear and kept tensor of the files."""
    written = _Written(folder)
    for sources, entries in itertools.groupby(entries_of(source, ExportOptions()), lambda entry: entry.sources):
        group = list(entries)
        for k, name in enumerate(sources):
            stack = k if len(group[0].shape) == 3 else None
            if name in source.linears and group[0].move.rows is not None:
                yield Piece(name, _collected(written, group, source.shape(name), stack))
            elif name in source.linears:
                for rows in row_slices(*source.shape(name)):
                    yield Piece(name, _in_place(written, group[0], stack, rows), rows.start)
            elif group[0].move.changes:
                yield _changed_piece(written, source, name, group)
            else:
                yield from _kept_pieces(written, source, name, group[0])


def _collected(written: _Written, group: list[Entry], shape: tuple[int, ...], stack: int | None) -> Tensor:
    """FP32 values of one tensor of the source, every row and column back in its place."""
    if group[0].move.rows is None:
        return _in_place(written, group[0], stack).view(shape)
    found = torch.full(shape, float("nan"))
    for entry in group:
        found[entry.move.rows] = _in_place(written, entry, stack).view(-1, *shape[1:])
    return found


def _in_place(written: _Written, entry: Entry, stack: int | None, rows: slice = slice(None)) -> Tensor:
    """FP32 rows of an entry, with their columns back in place."""
    values, _ = written.values(entry.name, stack, rows)
    return values if entry.move.columns is None else values[:, entry.move.columns.argsort()]


def _changed_piece(written: _Written, source: ExportSource, name: str, group: list[Entry]) -> Piece:
    """A kept tensor that is stored in another order or as a function of its values."""
    info = source.reader.info(name)
    values, value = _collected(written, group, info.shape, None), group[0].move.value
    return Piece(name, values if value is not None else _as_stored(values, info.dtype, name, group[0].kind), 0, value)


def _kept_pieces(written: _Written, source: ExportSource, name: str, entry: Entry) -> Iterator[Piece]:
    """A kept tensor's rows in its stored dtype."""
    info = source.reader.info(name)
    one = len(entry.shape) != len(info.shape)  # sizes of 1 are left out in the file
    for start, stop in [(0, info.shape[0])] if one else row_pieces(info):
        wide, kind = written.values(entry.name, None, slice(None) if one else slice(start, stop))
        yield Piece(name, _as_stored(wide, info.dtype, name, kind).view(stop - start, *info.shape[1:]), start)


def _as_stored(wide: Tensor, dtype: torch.dtype, name: str, kind: str) -> Tensor:
    """FP32 values in the source's dtype (AuditError for values that it cannot hold: they are a difference)."""
    values = wide.to(dtype)
    if not torch.equal(values.float(), wide) and kind in PLAIN:
        raise AuditError(f"'{name}' reads back with values that {dtype} cannot hold")
    return values
