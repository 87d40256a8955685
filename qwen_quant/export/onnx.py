"""ONNX (model.onnx and model.onnx.data): the whole decoder with MatMulNBits nodes that hold the codes as they are.

Inputs of the MatMulNBits of a linear [out, in] with G groups of n consecutive columns at `bits` bits:

    B            uint8 [out, G, n * bits / 8]      exactly `PackedRows.stream`
    scales       FP32  [out, G]
    zero_points  uint8 [out, ceil(G * bits / 8)]   packed along the groups; left out for symmetric codes, whose zero is
                                                   the operator's own default, 2^(bits-1)

accuracy_level 1 asks for FP32 activations; higher levels round them to 8 bits.  Everything else is stored as in the
source and converted to FP32 in the graph.  The data file is written tensor by tensor; the graph names offsets in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export import checks
from qwen_quant.export.behind import Behind, write_at
from qwen_quant.export.decoder import (
    Decoder,
    kept_parts,
    notes_of,
    packed_zeros,
    read_decoder,
    refusals,
    unpacked_zeros,
    write_companions,
)
from qwen_quant.export.folder import COMMIT_BYTES, REST_DTYPES, Specs, items, kept_dtype
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target
from qwen_quant.export.onnx_graph import DOMAIN, Graph, build_model, build_nodes, onnx
from qwen_quant.export.pivot import LinearGrid, PackedRows, consecutive_groups
from qwen_quant.progress import ProgressFn
from qwen_quant.resume import write_json_atomically

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
BITS = (4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
ROTATION_POSITIONS = 131072  # rows of the tables of cosine and sine, at most the model's context
_ALIGNMENT = 64
_GRAPH_BYTES_PER_LAYER = 12_000
_KINDS = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8"}


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, BITS, "MatMulNBits is exported with 4 or 8 bits"),
        *checks.group_size(source, GROUP_SIZES),
        *checks.act_order(source, "ONNX Runtime has given up g_idx"),
        *checks.ragged(source, "groups are blocks of one size"),
        *refusals(source, "ONNX"),
    ]


def _zero_bytes(groups: int, bits: int) -> int:
    return -(-groups * bits // 8)


def _positions(decoder: Decoder) -> int:
    return min(decoder.context, ROTATION_POSITIONS)


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    """Sizes within a few percent: of the graph itself only a guess is known."""
    facts, decoder = source.facts, read_decoder(source)
    total = _GRAPH_BYTES_PER_LAYER * decoder.layers + 4 * decoder.head_dim * _positions(decoder)
    for name in source.linears:
        (out, width), groups = source.shape(name), source.groups(name)
        zeros = 0 if facts.sym else out * _zero_bytes(groups, facts.bits)
        total += out * width * facts.bits // 8 + 4 * out * groups + zeros
    for name in source.kept:
        info = source.reader.info(name)
        total += info.nbytes // info.dtype.itemsize * kept_dtype(source, name, options).itemsize
    notes = ["sequences of one batch are padded on the right: GroupQueryAttention takes their lengths from the mask"]
    notes += notes_of(source)
    if _positions(decoder) < decoder.context:
        notes.append(f"the tables of rotation, and so the context, end at {_positions(decoder)} tokens")
    return ExportPlan(total, 2, source.dropped, tuple(notes))


@dataclass
class _Data:
    """The data file while it is written, and the TensorProtos that name places in it.

    Places follow from shapes alone, so what an earlier run has written is passed over by giving no `parts`.
    """

    handle: int
    behind: Behind
    end: int = 0
    protos: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor] | None) -> None:
        """Append one tensor, its bytes in parts (None: they are there)."""
        library = onnx()
        start = self.end = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        size = math.prod(shape) * dtype.itemsize
        for part in parts or ():
            self.end += write_at(self.handle, self.behind, self.end, part.contiguous())
        if parts is not None and self.end != start + size:
            raise AuditError(f"'{name}' has {self.end - start} bytes", f"planned {size}")
        self.end = start + size
        kind = getattr(library.TensorProto, _KINDS[dtype])
        proto = library.TensorProto(name=name, data_type=kind, dims=shape)
        proto.data_location = library.TensorProto.EXTERNAL
        for key, value in {"location": DATA_FILE, "offset": start, "length": size}.items():
            proto.external_data.add(key=key, value=str(value))
        self.protos[name] = proto


def _add_linear(source: ExportSource, name: str, data: _Data, *, known: bool) -> None:
    facts, groups, (out, width) = source.facts, source.groups(name), source.shape(name)
    tensors = None if known else _tensors(source, name)
    shapes: Specs = {"codes": (torch.uint8, (out, groups, width // groups * facts.bits // 8))}
    shapes["scales"] = (torch.float32, (out, groups))
    if not facts.sym:
        shapes["zeros"] = (torch.uint8, (out, _zero_bytes(groups, facts.bits)))
    for part, (dtype, shape) in shapes.items():
        data.add(f"{name}.{part}", dtype, shape, None if tensors is None else [tensors[part]])


def _tensors(source: ExportSource, name: str) -> dict[str, Tensor]:
    packed = source.packed(name)
    zeros = packed_zeros(packed.grid.zeros, packed.bits)
    return {"codes": packed.stream, "scales": packed.grid.scales.float(), "zeros": zeros}


def _add_kept(source: ExportSource, name: str, dtype: torch.dtype, data: _Data, *, known: bool) -> None:
    data.add(name, dtype, source.reader.info(name).shape, None if known else kept_parts(source, name, dtype))


def _add_rotation(decoder: Decoder, data: _Data) -> None:
    angles = torch.arange(_positions(decoder), dtype=torch.float32)[:, None] * decoder.inv_freq[None]
    for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
        data.add(f"rotation.{name}", torch.float32, tuple(table.shape), [table * decoder.rope_scale])


def _graph(source: ExportSource, decoder: Decoder) -> Graph:
    """The decoder's nodes over the initializers of the data file."""
    facts, linears, kept, library = source.facts, set(source.linears), set(source.kept), onnx()

    def plain(graph: Graph, name: str) -> str:
        value = f"{name}.f32"
        if value not in made:
            graph.add("Cast", [name], value, to=library.TensorProto.FLOAT)
            made.add(value)
        return value

    def linear(graph: Graph, x: str, name: str) -> str:
        if name not in linears:
            turned = graph.add("Transpose", [plain(graph, f"{name}.weight")], f"{name}.turned", perm=[1, 0])
            return graph.add("MatMul", [x, turned], name)
        inputs = [x, f"{name}.codes", f"{name}.scales", *([] if facts.sym else [f"{name}.zeros"])]
        (out, width), size = source.shape(name), facts.group_size
        shape = {"K": width, "N": out, "bits": facts.bits, "block_size": size, "accuracy_level": 1}
        return graph.add("MatMulNBits", inputs, name, domain=DOMAIN, **shape)

    made: set[str] = set()
    graph = Graph(decoder, linear, plain, kept.__contains__)
    build_nodes(graph)
    return graph


