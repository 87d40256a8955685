"""OpenVINO IR (openvino_model.xml and .bin): the whole decoder, with codes, scales and zeros as they are.

The weight of a linear [out, in] with G groups of n consecutive columns is, in the graph,

    Constant u4 or u8 [out, G, n] -> Convert f32 -> Subtract zeros -> Multiply scales -> Reshape [out, in]

with zeros u4 or u8 [out, G, 1] (one number for symmetric codes) and scales in the source's dtype [out, G, 1], both
converted to FP32.  code - zero is exact and the product is rounded once, as everywhere in this package; OpenVINO's CPU
plugin keeps the codes packed and multiplies from them.  Act-order: the columns are sorted by group, and the input goes
through a Gather with the same order.  The routed experts of a block that have the same role are one such weight, with
an axis for the experts in front of every constant.

Codes are collected in a temporary file that is mapped while openvino writes the .bin, so that memory holds one linear
at a time and not the model; so twice the disk space is needed for a moment. Collecting continues after a kill.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.export import checks
from qwen_quant.export.behind import Behind
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
from qwen_quant.export.graph_parts import left_out, read_parts
from qwen_quant.export.hybrid import adds_one, is_hybrid
from qwen_quant.export.openvino_graph import build_model
from qwen_quant.export.openvino_ops import Linear, Weights, number, openvino, opset
from qwen_quant.export.openvino_reading import pieces
from qwen_quant.export.openvino_spool import STACKS, TYPES, Spool
from qwen_quant.export.pivot import PackedRows, pack_codes, unpack_codes
from qwen_quant.export.stacks import EXPERT, place_of
from qwen_quant.progress import ProgressFn
from qwen_quant.resume import check_disk

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

MODEL_FILE = "openvino_model.xml"
SPOOL_FILE = ".constants"
BITS = (4, 8)
FAMILIES = (
    *DENSE_FAMILIES,
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_5_moe",
)
_XML_BYTES_PER_LAYER = 115_000
_XML_BYTES_MORE = 70_000  # with experts or linear attention


def uneven_groups(source: ExportSource) -> list[Inexact]:
    """Act-order whose groups have different sizes, so that sorted columns do not fill equal groups."""
    uneven = []
    for name in source.facts.act_order:
        counts = torch.bincount(source.grid(name).g_idx, minlength=source.groups(name))
        uneven += [name] if int(counts.min()) != int(counts.max()) else []
    why = "columns sorted by group must fill equal groups"
    return [Inexact("groups of different sizes", why, "--format gptq_v2", linears=len(uneven))] if uneven else []


def _experts(source: ExportSource) -> list[Inexact]:
    """Why the routed experts of a block cannot be one constant (empty when they can)."""
    near, found = "--format gptq_v2, or quantize with --no-desc-act, whose groups every format takes", []
    act_order = [name for name in source.facts.act_order if EXPERT.fullmatch(name)]
    if act_order:
        why = "the experts of a block are one constant, whose columns have one order"
        found.append(Inexact("act-order (desc_act) of routed experts", why, near, linears=len(act_order)))
    plain = [name for name in source.unquantized_linears if EXPERT.fullmatch(name)]
    if plain:
        why = "the experts of a block are one constant of codes"
        found.append(Inexact("routed experts that are not quantized", why, "--format gptq", linears=len(plain)))
    return found


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, BITS, "the IR's linears are u4 or u8"),
        *checks.ragged(source, "groups are one axis of the constant"),
        *uneven_groups(source),
        *_experts(source),
        *_model_refusals(source),
    ]


def _model_refusals(source: ExportSource) -> list[Inexact]:
    """Why the graph of this model is not one of those written here (empty when it is)."""
    family, near = source.spec.family, "--format gptq, awq or compressed-tensors"
    if family.hyper:
        why = (
            "its n-gram tables are read at 64-bit hashes, and OpenVINO 2026.4's CPU plugin computes integers in 32 bits"
        )
        return [Inexact(f"family {family.model_type}", why, near)]
    return refusals(source, "OpenVINO", FAMILIES)


def _tokenizers_installed() -> bool:
    return importlib.util.find_spec("openvino_tokenizers") is not None


def _kept(source: ExportSource) -> list[str]:
    """Kept tensors that the graph has a place for."""
    without = left_out(source)
    return [name for name in source.kept if name not in without]


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    """Sizes within a few percent: the .xml's size is a guess, and openvino stores equal constants once."""
    more = _XML_BYTES_MORE if source.spec.family.sparse or is_hybrid(source.spec) else 0
    facts, total = source.facts, (_XML_BYTES_PER_LAYER + more) * source.spec.num_layers
    for name in source.linears:
        (out, width), groups = source.shape(name), source.groups(name)
        zeros = 0 if facts.sym else out * groups * facts.bits // 8
        order = 8 * width if name in facts.act_order else 0
        total += out * width * facts.bits // 8 + out * groups * facts.scale_dtype.itemsize + zeros + order
    for name in _kept(source):
        info = source.reader.info(name)
        total += info.nbytes // info.dtype.itemsize * kept_dtype(source, name, options).itemsize
    notes = [
        "for FP32 logits compile with INFERENCE_PRECISION_HINT=f32, KV_CACHE_PRECISION=f32 and"
        " DYNAMIC_QUANTIZATION_GROUP_SIZE=0: by default OpenVINO may round them to 16 or 8 bits"
    ]
    notes += [*notes_of(source), *_notes_on_parts(source)]
    if not _tokenizers_installed():
        notes.append("no tokenizer in IR: openvino-genai needs one: pip install openvino-tokenizers and export again")
    return ExportPlan(total, 2, {**source.dropped, **left_out(source)}, tuple(notes))


