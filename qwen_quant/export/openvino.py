"""OpenVINO IR (openvino_model.xml and .bin): the whole decoder, with codes, scales and zeros as they are.

The weight of a linear [out, in] with G groups of n consecutive columns is, in the graph,

    Constant u4 or u8 [out, G, n] -> Convert f32 -> Subtract zeros -> Multiply scales -> Reshape [out, in]

with zeros u4 or u8 [out, G, 1] (one number for symmetric codes) and scales in the source's dtype [out, G, 1], both
converted to FP32.  code - zero is exact and the product is rounded once, as everywhere in this package; OpenVINO's CPU
plugin keeps the codes packed and multiplies from them.  Act-order: the columns are sorted by group, and the input goes
through a Gather with the same order.

Codes are collected in a temporary file that is mapped while openvino writes the .bin, so that memory holds one linear
at a time and not the model; so twice the disk space is needed for a moment. Collecting continues after a kill.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.environment import free_disk_bytes
from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import checks
from qwen_quant.export.behind import Behind, write_at
from qwen_quant.export.decoder import (
    DENSE_FAMILIES,
    kept_parts,
    notes_of,
    packed_zeros,
    read_decoder,
    refusals,
    write_companions,
)
from qwen_quant.export.folder import COMMIT_BYTES, REST_DTYPES, items, kept_dtype
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target, require
from qwen_quant.export.openvino_graph import Linear, Weights, build_model, opset
from qwen_quant.export.pivot import PackedRows, pack_codes, unpack_codes
from qwen_quant.progress import ProgressFn
from qwen_quant.units import format_bytes

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

MODEL_FILE = "openvino_model.xml"
SPOOL_FILE = ".constants"
BITS = (4, 8)
_XML_BYTES_PER_LAYER = 115_000
_ALIGNMENT = 64
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_TYPE_BITS = {"u4": 4, "u8": 8, "f16": 16, "bf16": 16, "f32": 32, "i64": 64}


def _openvino() -> Any:
    return require("openvino", "openvino", "openvino")


def uneven_groups(source: ExportSource) -> list[Inexact]:
    """Act-order whose groups have different sizes, so that sorted columns do not fill equal groups."""
    uneven = []
    for name in source.facts.act_order:
        counts = torch.bincount(source.grid(name).g_idx, minlength=source.groups(name))
        uneven += [name] if int(counts.min()) != int(counts.max()) else []
    why = "columns sorted by group must fill equal groups"
    return [Inexact("groups of different sizes", why, "--format gptq_v2", linears=len(uneven))] if uneven else []


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, BITS, "the IR's linears are u4 or u8"),
        *checks.ragged(source, "groups are one axis of the constant"),
        *uneven_groups(source),
        *refusals(source, "OpenVINO", DENSE_FAMILIES),
    ]


def _tokenizers_installed() -> bool:
    return importlib.util.find_spec("openvino_tokenizers") is not None


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    """Sizes within a few percent: the .xml's size is a guess, and openvino stores equal constants once."""
    facts, total = source.facts, _XML_BYTES_PER_LAYER * source.spec.num_layers
    for name in source.linears:
        (out, width), groups = source.shape(name), source.groups(name)
        zeros = 0 if facts.sym else out * groups * facts.bits // 8
        order = 8 * width if name in facts.act_order else 0
        total += out * width * facts.bits // 8 + out * groups * facts.scale_dtype.itemsize + zeros + order
    for name in source.kept:
        info = source.reader.info(name)
        total += info.nbytes // info.dtype.itemsize * kept_dtype(source, name, options).itemsize
    notes = [
        "for FP32 logits compile with INFERENCE_PRECISION_HINT=f32, KV_CACHE_PRECISION=f32 and"
        " DYNAMIC_QUANTIZATION_GROUP_SIZE=0: by default OpenVINO may round them to 16 or 8 bits"
    ]
    notes += notes_of(source)
    if not _tokenizers_installed():
        notes.append("no tokenizer in IR: openvino-genai needs one: pip install openvino-tokenizers and export again")
    return ExportPlan(total, 2, source.dropped, tuple(notes))


