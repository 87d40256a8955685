"""Tensors that go from one checkpoint to another with the same numbers: whole, shared, or cut into equal parts.

A tensor is copied in pieces of 16 MiB, so that the largest matrix is never in memory; only one that is cut into columns
is read whole.  `joined_sha256` is the proof: it reads the parts back and puts them together again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.checkpoint.audit import content_sha256
from qwen_quant.checkpoint.reader import CheckpointReader, TensorInfo, raw_bytes
from qwen_quant.checkpoint.writer import PlannedWriter


@dataclass(frozen=True)
class Move:
    """One tensor of the source and where it goes.

    Attributes:
        source: its name and place.
        targets: its new names.
        axis: dimension (0 or 1) along which equal consecutive parts go to the targets, or None: each gets the whole.
    """

    source: TensorInfo
    targets: tuple[str, ...]
    axis: int | None

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of each target."""
        shape = list(self.source.shape)
        if self.axis is not None:
            shape[self.axis] //= len(self.targets)
        return tuple(shape)

    @property
    def how(self) -> str:
        """In words, for the record."""
        if self.axis is not None:
            return "split by columns" if self.axis else "split by rows"
        return "shared" if len(self.targets) > 1 else "unchanged"


def copy_tensor(reader: CheckpointReader, writer: PlannedWriter, move: Move) -> str:
    """Write the targets of one tensor; returns the sha256 of the source tensor's values."""
    if move.axis == 1:
        whole = reader.read(move.source.name)
        for name, part in zip(move.targets, whole.chunk(len(move.targets), dim=1), strict=True):
            writer.write(name, part.contiguous())
        return content_sha256([whole])
    digest = hashlib.sha256()
    size = move.source.nbytes // (1 if move.axis is None else len(move.targets))
    for start, piece in reader.parts(move.source.name):
        digest.update(raw_bytes(piece))
        for k, name in enumerate(move.targets):
            _write_overlap(writer, name, (start, piece), (0 if move.axis is None else k * size, size))
    for name in move.targets:
        writer.finish_parts(name)
    return digest.hexdigest()


def _write_overlap(writer: PlannedWriter, name: str, piece: tuple[int, Tensor], span: tuple[int, int]) -> None:
    """Of a piece (first byte, flat values) of the source, write what lies in the target's span (first byte, bytes)."""
    start, values = piece
    width = values.element_size()
    low, high = max(start, span[0]), min(start + values.numel() * width, span[0] + span[1])
    if low < high:
        writer.write_bytes(name, low - span[0], values[(low - start) // width : (high - start) // width])


def joined_sha256(reader: CheckpointReader, move: Move) -> set[str]:
    """sha256 of the source tensor as the new checkpoint holds it: its parts joined again, or every full copy.

    A right copy gives exactly the one value that `copy_tensor` returned.
    """
    if move.axis == 1:
        return {content_sha256([torch.cat([reader.read(name) for name in move.targets], dim=1)])}
    if move.axis == 0:
        return {content_sha256(part for name in move.targets for _, part in reader.parts(name))}
    return {content_sha256(part for _, part in reader.parts(name)) for name in move.targets}