def _notes_on_parts(source: ExportSource) -> list[str]:
    """What to know of experts and of linear attention."""
    notes = []
    if source.spec.expert_count:
        notes.append(
            "OpenVINO 2026.4 on a CPU reads the chosen experts only; one that does not fuse them reads them all"
        )
    if is_hybrid(source.spec):
        notes.append("padding in front of a text is known by position_ids, which count its tokens from 0")
    return notes


def sorted_columns(packed: PackedRows) -> tuple[Tensor, Tensor | None]:
    """(stream with the columns of each group side by side, int64 order of the columns or None when they were)."""
    g_idx, bits = packed.grid.g_idx, packed.bits
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return packed.stream, None
    order = torch.argsort(g_idx, stable=True)
    return pack_codes(unpack_codes(packed.stream, bits)[:, order].contiguous(), bits), order


def _spool_linear(source: ExportSource, name: str, spool: Spool, *, known: bool) -> None:
    facts, (out, width), groups = source.facts, source.shape(name), source.groups(name)
    kind, place = f"u{facts.bits}", place_of(source.spec, name, STACKS)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": (kind, (out, groups, width // groups))}
    shapes["scales"] = (TYPES[facts.scale_dtype], (out, groups, 1))
    if not facts.sym:
        shapes["zeros"] = (kind, (out, groups, 1))
    if name in facts.act_order:
        shapes["order"] = ("i64", (width,))
    for part, (kind, shape) in shapes.items():
        spool.place(f"{place.module}.{part}", kind, (place.stack, *shape) if place.stack else shape)
    if not known:
        found = _tensors(source, name)
        for part in shapes:
            spool.fill(f"{place.module}.{part}", [found[part]], (place.index, max(place.stack, 1)))


def _tensors(source: ExportSource, name: str) -> dict[str, Tensor]:
    packed = source.packed(name)
    stream, order = sorted_columns(packed)
    found = {"codes": stream, "scales": packed.grid.scales}
    found["zeros"] = packed_zeros(packed.grid.zeros.reshape(1, -1), packed.bits)
    return found if order is None else {**found, "order": order}


def _spool_kept(source: ExportSource, name: str, dtype: torch.dtype, spool: Spool, *, known: bool) -> None:
    spool.place(name, TYPES[dtype], source.reader.info(name).shape)
    if not known:
        spool.fill(name, kept_parts(source, name, dtype))


def _weights(source: ExportSource, constants: dict[str, Any]) -> Weights:
    """Nodes that compute the FP32 weights from the constants."""
    linears, plain = {}, {}
    for name in source.linears:
        place = place_of(source.spec, name, STACKS)
        if place.index == 0:
            shape = (*([place.stack] if place.stack else []), *source.shape(name))
            weight = _dequantized(source, place.module, shape, constants)
            linears[place.module] = Linear(weight, constants.get(f"{place.module}.order"))
    for name in _kept(source):
        values = _as_f32(constants[name])
        plain[name] = opset().add(values, number(1.0)) if adds_one(source.spec, name) else values
    return Weights(linears, plain)


def _dequantized(source: ExportSource, module: str, shape: tuple[int, ...], constants: dict[str, Any]) -> Any:
    op, facts = opset(), source.facts
    codes = op.convert(constants[f"{module}.codes"], "f32")
    zeros = number(2.0 ** (facts.bits - 1)) if facts.sym else op.convert(constants[f"{module}.zeros"], "f32")
    values = op.multiply(op.subtract(codes, zeros), _as_f32(constants[f"{module}.scales"]))
    return op.reshape(values, op.constant(np.array(shape, dtype=np.int64)), False)


def _as_f32(constant: Any) -> Any:
    if constant.get_element_type() == openvino().Type.f32:
        return constant
    return opset().convert(constant, "f32")


def _check_space(source: ExportSource, options: ExportOptions, folder: Path) -> None:
    """The collected constants stand beside the .bin while it is written (InputError before the first byte)."""
    path = folder / SPOOL_FILE
    there = path.stat().st_size if path.is_file() else 0
    need = 2 * _plan(source, options).weight_bytes - there
    check_disk(folder, need, " for the IR and a temporary copy of its constants")


def _collect(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> Spool:
    """Every constant into the spool; continues after the item that `target.state` counts last."""
    linears, path, without = set(source.linears), target.folder / SPOOL_FILE, left_out(source)
    names = [name for name in items(source) if name not in without]
    done, committed = int(target.state.get("items_done", 0)) if path.is_file() else 0, 0
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with Behind() as behind:
            spool = Spool(path, handle, behind)
            for k, name in enumerate(names):
                progress("writing", k, len(names))
                if name in linears:
                    _spool_linear(source, name, spool, known=k < done)
                else:
                    _spool_kept(source, name, kept_dtype(source, name, options), spool, known=k < done)
                if spool.written - committed >= COMMIT_BYTES:
                    spool.sync()
                    target.commit({"items_done": k + 1})
                    committed = spool.written
    finally:
        os.close(handle)
    return spool


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Collect the constants, build the graph, save it; a killed run goes on collecting where it was."""
    _check_space(source, options, target.folder)
    spool = _collect(source, options, target, progress)
    weights = _weights(source, spool.constants())
    model = build_model(read_decoder(source), read_parts(source.spec), weights)
    openvino().save_model(model, str(target.folder / MODEL_FILE), compress_to_fp16=False)
    del model, weights
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
        openvino().save_model(model, str(folder / name), compress_to_fp16=False)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    """What each MatMul of the saved graph multiplies with."""
    return pieces(openvino().Core().read_model(str(folder / MODEL_FILE)), source, _kept(source))


OPENVINO = Format(
    name="openvino",
    summary="OpenVINO IR of the whole decoder, u4 or u8: symmetric or not, act-order too but for routed experts",
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
