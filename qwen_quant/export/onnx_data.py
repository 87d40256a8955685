"""model.onnx.data: every tensor of an ONNX graph, written one by one, each at a multiple of 64 bytes.

A quantized linear [out, in] with G groups of n consecutive columns at `bits` bits becomes

    .codes   uint8 [out, G, n * bits / 8]      exactly `PackedRows.stream`
    .scales  FP32  [out, G]
    .zeros   uint8 [out, ceil(G * bits / 8)]   packed along the groups; left out for symmetric codes

and routed experts become the stacks of onnx_experts.py.  Everything else is as in the source.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export.behind import Behind, write_at
from qwen_quant.export.decoder import Decoder, kept_parts, packed_zeros
from qwen_quant.export.folder import COMMIT_BYTES, Specs, items, kept_dtype
from qwen_quant.export.formats import ExportOptions, Target
from qwen_quant.export.graph_parts import left_out
from qwen_quant.export.onnx_decoder import rotation_width
from qwen_quant.export.onnx_experts import DOWN, GATE_UP, stack_name
from qwen_quant.export.onnx_graph import onnx
from qwen_quant.export.stacks import EXPERT
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

DATA_FILE = "model.onnx.data"
ROTATION_POSITIONS = 131072  # rows of the tables of cosine and sine, at most the model's context
_ALIGNMENT = 64
_KINDS = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8"}


def zero_bytes(groups: int, bits: int) -> int:
    """Bytes of the packed zeros of a row."""
    return -(-groups * bits // 8)


def positions(decoder: Decoder) -> int:
    """How many positions the tables of rotation hold."""
    return min(decoder.context, ROTATION_POSITIONS)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the data file: its dtype, its shape and its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Data:
    """The data file while it is written.

    Places follow from shapes alone, so what an earlier run has written is passed over by giving no `parts`.
    """

    handle: int
    behind: Behind
    end: int = 0
    written: int = 0
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Give a tensor the next place."""
        found = Place(dtype, shape, -(-self.end // _ALIGNMENT) * _ALIGNMENT)
        self.places[name], self.end = found, found.start + found.nbytes

    def write(self, name: str, offset: int, part: Tensor) -> int:
        """Write a part of a tensor that has its place; returns its bytes."""
        size = write_at(self.handle, self.behind, self.places[name].start + offset, part.contiguous())
        self.written += size
        return size

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor] | None) -> None:
        """Place a whole tensor, its bytes in parts (None: they are there)."""
        self.place(name, dtype, shape)
        if parts is None:
            return
        written = 0
        for part in parts:
            written += self.write(name, written, part)
        if written != self.places[name].nbytes:
            raise AuditError(f"'{name}' has {written} bytes", f"planned {self.places[name].nbytes}")


def _specs(source: ExportSource, out: int, width: int) -> Specs:
    """What is stored of a weight [out, width]."""
    facts, groups = source.facts, width // source.facts.group_size
    shapes: Specs = {"codes": (torch.uint8, (out, groups, width // groups * facts.bits // 8))}
    shapes["scales"] = (torch.float32, (out, groups))
    if not facts.sym:
        shapes["zeros"] = (torch.uint8, (out, zero_bytes(groups, facts.bits)))
    return shapes


def _tensors(source: ExportSource, name: str) -> dict[str, Tensor]:
    packed = source.packed(name)
    zeros = packed_zeros(packed.grid.zeros, packed.bits)
    return {"codes": packed.stream, "scales": packed.grid.scales.float(), "zeros": zeros}


def _add_linear(source: ExportSource, name: str, data: _Data, *, known: bool) -> None:
    tensors = None if known else _tensors(source, name)
    for part, (dtype, shape) in _specs(source, *source.shape(name)).items():
        data.add(f"{name}.{part}", dtype, shape, None if tensors is None else [tensors[part]])


def _add_expert(source: ExportSource, name: str, data: _Data, *, known: bool) -> None:
    """A routed expert's linear, in its stack. The rows of gate and up are written together, when up's turn comes."""
    found = EXPERT.fullmatch(name)
    assert found is not None
    mlp, index, role = found["mlp"], int(found["index"]), found["role"]
    part = DOWN if role == "down" else GATE_UP
    (out, width), count = source.shape(name), source.spec.expert_count
    out *= 1 if part == DOWN else 2
    specs = _specs(source, out, width)
    if index == 0 and role != "up":
        for kind, (dtype, shape) in specs.items():
            sizes = (math.prod(shape[1:]),) if kind == "codes" else shape[1:]
            data.place(stack_name(mlp, part, kind), dtype, (count, out, *sizes))
    if known or role == "gate":
        return
    tensors = _tensors(source, name)
    if role == "up":
        gate = _tensors(source, f"{mlp}.experts.{index}.gate_proj")
        tensors = {kind: torch.stack([gate[kind], tensors[kind]], 1).flatten(0, 1) for kind in specs}
    for kind, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if data.write(stack_name(mlp, part, kind), index * size, tensors[kind]) != size:
            raise AuditError(f"'{name}.{kind}' does not have the planned {size} bytes")


def _add_kept(source: ExportSource, name: str, dtype: torch.dtype, data: _Data, *, known: bool) -> None:
    data.add(name, dtype, source.reader.info(name).shape, None if known else kept_parts(source, name, dtype))


def _add_rotation(decoder: Decoder, data: _Data) -> None:
    angles = torch.arange(positions(decoder), dtype=torch.float32)[:, None] * decoder.inv_freq[None]
    more = (0, rotation_width(decoder) - angles.shape[1])
    cosine, sine = (table * decoder.rope_scale for table in (angles.cos(), angles.sin()))
    for name, table, still in (("cos", cosine, 1.0), ("sin", sine, 0.0)):
        whole = torch.nn.functional.pad(table, more, value=still)
        data.add(f"rotation.{name}", torch.float32, tuple(whole.shape), [whole])


def write_data(
    source: ExportSource, options: ExportOptions, target: Target, decoder: Decoder, progress: ProgressFn
) -> dict[str, Place]:
    """The data file; continues after the item that `target.state` counts last. Returns where each tensor is."""
    linears, passed, path = set(source.linears), left_out(source), target.folder / DATA_FILE
    names = [name for name in items(source) if name not in passed]
    done, committed = int(target.state.get("items_done", 0)) if path.is_file() else 0, 0
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with Behind() as behind:
            data = _Data(handle, behind)
            for k, name in enumerate(names):
                progress("writing", k, len(names))
                if name in linears:
                    add = _add_expert if EXPERT.fullmatch(name) else _add_linear
                    add(source, name, data, known=k < done)
                else:
                    _add_kept(source, name, kept_dtype(source, name, options), data, known=k < done)
                if data.written - committed >= COMMIT_BYTES:
                    behind.drain()
                    os.fdatasync(handle)
                    target.commit({"items_done": k + 1})
                    committed = data.written
            _add_rotation(decoder, data)
        os.ftruncate(handle, data.end)
        os.fsync(handle)
    finally:
        os.close(handle)
    return data.places


def tensor_protos(places: dict[str, Place]) -> list[Any]:
    """The graph's initializers, which name places in the data file."""
    library, found = onnx(), []
    for name, place in places.items():
        kind = getattr(library.TensorProto, _KINDS[place.dtype])
        proto = library.TensorProto(name=name, data_type=kind, dims=place.shape)
        proto.data_location = library.TensorProto.EXTERNAL
        for key, value in {"location": DATA_FILE, "offset": place.start, "length": place.nbytes}.items():
            proto.external_data.add(key=key, value=str(value))
        found.append(proto)
    return found
