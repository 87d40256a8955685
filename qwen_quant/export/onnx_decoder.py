"""A decoder as an ONNX graph with ONNX Runtime's own operators, as onnxruntime-genai runs it.

Inputs (B sequences, L new tokens, S = past + L):

    input_ids                   int64 [B, L]
    attention_mask              int64 [B, S]    1 for a token; its row sums are the lengths, so padding stands right
    past_key_values.N.key       FP32  [B, kv_heads, past, head_dim], and .value, of the blocks with attention
    past.N.conv, .recurrent     of the blocks with linear attention: see onnx_linear.py

Outputs: logits FP32 [B, L, vocabulary], present.N.* like the past.  GroupQueryAttention rotates queries and keys
itself, at the positions that follow from the lengths, by tables of cosine and sine [context, W], W a multiple of 8:
value i of a head turns together with value W + i.  Where the model rotates 2r < 2W values, the tables go on with angles
of 0, and the values of queries and keys are put in another order, the same for both, which changes no product.
"""

from __future__ import annotations

import math
from typing import Any

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.onnx_experts import sparse_mlp
from qwen_quant.export.onnx_graph import DOMAIN, Graph, onnx
from qwen_quant.export.onnx_linear import linear_attention, tokens

OPSET, DOMAIN_OPSET, IR_VERSION = 21, 1, 10


