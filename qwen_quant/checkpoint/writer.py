"""Writing a sharded safetensors checkpoint whose every byte is planned before the first tensor exists.

Names, dtypes and shapes are known in advance, so headers and offsets are too: each file is created at its full length
(a full disk fails here, not after hours), and a tensor is written to its place when it is ready.  The writer holds one
tensor, writing again is idempotent, and a resumed run ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, raw_bytes
from qwen_quant.errors import AuditError

_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedShard:
    """One file: its name, its tensors in file order, its header and each tensor's absolute offset."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def _shard(file_name: str, tensors: list[PlannedTensor]) -> PlannedShard:
    """Lay out one file: widest dtypes first, so every tensor is aligned without the holes that the format forbids."""
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for tensor in ordered:
        relative[tensor.name] = position
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in relative.items()}
    return PlannedShard(file_name, tuple(ordered), header, offsets, len(header) + position)


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_size_bytes: int) -> tuple[PlannedShard, ...]:
    """Fill files in order up to `max_shard_size_bytes` of data each; one larger tensor gets a file of its own."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_size_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return (_shard(SINGLE_FILE, groups[0]),)
    count = len(groups)
    return tuple(_shard(f"model-{i + 1:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups))


class PlannedWriter:
    """Creates the planned files in `folder` and fills them tensor by tensor.

    Args:
        folder: existing folder; files already there with the planned header and length are continued.
        shards: from `plan_shards`.

    Errors: OSError (disk full among them); AuditError when a tensor differs from its plan or was never written.
    """

    def __init__(self, folder: Path, shards: tuple[PlannedShard, ...]) -> None:
        self.folder, self.shards = folder, shards
        self._place = {t.name: (shard, t) for shard in shards for t in shard.tensors}
        self._written: set[str] = set()
        self._files = {shard.file_name: self._create(shard) for shard in shards}

    def _create(self, shard: PlannedShard) -> int:
        handle = os.open(self.folder / shard.file_name, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(handle, min(os.fstat(handle).st_size, shard.nbytes))
        os.posix_fallocate(handle, 0, shard.nbytes)
        os.pwrite(handle, shard.header, 0)
        return handle

    def mark_written(self, names: Iterable[str]) -> None:
        """Tensors that an earlier, interrupted run has already made durable."""
        self._written.update(names)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place (again, if need be)."""
        shard, planned = self._place[name]
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise AuditError(
                f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}", f"planned {planned.dtype} {planned.shape}"
            )
        self.write_bytes(name, 0, tensor)
        self._written.add(name)

    def write_bytes(self, name: str, start: int, part: Tensor) -> None:
        """Write the contiguous values of `part` at byte `start` of tensor `name`; `finish_parts` closes the tensor."""
        shard, _ = self._place[name]
        if not part.numel():
            return
        view, done = raw_bytes(part), 0
        while done < len(view):
            done += os.pwrite(self._files[shard.file_name], view[done:], shard.offsets[name] + start + done)

    def finish_parts(self, name: str) -> None:
        """Declare a tensor written in parts complete."""
        self._written.add(name)

    def sync(self) -> None:
        """Make everything written so far durable."""
        for handle in self._files.values():
            os.fdatasync(handle)

    def close(self) -> None:
        """Release the file handles."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    def finish(self) -> None:
        """Sync, close, and write the index last (only for several files)."""
        missing = [name for name in self._place if name not in self._written]
        if missing:
            raise AuditError(f"{len(missing)} planned tensors were never written, first '{missing[0]}'")
        self.sync()
        self.close()
        if len(self.shards) > 1:
            weight_map = {t.name: shard.file_name for shard in self.shards for t in shard.tensors}
            total = sum(t.nbytes for shard in self.shards for t in shard.tensors)
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
            )
            (self.folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