class _Spool:
    """Bytes of constants in a file (open as `handle`) beside the model, and constants that are mapped from it.

    Places follow from shapes alone, so what an earlier, killed run has collected is passed over by giving no `parts`.
    """

    def __init__(self, path: Path, handle: int, behind: Behind) -> None:
        self.path, self.handle, self.behind, self.end = path, handle, behind, 0
        self.places: dict[str, tuple[int, int, str, tuple[int, ...]]] = {}
        self.mapped: Any = None  # openvino's constants point into it without keeping it alive

    def add(self, name: str, kind: str, shape: tuple[int, ...], parts: Iterable[Tensor] | None) -> None:
        """Append the constant `name` of openvino type `kind`, its bytes in parts (None: they are there)."""
        start = self.end = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        size = -(-math.prod(shape) * _TYPE_BITS[kind] // 8)
        for part in parts or ():
            self.end += write_at(self.handle, self.behind, self.end, part.contiguous())
        if parts is not None and self.end != start + size:
            raise AuditError(f"'{name}' has {self.end - start} bytes", f"planned {size}")
        self.end = start + size
        self.places[name] = (start, size, kind, shape)

    def sync(self) -> None:
        """Everything that was added is on the disk."""
        self.behind.drain()
        os.fdatasync(self.handle)

    def constants(self) -> dict[str, Any]:
        """name -> Constant; call it once everything is on the disk."""
        openvino, found = _openvino(), {}
        self.mapped = mapped = np.memmap(self.path, dtype=np.uint8, mode="c")
        for name, (start, count, kind, shape) in self.places.items():
            tensor = openvino.Tensor(
                mapped[start : start + count].view(_VIEWS.get(kind, np.uint8)),
                list(shape),
                getattr(openvino.Type, kind),
            )
            found[name] = openvino.op.Constant(tensor, shared_memory=True)
            found[name].set_friendly_name(name)
        return found


_VIEWS = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "bf16": np.float16}


def sorted_columns(packed: PackedRows) -> tuple[Tensor, Tensor | None]:
    """(stream with the columns of each group side by side, int64 order of the columns or None when they were)."""
    g_idx, bits = packed.grid.g_idx, packed.bits
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return packed.stream, None
    order = torch.argsort(g_idx, stable=True)
    return pack_codes(unpack_codes(packed.stream, bits)[:, order].contiguous(), bits), order


def _spool_linear(source: ExportSource, name: str, spool: _Spool, *, known: bool) -> None:
    facts, (out, width), groups = source.facts, source.shape(name), source.groups(name)
    found = None if known else _tensors(source, name)
    kind = f"u{facts.bits}"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": (kind, (out, groups, width // groups))}
    shapes["scales"] = (_TYPES[facts.scale_dtype], (out, groups, 1))
    if not facts.sym:
        shapes["zeros"] = (kind, (out, groups, 1))
    if name in facts.act_order:
        shapes["order"] = ("i64", (width,))
    for part, (kind, shape) in shapes.items():
        spool.add(f"{name}.{part}", kind, shape, None if found is None else [found[part]])


def _tensors(source: ExportSource, name: str) -> dict[str, Tensor]:
    packed = source.packed(name)
    stream, order = sorted_columns(packed)
    found = {"codes": stream, "scales": packed.grid.scales}
    found["zeros"] = packed_zeros(packed.grid.zeros.reshape(1, -1), packed.bits)
    return found if order is None else {**found, "order": order}


def _spool_kept(source: ExportSource, name: str, dtype: torch.dtype, spool: _Spool, *, known: bool) -> None:
    spool.add(name, _TYPES[dtype], source.reader.info(name).shape, None if known else kept_parts(source, name, dtype))


def _weights(source: ExportSource, constants: dict[str, Any]) -> Weights:
    """Nodes that compute the FP32 weights from the constants."""
    op, facts = opset(), source.facts
    linears, plain = {}, {}
    for name in source.linears:
        codes = op.convert(constants[f"{name}.codes"], "f32")
        if facts.sym:
            zeros = op.constant(np.array(2 ** (facts.bits - 1), dtype=np.float32))
        else:
            zeros = op.convert(constants[f"{name}.zeros"], "f32")
        values = op.multiply(op.subtract(codes, zeros), _as_f32(constants[f"{name}.scales"]))
        shape = op.constant(np.array(source.shape(name), dtype=np.int64))
        linears[name] = Linear(op.reshape(values, shape, False), constants.get(f"{name}.order"))
    for name in source.kept:
        plain[name] = _as_f32(constants[name])
    return Weights(linears, plain)


def _as_f32(constant: Any) -> Any:
    if constant.get_element_type() == _openvino().Type.f32:
        return constant
    return opset().convert(constant, "f32")