def _write_data(
    source: ExportSource, options: ExportOptions, target: Target, decoder: Decoder, progress: ProgressFn
) -> list[Any]:
    """The data file; continues after the item that `target.state` counts last. Returns its TensorProtos."""
    linears, names, path = set(source.linears), items(source), target.folder / DATA_FILE
    done, committed = int(target.state.get("items_done", 0)) if path.is_file() else 0, 0
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with Behind() as behind:
            data = _Data(handle, behind)
            for k, name in enumerate(names):
                progress("writing", k, len(names))
                if name in linears:
                    _add_linear(source, name, data, known=k < done)
                else:
                    _add_kept(source, name, kept_dtype(source, name, options), data, known=k < done)
                committed = data.end if k < done else committed
                if data.end - committed >= COMMIT_BYTES:
                    behind.drain()
                    os.fdatasync(handle)
                    target.commit({"items_done": k + 1})
                    committed = data.end
            _add_rotation(decoder, data)
        os.ftruncate(handle, data.end)
        os.fsync(handle)
    finally:
        os.close(handle)
    return list(data.protos.values())


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Data first, then the graph that speaks of it, then configs."""
    decoder = read_decoder(source)
    tensors = _write_data(source, options, target, decoder, progress)
    model = build_model(_graph(source, decoder), tensors)
    with open(target.folder / MODEL_FILE, "wb") as file:
        file.write(model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
    write_companions(source, target.folder, options.rest)
    write_json_atomically(target.folder / "genai_config.json", genai_config(source, decoder, target.folder))


def genai_config(source: ExportSource, decoder: Decoder, folder: Path) -> dict[str, Any]:
    """genai_config.json; ids of special tokens come from generation_config.json, or else from config.json."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokens = {**source.spec.config, **{key: value for key, value in generation.items() if value is not None}}
    end = tokens.get("eos_token_id")
    first = end[0] if isinstance(end, list) else end
    begin, pad = tokens.get("bos_token_id"), tokens.get("pad_token_id")
    special = {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": first if pad is None else pad,
    }
    return {
        "model": {
            "type": decoder.model_type,
            **{key: value for key, value in special.items() if value is not None},  # it refuses null, not absence
            "context_length": _positions(decoder),
            "vocab_size": decoder.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": decoder.head_dim,
                "hidden_size": decoder.hidden,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": _positions(decoder),
            "past_present_share_buffer": False,
            **{key: generation[key] for key in ("temperature", "top_k", "top_p") if generation.get(key) is not None},
        },
    }


def _torch_of(proto: Any, folder: Path) -> Tensor:
    """A tensor of the data file, read by onnx, bit for bit."""
    array = onnx().numpy_helper.to_array(proto, base_dir=str(folder))
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _packed(source: ExportSource, node: Any, tensors: dict[str, Any], folder: Path) -> PackedRows:
    """What a MatMulNBits node says of its weight. Errors: AuditError for attributes that do not fit."""
    facts = source.facts
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    out, width = source.shape(node.name)
    expected = {"K": width, "N": out, "bits": facts.bits, "block_size": facts.group_size, "accuracy_level": 1}
    if attributes != expected:
        raise AuditError(f"the node '{node.name}' has the attributes {attributes}", f"they should be {expected}")
    codes, scales = (_torch_of(tensors[name], folder) for name in node.input[1:3])
    groups = scales.shape[1]
    zeros = torch.full(scales.shape, 2 ** (facts.bits - 1), dtype=torch.uint8)
    if len(node.input) > 3:
        zeros = unpacked_zeros(_torch_of(tensors[node.input[3]], folder), groups, facts.bits)
    grid = LinearGrid(scales, zeros, consecutive_groups(width, groups))
    return PackedRows(codes.flatten(1), facts.bits, grid)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    library = onnx()
    model = library.load(str(folder / MODEL_FILE), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    for name in source.linears:
        if name not in nodes:
            raise AuditError(f"the graph in {MODEL_FILE} has no MatMulNBits node '{name}'")
        yield Piece(name, _packed(source, nodes[name], tensors, folder))
    for name in source.kept:
        yield Piece(name, _torch_of(tensors[name], folder))


ONNX = Format(
    name="onnx",
    summary="ONNX with MatMulNBits, 4 or 8 bits: consecutive groups, symmetric or not; dense models",
    runtimes=("onnxruntime-genai", "ONNX Runtime"),
    extra="onnx",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"onnx {metadata.version('onnx')}",
    rests=tuple(REST_DTYPES),
    packages=("onnx",),
)