def rotation_width(decoder: Decoder) -> int:
    """W of the module's docstring."""
    return -(-decoder.inv_freq.shape[0] // 8) * 8


def _order(decoder: Decoder) -> list[int]:
    """Which value of a head comes at each place, so that value i turns together with value W + i."""
    half, width = decoder.inv_freq.shape[0], rotation_width(decoder)
    order, rest = [-1] * decoder.head_dim, iter(range(2 * half, decoder.head_dim))
    order[:half], order[width : width + half] = range(half), range(half, 2 * half)
    return [next(rest) if value < 0 else value for value in order]


def _rotatable(graph: Graph, value: str, name: str, count: int) -> str:
    """Queries or keys [B, L, count * head_dim], their heads in `_order`."""
    decoder, width = graph.decoder, graph.decoder.head_dim
    if rotation_width(decoder) == decoder.inv_freq.shape[0]:
        return value
    heads = graph.heads(value, f"{name}.heads.apart", count, width)
    ordered = graph.add("Gather", [heads, graph.ints(*_order(decoder))], f"{name}.ordered", axis=3)
    return graph.heads(ordered, f"{name}.together", count * width)


def _normed_heads(graph: Graph, value: str, index: int, part: str, count: int) -> str:
    """Queries or keys [B, L, count * head_dim], normed head by head where the model has such a norm."""
    name = graph.decoder.name(index, f"{part}_norm")
    if not graph.has(f"{name}.weight"):
        return value
    heads = graph.heads(value, f"{name}.heads", count, graph.decoder.head_dim)
    normed = graph.norm(heads, f"{name}.weight", f"{name}.normed")
    return graph.heads(normed, f"{name}.merged", count * graph.decoder.head_dim)


def _queries_keys_values(graph: Graph, x: str, index: int) -> list[str]:
    """Three projections, or the parts of one that holds them one after another."""
    decoder = graph.decoder
    fused = decoder.name(index, "qkv")
    if not fused:
        return [graph.project(x, decoder.name(index, part)) for part in "qkv"]
    parts = [f"{fused}.{part}" for part in "qkv"]
    sizes = [count * decoder.head_dim for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
    graph.many("Split", [graph.project(x, fused), graph.ints(*sizes)], parts, axis=-1)
    return parts


def _query_and_gate(graph: Graph, both: str, index: int) -> list[str]:
    """[B, L, heads * 2 * head_dim], a query and a gate for each head -> each [B, L, heads * head_dim]."""
    decoder, name = graph.decoder, graph.decoder.name(index, "q")
    apart = graph.heads(both, f"{name}.heads", decoder.heads, 2 * decoder.head_dim)
    pieces = [f"{name}.query", f"{name}.gate"]
    graph.many("Split", [apart, graph.ints(decoder.head_dim, decoder.head_dim)], pieces, axis=-1)
    return [graph.heads(piece, f"{piece}.flat", decoder.heads * decoder.head_dim) for piece in pieces]


def _attention(graph: Graph, x: str, index: int) -> str:
    decoder = graph.decoder
    output, mixed = decoder.name(index, "o"), f"{decoder.name(index, 'o')}.mixed"
    query, key, value = _queries_keys_values(graph, x, index)
    query, gate = _query_and_gate(graph, query, index) if graph.parts.gated else (query, "")
    query = _normed_heads(graph, query, index, "q", decoder.heads)
    key = _normed_heads(graph, key, index, "k", decoder.kv_heads)
    query = _rotatable(graph, query, decoder.name(index, "q"), decoder.heads)
    key = _rotatable(graph, key, decoder.name(index, "k"), decoder.kv_heads)
    past, present = f"past_key_values.{index}.", f"present.{index}."
    state = [f"{past}key", f"{past}value", "lengths", "total_length", "rotation.cos", "rotation.sin"]
    graph.many(
        "GroupQueryAttention",
        [query, key, value, *state],
        [mixed, f"{present}key", f"{present}value"],
        domain=DOMAIN,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=1 / math.sqrt(decoder.head_dim),
        do_rotary=1,
        rotary_interleaved=0,
    )
    if gate:
        mixed = graph.add("Mul", [mixed, graph.add("Sigmoid", [gate], f"{gate}.sigmoid")], f"{output}.gated")
    return graph.project(mixed, output)


def _block(graph: Graph, x: str, index: int) -> str:
    decoder, parts = graph.decoder, graph.parts
    names = {role: decoder.name(index, role) for role in ("attention_norm", "mlp_norm", "gate", "up", "down")}
    normed = graph.norm(x, f"{names['attention_norm']}.weight", f"{names['attention_norm']}.normed")
    mixed = (linear_attention if parts.linear[index] else _attention)(graph, normed, index)
    x = graph.add("Add", [x, mixed], f"block.{index}.attended")
    normed = graph.norm(x, f"{names['mlp_norm']}.weight", f"{names['mlp_norm']}.normed")
    if parts.sparse[index]:
        inner = sparse_mlp(graph, normed, f"{decoder.blocks}.{index}.mlp")
    else:
        inner = graph.mlp(normed, names["gate"], names["up"], names["down"])
    return graph.add("Add", [x, inner], f"block.{index}.output")


def _lengths(graph: Graph) -> None:
    """`lengths` int32 [B, 1]: tokens of each sequence minus one; `total_length` int32: S; `mask.size` int64 [1]: S."""
    total = graph.add("ReduceSum", ["attention_mask", graph.ints(1)], "mask.sum", keepdims=1)
    graph.add("Cast", [graph.add("Sub", [total, graph.ints(1)], "mask.last")], "lengths", to=onnx().TensorProto.INT32)
    size = graph.add("Gather", [graph.add("Shape", ["attention_mask"], "mask.shape"), graph.ints(1)], "mask.size")
    scalar = graph.add("Squeeze", [size, graph.ints(0)], "mask.total")
    graph.add("Cast", [scalar], "total_length", to=onnx().TensorProto.INT32)
    if graph.parts.mixer is not None:
        tokens(graph, graph.parts.mixer)


def build_nodes(graph: Graph) -> None:
    """Fill `graph` with every node of the decoder."""
    decoder = graph.decoder
    _lengths(graph)
    embedding = f"{decoder.embedding}.weight"
    x = graph.add("Gather", [graph.plain(embedding), "input_ids"], "embedded")
    for index in range(decoder.layers):
        x = _block(graph, x, index)
    x = graph.norm(x, f"{decoder.final_norm}.weight", "normed")
    if decoder.tied:
        turned = graph.add("Transpose", [graph.plain(embedding)], "head.turned", perm=[1, 0])
        graph.add("MatMul", [x, turned], "logits")
    else:
        graph.add("Identity", [graph.project(x, decoder.head)], "logits")


def _states(graph: Graph, index: int, when: str) -> dict[str, list[Any]]:
    """Name -> shape of what block `index` keeps between tokens; `when`: "past" or "present"."""
    decoder, mixer = graph.decoder, graph.parts.mixer
    if mixer is not None and graph.parts.linear[index]:
        conv = ["batch_size", mixer.channels, mixer.kernel - 1]
        recurrent = ["batch_size", mixer.value_heads, mixer.key_dim, mixer.value_dim]
        return {f"{when}.{index}.conv": conv, f"{when}.{index}.recurrent": recurrent}
    prefix, length = ("past_key_values", "past_length") if when == "past" else ("present", "total_length")
    shape = ["batch_size", decoder.kv_heads, length, decoder.head_dim]
    return {f"{prefix}.{index}.{part}": shape for part in ("key", "value")}


def build_model(graph: Graph, initializers: list[Any]) -> Any:
    """The ModelProto around `graph`'s nodes; `initializers` are TensorProtos beside its own small constants."""
    library, decoder = onnx(), graph.decoder
    helper, kinds = library.helper, library.TensorProto

    def values(when: str) -> list[Any]:
        states = [_states(graph, index, when) for index in range(decoder.layers)]
        pairs = [pair for state in states for pair in state.items()]
        return [helper.make_tensor_value_info(name, kinds.FLOAT, shape) for name, shape in pairs]

    inputs = [
        helper.make_tensor_value_info("input_ids", kinds.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", kinds.INT64, ["batch_size", "total_length"]),
        *values("past"),
    ]
    shape = ["batch_size", "sequence_length", decoder.vocabulary]
    outputs = [helper.make_tensor_value_info("logits", kinds.FLOAT, shape), *values("present")]
    tensors = [*initializers, *graph.constants.values()]
    made = helper.make_graph(graph.nodes, "qwen_quant", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qwen-quant")