def _check_space(source: ExportSource, options: ExportOptions, folder: Path) -> None:
    """The collected constants stand beside the .bin while it is written (InputError before the first byte)."""
    path = folder / SPOOL_FILE
    there = path.stat().st_size if path.is_file() else 0
    need, free = max(0, 2 * _plan(source, options).weight_bytes - there), free_disk_bytes(folder)
    if need > free:
        raise InputError(
            f"the disk of {folder.parent} is full",
            f"{format_bytes(need)} needed for the IR and a temporary copy of its constants, {format_bytes(free)} free",
            "free some space or give an OUT on another disk",
        )


def _collect(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> _Spool:
    """Every constant into the spool; continues after the item that `target.state` counts last."""
    linears, names, path = set(source.linears), items(source), target.folder / SPOOL_FILE
    done, committed = int(target.state.get("items_done", 0)) if path.is_file() else 0, 0
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with Behind() as behind:
            spool = _Spool(path, handle, behind)
            for k, name in enumerate(names):
                progress("writing", k, len(names))
                if name in linears:
                    _spool_linear(source, name, spool, known=k < done)
                else:
                    _spool_kept(source, name, kept_dtype(source, name, options), spool, known=k < done)
                committed = spool.end if k < done else committed
                if spool.end - committed >= COMMIT_BYTES:
                    spool.sync()
                    target.commit({"items_done": k + 1})
                    committed = spool.end
    finally:
        os.close(handle)
    return spool


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Collect the constants, build the graph, save it; a killed run goes on collecting where it was."""
    _check_space(source, options, target.folder)
    spool = _collect(source, options, target, progress)
    model = build_model(read_decoder(source), _weights(source, spool.constants()))
    _openvino().save_model(model, str(target.folder / MODEL_FILE), compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        with open((target.folder / MODEL_FILE).with_suffix(suffix), "rb") as file:
            os.fsync(file.fileno())
    spool.path.unlink()
    write_companions(source, target.folder, options.rest)
    if _tokenizers_installed():
        _write_tokenizer(target.folder)


def _write_tokenizer(folder: Path) -> None:
    """openvino_tokenizer.xml and openvino_detokenizer.xml, made from the tokenizer files beside them."""
    from transformers import AutoTokenizer

    library = require("openvino_tokenizers", "openvino", "openvino")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    models = library.convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        _openvino().save_model(model, str(folder / name), compress_to_fp16=False)


def _torch_of(constant: Any) -> Tensor:
    """A plain constant, bit for bit."""
    raw = np.array(constant.data).reshape(-1).view(np.uint8)
    dtype = {kind: dtype for dtype, kind in _TYPES.items()}[constant.get_element_type().to_string()]
    return torch.from_numpy(raw.copy()).view(dtype).view(tuple(constant.get_output_shape(0)))


def _weight_of(model: Any, node: Any, order: Any | None) -> Tensor:
    """FP32 [out, in] of a linear's MatMul, computed by openvino from the constants in front of it."""
    openvino = _openvino()
    part = openvino.Model([node.input_value(1)], [], node.get_friendly_name())
    compiled = openvino.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = torch.from_numpy(np.array(compiled([])[0]))
    if order is None:
        return values
    result = torch.empty_like(values)
    result[:, torch.from_numpy(np.array(order.data).astype(np.int64).reshape(-1))] = values
    return result


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    """What each MatMul of the saved graph multiplies with, evaluated by openvino itself."""
    model = _openvino().Core().read_model(str(folder / MODEL_FILE))
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for name in (*source.linears, *source.kept):
        if name not in nodes:
            raise AuditError(f"the graph in {MODEL_FILE} has no node '{name}'")
    for name in source.linears:
        before = nodes[name].input_value(0).get_node()
        order = before.input_value(1).get_node() if name in source.facts.act_order else None
        yield Piece(name, _weight_of(model, nodes[name], order))
    for name in source.kept:
        yield Piece(name, _torch_of(nodes[name]))


OPENVINO = Format(
    name="openvino",
    summary="OpenVINO IR of the whole decoder, u4 or u8: symmetric or not, act-order too; dense models",
    runtimes=("openvino-genai", "OpenVINO (CPU, GPU)"),
    extra="openvino",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"openvino {metadata.version('openvino')}",
    rests=tuple(REST_DTYPES),
    packages=("openvino",),
)
