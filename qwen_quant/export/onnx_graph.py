"""A decoder (qwen, qwen2, qwen3) as an ONNX graph with ONNX Runtime's own operators, as onnxruntime-genai runs it.

Inputs (B sequences, L new tokens, S = past + L):

    input_ids                   int64 [B, L]
    attention_mask              int64 [B, S]    1 for a token; its row sums are the lengths, so padding stands right
    past_key_values.N.key       FP32  [B, kv_heads, past, head_dim], and .value

Outputs: logits FP32 [B, L, vocabulary], present.N.key and .value like the past.  GroupQueryAttention rotates queries
and keys itself, at the positions that follow from the lengths, by tables of cosine and sine [context, head_dim / 2].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.formats import require

DOMAIN = "com.microsoft"
OPSET, DOMAIN_OPSET, IR_VERSION = 21, 1, 10


def onnx() -> Any:
    """The onnx library (InputError where it is not installed)."""
    return require("onnx", "onnx", "onnx")


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        decoder: what is built.
        linear: (graph, input, name of a linear) -> its output without the bias.
        plain: (graph, name of a kept tensor) -> its FP32 value.
        has: whether a kept tensor of this name exists.
        nodes: in order. constants: small initializers by name.
    """

    decoder: Decoder
    linear: Callable[[Graph, str, str], str]
    plain: Callable[[Graph, str], str]
    has: Callable[[str], bool]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, inputs: list[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, which is called as the node is; returns that name."""
        self.many(kind, inputs, [name], domain=domain, **attributes)
        return name

    def many(self, kind: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any) -> None:
        """Append a node that is called as its first output."""
        make = onnx().helper.make_node
        self.nodes.append(make(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def ints(self, *values: int, kind: str = "INT64") -> str:
        """Name of a small integer constant [len(values)]; a scalar is one value of kind INT32."""
        library, name = onnx(), f"const.{kind.lower()}." + "_".join(map(str, values))
        dtype = getattr(library.TensorProto, kind)
        self.constants.setdefault(name, library.helper.make_tensor(name, dtype, [len(values)], list(values)))
        return name

    def norm(self, x: str, weight: str, name: str) -> str:
        """RMSNorm over the last axis."""
        values, eps = self.plain(self, weight), self.decoder.eps
        return self.add("SimplifiedLayerNormalization", [x, values], name, axis=-1, epsilon=eps, stash_type=1)

    def project(self, x: str, name: str) -> str:
        """A linear with its bias."""
        product = self.linear(self, x, name)
        bias = f"{name}.bias"
        return self.add("Add", [product, self.plain(self, bias)], f"{name}.biased") if self.has(bias) else product


def _normed_heads(graph: Graph, value: str, index: int, part: str, count: int) -> str:
    """Queries or keys [B, L, count * head_dim], normed head by head where the model has such a norm."""
    name = graph.decoder.name(index, f"{part}_norm")
    if not graph.has(f"{name}.weight"):
        return value
    width = graph.decoder.head_dim
    heads = graph.add("Reshape", [value, graph.ints(0, 0, count, width)], f"{name}.heads")
    normed = graph.norm(heads, f"{name}.weight", f"{name}.normed")
    return graph.add("Reshape", [normed, graph.ints(0, 0, count * width)], f"{name}.merged")


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


def _attention(graph: Graph, x: str, index: int) -> str:
    decoder = graph.decoder
    output = decoder.name(index, "o")
    query, key, value = _queries_keys_values(graph, x, index)
    query = _normed_heads(graph, query, index, "q", decoder.heads)
    key = _normed_heads(graph, key, index, "k", decoder.kv_heads)
    past, present = f"past_key_values.{index}.", f"present.{index}."
    state = [f"{past}key", f"{past}value", "lengths", "total_length", "rotation.cos", "rotation.sin"]
    graph.many(
        "GroupQueryAttention",
        [query, key, value, *state],
        [f"{output}.mixed", f"{present}key", f"{present}value"],
        domain=DOMAIN,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=1 / math.sqrt(decoder.head_dim),
        do_rotary=1,
        rotary_interleaved=0,
    )
    return graph.project(f"{output}.mixed", output)


def _block(graph: Graph, x: str, index: int) -> str:
    names = {role: graph.decoder.name(index, role) for role in ("attention_norm", "mlp_norm", "gate", "up", "down")}
    normed = graph.norm(x, f"{names['attention_norm']}.weight", f"{names['attention_norm']}.normed")
    x = graph.add("Add", [x, _attention(graph, normed, index)], f"block.{index}.attended")
    normed = graph.norm(x, f"{names['mlp_norm']}.weight", f"{names['mlp_norm']}.normed")
    gate, up = graph.project(normed, names["gate"]), graph.project(normed, names["up"])
    swish = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{names['gate']}.sigmoid")], f"{names['gate']}.silu")
    inner = graph.add("Mul", [swish, up], f"{names['down']}.input")
    return graph.add("Add", [x, graph.project(inner, names["down"])], f"block.{index}.output")


def _lengths(graph: Graph) -> None:
    """`lengths` int32 [B, 1]: tokens of each sequence minus one; `total_length` int32: S."""
    total = graph.add("ReduceSum", ["attention_mask", graph.ints(1)], "mask.sum", keepdims=1)
    graph.add("Cast", [graph.add("Sub", [total, graph.ints(1)], "mask.last")], "lengths", to=onnx().TensorProto.INT32)
    size = graph.add("Gather", [graph.add("Shape", ["attention_mask"], "mask.shape"), graph.ints(1)], "mask.size")
    scalar = graph.add("Squeeze", [size, graph.ints(0)], "mask.total")
    graph.add("Cast", [scalar], "total_length", to=onnx().TensorProto.INT32)


def build_nodes(graph: Graph) -> None:
    """Fill `graph` with every node of the decoder."""
    decoder = graph.decoder
    _lengths(graph)
    embedding = f"{decoder.embedding}.weight"
    x = graph.add("Gather", [graph.plain(graph, embedding), "input_ids"], "embedded")
    for index in range(decoder.layers):
        x = _block(graph, x, index)
    x = graph.norm(x, f"{decoder.final_norm}.weight", "normed")
    if decoder.tied:
        turned = graph.add("Transpose", [graph.plain(graph, embedding)], "head.turned", perm=[1, 0])
        graph.add("MatMul", [x, turned], "logits")
    else:
        graph.add("Identity", [graph.project(x, decoder.head)], "logits")


def build_model(graph: Graph, initializers: list[Any]) -> Any:
    """The ModelProto around `graph`'s nodes; `initializers` are TensorProtos beside its own small constants."""
    library, decoder = onnx(), graph.decoder
    helper, kinds = library.helper, library.TensorProto
    cache = [f"{index}.{part}" for index in range(decoder.layers) for part in ("key", "value")]

    def values(prefix: str, length: str) -> list[Any]:
        shape = ["batch_size", decoder.kv_heads, length, decoder.head_dim]
        return [helper.make_tensor_value_info(prefix + name, kinds.FLOAT, shape) for name in cache]

    inputs = [
        helper.make_tensor_value_info("input_ids", kinds.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", kinds.INT64, ["batch_size", "total_length"]),
        *values("past_key_values.", "past_length"),
    ]
    shape = ["batch_size", "sequence_length", decoder.vocabulary]
    outputs = [helper.make_tensor_value_info("logits", kinds.FLOAT, shape), *values("present.", "total_length")]
    tensors = [*initializers, *graph.constants.values()]
    made = helper.make_graph(graph.nodes, "qwen_quant", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qwen-quant")
