"""ONNX (model.onnx and model.onnx.data): the whole decoder, with the codes of its linears as they are.

onnx_data.py says how weights are stored, onnx_decoder.py how the graph computes with them. MatMulNBits nodes ask with
accuracy_level 1 for FP32 activations; higher levels round them to 8 bits. What is not quantized is stored as in the
source and converted to FP32 in the graph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export import checks
from qwen_quant.export.decoder import (
    DENSE_FAMILIES,
    Decoder,
    notes_of,
    read_decoder,
    refusals,
    unpacked_zeros,
    write_companions,
)
from qwen_quant.export.folder import REST_DTYPES, kept_dtype
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target
from qwen_quant.export.graph_parts import Parts, left_out, read_parts
from qwen_quant.export.onnx_data import positions, tensor_protos, write_data, zero_bytes
from qwen_quant.export.onnx_decoder import build_model, build_nodes
from qwen_quant.export.onnx_experts import DOWN, GATE_UP, qmoe_attributes, stack_name, takes_qmoe
from qwen_quant.export.onnx_graph import Graph, onnx
from qwen_quant.export.pivot import LinearGrid, PackedRows, consecutive_groups
from qwen_quant.export.rows import row_pieces
from qwen_quant.export.stacks import EXPERT
from qwen_quant.progress import ProgressFn
from qwen_quant.resume import write_json_atomically

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

MODEL_FILE = "model.onnx"
BITS = (4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
SPARSE_FAMILIES = ("qwen2_moe", "qwen3_moe")
HYBRID_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")
FAMILIES = (*DENSE_FAMILIES, *SPARSE_FAMILIES, *HYBRID_FAMILIES)
# model_type -> what onnxruntime-genai 0.18 calls a decoder with the same inputs and states; itself where not named.
RUNTIME_TYPES = {"qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "qwen3_next": "qwen3_5_moe_text"}
_GRAPH_BYTES_PER_LAYER = 12_000
_PRODUCTS = ("MatMulNBits", "QMoE")


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, BITS, "MatMulNBits is exported with 4 or 8 bits"),
        *checks.group_size(source, GROUP_SIZES),
        *checks.act_order(source, "ONNX Runtime has given up g_idx"),
        *checks.ragged(source, "groups are blocks of one size"),
        *_narrow(source),
        *_plain_experts(source),
        *_model_refusals(source),
    ]


def _model_refusals(source: ExportSource) -> list[Inexact]:
    """Why the graph of this model is not one of those written here (empty when it is)."""
    family, near = source.spec.family, "--format gptq, awq or compressed-tensors"
    if family.hyper:
        why = "onnxruntime-genai 0.18 carries no state for its indexer and its n-grams from token to token"
        return [Inexact(f"family {family.model_type}", why, near)]
    text = source.spec.text_config
    head = int(text.get("head_dim") or source.spec.hidden_size // int(text.get("num_attention_heads") or 1))
    if head % 16:
        why = "GroupQueryAttention rotates a multiple of 16 values of a head"
        return [Inexact(f"head_dim {head}", why, near)]
    return refusals(source, "ONNX", FAMILIES)


def _narrow(source: ExportSource) -> list[Inexact]:
    """Linears of a single group that is shorter than those of the others."""
    size = source.facts.group_size
    narrow = [name for name in source.linears if source.shape(name)[1] < size]
    what, why = f"in_features smaller than group_size {size}", "groups are blocks of one size"
    return [Inexact(what, why, "--format gptq_v2", linears=len(narrow))] if narrow else []


def _plain_experts(source: ExportSource) -> list[Inexact]:
    """Routed experts that are not quantized: their stacks hold codes only."""
    plain = [name for name in source.unquantized_linears if EXPERT.fullmatch(name)]
    why = "all experts of a block stand in one tensor of codes"
    near = "--format gptq or compressed-tensors"
    return [Inexact("experts that are not quantized", why, near, linears=len(plain))] if plain else []


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    """Sizes within a few percent: of the graph itself only a guess is known."""
    facts, decoder, passed = source.facts, read_decoder(source), left_out(source)
    total = _GRAPH_BYTES_PER_LAYER * decoder.layers + 4 * decoder.head_dim * positions(decoder)
    for name in source.linears:
        (out, width), groups = source.shape(name), source.groups(name)
        zeros = 0 if facts.sym else out * zero_bytes(groups, facts.bits)
        total += out * width * facts.bits // 8 + 4 * out * groups + zeros
    for name in (name for name in source.kept if name not in passed):
        info = source.reader.info(name)
        total += info.nbytes // info.dtype.itemsize * kept_dtype(source, name, options).itemsize
    notes = ["sequences of one batch are padded on the right: GroupQueryAttention takes their lengths from the mask"]
    notes += notes_of(source)
    notes += _runtime_notes(source, decoder, read_parts(source.spec))
    if positions(decoder) < decoder.context:
        notes.append(f"the tables of rotation, and so the context, end at {positions(decoder)} tokens")
    return ExportPlan(total, 2, {**source.dropped, **passed}, tuple(notes))


def _runtime_notes(source: ExportSource, decoder: Decoder, parts: Parts) -> list[str]:
    """What experts and linear attention ask of the runtime."""
    operators, notes = [], []
    if parts.experts is not None and takes_qmoe(source.facts, parts.experts, decoder.hidden):
        operators.append("QMoE with router_weights")
    elif parts.experts is not None:
        notes.append("experts are computed by a loop over those called: QMoE is not exact for these codes")
    if parts.mixer is not None:
        operators.append("LinearAttention")
    if operators:
        notes.append(f"made for ONNX Runtime 1.31 and onnxruntime-genai 0.18 ({' and '.join(operators)})")
    return notes


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Data first, then the graph that speaks of it, then configs."""
    decoder, parts = read_decoder(source), read_parts(source.spec)
    places = write_data(source, options, target, decoder, progress)
    shapes = {name: source.shape(name) for name in source.linears}
    graph = Graph(decoder, parts, source.facts, shapes, frozenset(source.kept))
    build_nodes(graph)
    model = build_model(graph, tensor_protos(places))
    with open(target.folder / MODEL_FILE, "wb") as file:
        file.write(model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
    write_companions(source, target.folder, options.rest)
    write_json_atomically(target.folder / "genai_config.json", genai_config(source, decoder, parts, target.folder))


def genai_config(source: ExportSource, decoder: Decoder, parts: Parts, folder: Path) -> dict[str, Any]:
    """genai_config.json; ids of special tokens come from generation_config.json, or else from config.json."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokens = {**source.spec.config, **source.spec.text_config}
    tokens |= {key: value for key, value in generation.items() if value is not None}
    end = tokens.get("eos_token_id")
    first = end[0] if isinstance(end, list) else end
    begin, pad = tokens.get("bos_token_id"), tokens.get("pad_token_id")
    kinds = ("conv", "recurrent") if parts.mixer is not None else ()
    special = {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": first if pad is None else pad,
    }
    return {
        "model": {
            "type": RUNTIME_TYPES.get(decoder.model_type, decoder.model_type),
            **{key: value for key, value in special.items() if value is not None},  # it refuses null, not absence
            "context_length": positions(decoder),
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
                    **{f"past_{kind}_names": f"past.%d.{kind}" for kind in kinds},
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    **{f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds},
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": positions(decoder),
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


def _part(proto: Any, start: int, stop: int) -> Any:
    """The TensorProto of rows start..stop (dimension 0) of a tensor of the data file."""
    part = onnx().TensorProto()
    part.CopyFrom(proto)
    del part.dims[:], part.external_data[:]
    part.dims.extend([stop - start, *proto.dims[1:]])
    places = {entry.key: entry.value for entry in proto.external_data}
    size = int(places["length"]) // proto.dims[0]
    places |= {"offset": str(int(places["offset"]) + start * size), "length": str((stop - start) * size)}
    for key, value in places.items():
        part.external_data.add(key=key, value=value)
    return part


def _rows(source: ExportSource, tensors: list[Tensor]) -> PackedRows:
    """The weight that codes, scales and perhaps zeros mean."""
    facts, (codes, scales) = source.facts, tensors[:2]
    groups = scales.shape[1]
    zeros = torch.full(scales.shape, 2 ** (facts.bits - 1), dtype=torch.uint8)
    if len(tensors) > 2:
        zeros = unpacked_zeros(tensors[2], groups, facts.bits)
    grid = LinearGrid(scales, zeros, consecutive_groups(groups * facts.group_size, groups))
    return PackedRows(codes.flatten(1), facts.bits, grid)


def _check_attributes(source: ExportSource, node: Any, shape: tuple[int, int]) -> None:
    """AuditError where a MatMulNBits node is not that of a weight of `shape` (out, in)."""
    facts, (out, width) = source.facts, shape
    found = {attribute.name: attribute.i for attribute in node.attribute}
    expected = {"K": width, "N": out, "bits": facts.bits, "block_size": facts.group_size, "accuracy_level": 1}
    if found != expected:
        raise AuditError(f"the node '{node.name}' has the attributes {found}", f"they should be {expected}")


def _every_other(both: PackedRows, first: int) -> PackedRows:
    """Rows first, first + 2, ...: gate (0) or up (1) of their stack."""
    grid = LinearGrid(both.grid.scales[first::2], both.grid.zeros[first::2], both.grid.g_idx)
    return PackedRows(both.stream[first::2].contiguous(), both.bits, grid)


@dataclass(frozen=True)
class _Reading:
    """A written graph: its MatMulNBits, QMoE and Loop nodes and its tensors by name."""

    source: ExportSource
    parts: Parts
    folder: Path
    nodes: dict[str, Any]
    tensors: dict[str, Any]

    def node(self, name: str) -> Any:
        """AuditError where there is no such node."""
        if name not in self.nodes:
            raise AuditError(f"the graph in {MODEL_FILE} has no node '{name}' with quantized weights")
        return self.nodes[name]

    def linear(self, name: str) -> PackedRows:
        """What a MatMulNBits node says of its weight."""
        node = self.node(name)
        _check_attributes(self.source, node, self.source.shape(name))
        return _rows(self.source, [_torch_of(self.tensors[part], self.folder) for part in node.input[1:]])

    def experts(self, mlp: str) -> None:
        """AuditError where the node or nodes of a block's experts do not compute them."""
        experts, hidden = self.parts.experts, self.source.spec.hidden_size
        assert experts is not None
        if not takes_qmoe(self.source.facts, experts, hidden):
            for part, shape in ((GATE_UP, (2 * experts.width, hidden)), (DOWN, (hidden, experts.width))):
                _check_attributes(self.source, self.node(f"{mlp}.experts.{part}"), shape)
            return
        node, value = self.node(f"{mlp}.experts"), onnx().helper.get_attribute_value
        found = {attribute.name: value(attribute) for attribute in node.attribute}
        found = {key: word.decode() if isinstance(word, bytes) else word for key, word in found.items()}
        expected = qmoe_attributes(self.source.facts, experts)
        if found != expected:
            raise AuditError(f"the node '{node.name}' has the attributes {found}", f"they should be {expected}")

    def expert(self, mlp: str, index: int, part: str) -> PackedRows:
        """One expert's weight out of its stack."""
        kinds = ("codes", "scales") if self.source.facts.sym else ("codes", "scales", "zeros")
        stacks = [self.tensors[stack_name(mlp, part, kind)] for kind in kinds]
        return _rows(self.source, [_torch_of(_part(stack, index, index + 1), self.folder)[0] for stack in stacks])

    def kept(self, name: str) -> Iterator[Piece]:
        """Rows of a kept tensor, about 32 MiB at a time."""
        for start, stop in row_pieces(self.source.reader.info(name)):
            yield Piece(name, _torch_of(_part(self.tensors[name], start, stop), self.folder), start)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    model = onnx().load(str(folder / MODEL_FILE), load_external_data=False)
    bodies = [node.attribute[0].g.node for node in model.graph.node if node.op_type == "Loop"]
    nodes = {node.name: node for part in (model.graph.node, *bodies) for node in part if node.op_type in _PRODUCTS}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    reading = _Reading(source, read_parts(source.spec), folder, nodes, tensors)
    checked: set[str] = set()
    for name in source.linears:
        found = EXPERT.fullmatch(name)
        if found is None:
            yield Piece(name, reading.linear(name))
            continue
        mlp, index, role = found["mlp"], int(found["index"]), found["role"]
        if mlp not in checked:
            reading.experts(mlp)
            checked.add(mlp)
        stacked = reading.expert(mlp, index, DOWN if role == "down" else GATE_UP)
        yield Piece(name, stacked if role == "down" else _every_other(stacked, int(role == "up")))
    passed = left_out(source)
    for name in (name for name in source.kept if name not in passed):
        yield from reading.kept(name)


ONNX = Format(
    name="onnx",
    summary="ONNX with MatMulNBits and QMoE, 4 or 8 bits: consecutive groups, symmetric or not; text decoder",
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
