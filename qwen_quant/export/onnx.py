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
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import raw_bytes
from qwen_quant.errors import AuditError
from qwen_quant.export import checks
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
from qwen_quant.export.folder import REST_DTYPES, items, kept_dtype
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


@dataclass(frozen=True)
class _Data:
    """The data file while it is written, and the TensorProtos that name places in it."""

    file: BinaryIO
    protos: dict[str, Any]

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
        """Append one tensor, its bytes in parts."""
        library = onnx()
        self.file.write(bytes(-self.file.tell() % _ALIGNMENT))
        start = self.file.tell()
        for part in parts:
            self.file.write(raw_bytes(part))
        kind = getattr(library.TensorProto, _KINDS[dtype])
        proto = library.TensorProto(name=name, data_type=kind, dims=shape)
        proto.data_location = library.TensorProto.EXTERNAL
        facts = {"location": DATA_FILE, "offset": start, "length": self.file.tell() - start}
        for key, value in facts.items():
            proto.external_data.add(key=key, value=str(value))
        self.protos[name] = proto


def _add_linear(source: ExportSource, name: str, data: _Data) -> None:
    packed, facts = source.packed(name), source.facts
    (out, width), groups = packed.shape, packed.grid.scales.shape[1]
    data.add(f"{name}.codes", torch.uint8, (out, groups, width // groups * facts.bits // 8), [packed.stream])
    data.add(f"{name}.scales", torch.float32, (out, groups), [packed.grid.scales.float()])
    if not facts.sym:
        zeros = packed_zeros(packed.grid.zeros, facts.bits)
        data.add(f"{name}.zeros", torch.uint8, tuple(zeros.shape), [zeros])


def _add_kept(source: ExportSource, name: str, dtype: torch.dtype, data: _Data) -> None:
    info = source.reader.info(name)
    data.add(name, dtype, info.shape, kept_parts(source, name, dtype))


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


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Data first, then the graph that speaks of it, then configs; a killed run writes its files again."""
    linears, names, decoder = set(source.linears), items(source), read_decoder(source)
    with open(target.folder / DATA_FILE, "wb") as file:
        data = _Data(file, {})
        for k, name in enumerate(names):
            progress("writing", k, len(names))
            if name in linears:
                _add_linear(source, name, data)
            else:
                _add_kept(source, name, kept_dtype(source, name, options), data)
        _add_rotation(decoder, data)
        file.flush()
        os.fsync(file.fileno())
    model = build_model(_graph(source, decoder), list(data.protos.values()))
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
