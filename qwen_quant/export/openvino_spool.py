"""The constants of an OpenVINO model on their way into its .bin: collected in a file, then mapped from it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export.behind import Behind, write_at
from qwen_quant.export.openvino_ops import openvino

STACKS = "experts"  # in the names of their constants and MatMul nodes: ...mlp.experts.gate_proj
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_TYPE_BITS = {"u4": 4, "u8": 8, "f16": 16, "bf16": 16, "f32": 32, "i64": 64}
_VIEWS = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "bf16": np.float16}
_ALIGNMENT = 64


class Spool:
    """Bytes of constants in a file (open as `handle`) beside the model, and constants that are mapped from it.

    Places follow from shapes and their order alone, so what an earlier, killed run has collected need not be given
    again. `written` counts the bytes that were.
    """

    def __init__(self, path: Path, handle: int, behind: Behind) -> None:
        self.path, self.handle, self.behind, self.end, self.written = path, handle, behind, 0, 0
        self.places: dict[str, tuple[int, int, str, tuple[int, ...]]] = {}
        self.mapped: Any = None  # openvino's constants point into it without keeping it alive

    def place(self, name: str, kind: str, shape: tuple[int, ...]) -> None:
        """Give the constant `name` of openvino type `kind` the next place; one that has a place keeps it."""
        if name in self.places:
            return
        start = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        size = -(-math.prod(shape) * _TYPE_BITS[kind] // 8)
        self.places[name], self.end = (start, size, kind, shape), start + size

    def fill(self, name: str, parts: Iterable[Tensor], share: tuple[int, int] = (0, 1)) -> None:
        """Write share k of n equal ones of a constant that has a place, its bytes in parts.

        Errors: AuditError when they are not as many as planned.
        """
        start, size, _, _ = self.places[name]
        (index, count), done = share, 0
        planned = size // count
        for part in parts:
            done += write_at(self.handle, self.behind, start + index * planned + done, part.contiguous())
        if done != planned or planned * count != size:
            raise AuditError(f"'{name}' has {done} bytes", f"planned are {size} for {count}")
        self.written += done

    def sync(self) -> None:
        """Everything that was written is on the disk."""
        self.behind.drain()
        os.fdatasync(self.handle)

    def constants(self) -> dict[str, Any]:
        """name -> Constant; call it once everything is on the disk."""
        library, found = openvino(), {}
        self.mapped = mapped = np.memmap(self.path, dtype=np.uint8, mode="c")
        for name, (start, count, kind, shape) in self.places.items():
            view = mapped[start : start + count].view(_VIEWS.get(kind, np.uint8))
            tensor = library.Tensor(view, list(shape), getattr(library.Type, kind))
            found[name] = library.op.Constant(tensor, shared_memory=True)
            found[name].set_friendly_name(name)
        return found
