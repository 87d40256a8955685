"""A decoder (qwen, qwen2, qwen3) as an OpenVINO graph with its KV cache inside, op by op.

Inputs (B sequences, L new tokens, S = past + L):

    input_ids       int64 [B, L]
    attention_mask  int64 [B, S]    1 for a token, 0 for padding
    position_ids    int64 [B, L]
    beam_idx        int32 [B]       which sequence of the last step each sequence continues

Output: logits FP32 [B, L, vocabulary].  Keys and values live in variables [B, kv_heads, past, head_dim] under the names
that optimum gives them, because openvino-genai looks for such a graph and turns its attention into paged attention.
All arithmetic is FP32 in the order in which transformers computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.formats import require

_MASKED = float(np.finfo(np.float32).min)


def opset() -> Any:
    """openvino's Python opset (InputError where it is not installed)."""
    require("openvino", "openvino", "openvino")
    return require("openvino.opset13", "openvino", "openvino")


@dataclass(frozen=True)
class Linear:
    """A linear in the graph: `weight` FP32 [out, in], `order` int64 [in] (columns of the weight, None: as they are)."""

    weight: Any
    order: Any | None = None


@dataclass(frozen=True)
class Weights:
    """Nodes of all weights by their names on disk; `plain` FP32 (embedding, norms, biases, matrices kept as stored)."""

    linears: Mapping[str, Linear]
    plain: Mapping[str, Any]


@dataclass(frozen=True)
class _Step:
    """What all blocks share: cosine and sine [B, 1, L, head_dim], mask [B, 1, L, S], and the batch size [1]."""

    cosine: Any
    sine: Any
    mask: Any
    batch: Any
    beams: Any


def _ints(*values: int) -> Any:
    return opset().constant(np.array(values, dtype=np.int64))


def _float(value: float) -> Any:
    return opset().constant(np.array(value, dtype=np.float32))


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    op = opset()
    mean = op.reduce_mean(op.power(x, _float(2.0)), _ints(-1), keep_dims=True)
    root = op.sqrt(op.add(mean, _float(eps)))
    return op.multiply(op.multiply(x, op.divide(_float(1.0), root)), weight)


def linear(x: Any, name: str, weights: Weights) -> Any:
    """x [B, L, in] -> [B, L, out], with the bias if there is one."""
    op = opset()
    found = weights.linears.get(name) or Linear(weights.plain[f"{name}.weight"])
    if found.order is not None:
        x = op.gather(x, found.order, _ints(2))
    product = op.matmul(x, found.weight, False, True)
    product.set_friendly_name(name)
    bias = weights.plain.get(f"{name}.bias")
    return product if bias is None else op.add(product, bias)


def _rotation(decoder: Decoder, position_ids: Any) -> tuple[Any, Any]:
    """(cosine, sine) [B, 1, L, head_dim]."""
    op = opset()
    positions = op.convert(op.unsqueeze(position_ids, _ints(1)), "f32")  # [B, 1, L]
    angles = op.multiply(
        op.unsqueeze(positions, _ints(3)), op.constant(decoder.inv_freq.numpy().reshape(1, 1, 1, -1).copy())
    )
    both, scale = op.concat([angles, angles], -1), _float(decoder.rope_scale)
    return op.multiply(op.cos(both), scale), op.multiply(op.sin(both), scale)


def _rotated(x: Any, step: _Step, head_dim: int) -> Any:
    """x * cosine + (-second half, first half) * sine."""
    op, half = opset(), head_dim // 2
    first = op.slice(x, _ints(0), _ints(half), _ints(1), _ints(3))
    second = op.slice(x, _ints(half), _ints(head_dim), _ints(1), _ints(3))
    turned = op.concat([op.multiply(second, _float(-1.0)), first], -1)
    return op.add(op.multiply(x, step.cosine), op.multiply(turned, step.sine))


def _mask(input_ids: Any, attention_mask: Any) -> Any:
    """FP32 [B, 1, L, S]: 0 where a token may look, the least number elsewhere."""
    op, zero, one = opset(), _ints(0), _ints(1)
    total = op.gather(op.shape_of(attention_mask, "i64"), one, zero)
    new = op.gather(op.shape_of(input_ids, "i64"), one, zero)
    scalars = [op.squeeze(value, zero) for value in (op.subtract(total, new), total)]
    step = op.constant(np.array(1, dtype=np.int64))
    rows = op.range(scalars[0], scalars[1], step, output_type="i64")
    columns = op.range(op.constant(np.array(0, dtype=np.int64)), scalars[1], step, output_type="i64")
    causal = op.less_equal(op.unsqueeze(columns, zero), op.unsqueeze(rows, one))  # [L, S]
    real = op.unsqueeze(op.convert(attention_mask, "boolean"), _ints(1, 2))  # [B, 1, 1, S]
    return op.select(op.logical_and(causal, real), _float(0.0), _float(_MASKED))


class _Cache:
    """Variables of the KV cache, collected while the graph is built."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []

    def extended(self, new: Any, name: str, decoder: Decoder, step: _Step) -> Any:
        """Past and `new` [B, kv_heads, L, head_dim] along the tokens; the result is the next step's past."""
        op, util = opset(), require("openvino.op.util", "openvino", "openvino")
        openvino = require("openvino", "openvino", "openvino")
        info = util.VariableInfo()
        info.data_shape = openvino.PartialShape([-1, decoder.kv_heads, -1, decoder.head_dim])
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = util.Variable(info)
        empty = op.concat([step.batch, _ints(decoder.kv_heads, 0, decoder.head_dim)], 0)
        past = op.read_value(op.broadcast(_float(0.0), empty), variable)
        chosen = op.gather(past, step.beams, _ints(0))
        whole = op.concat([chosen, new], 2)
        self.sinks.append(op.assign(whole, variable))
        return whole


def _heads(x: Any, count: int, width: int) -> Any:
    """[B, L, count * width] -> [B, L, count, width]."""
    return opset().reshape(x, _ints(0, 0, count, width), True)


def _repeated(x: Any, decoder: Decoder, step: _Step) -> Any:
    """Keys or values of every query head: [B, kv_heads, S, D] -> [B, heads, S, D]."""
    op, times = opset(), decoder.heads // decoder.kv_heads
    if times == 1:
        return x
    wide = op.broadcast(op.unsqueeze(x, _ints(2)), _ints(1, 1, times, 1, 1), broadcast_spec="BIDIRECTIONAL")
    return op.reshape(wide, _ints(0, decoder.heads, -1, decoder.head_dim), True)


def _queries_keys_values(x: Any, index: int, decoder: Decoder, weights: Weights) -> dict[str, Any]:
    """Three projections, or the parts of one that holds them one after another."""
    op, fused = opset(), decoder.name(index, "qkv")
    if not fused:
        return {part: linear(x, decoder.name(index, part), weights) for part in "qkv"}
    sizes = _ints(*(count * decoder.head_dim for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)))
    divided = op.variadic_split(linear(x, fused, weights), _ints(2), sizes)
    return {part: divided.output(k) for k, part in enumerate("qkv")}


def _attention(x: Any, index: int, decoder: Decoder, weights: Weights, shared: tuple[_Step, _Cache]) -> Any:
    """Self-attention of block `index` on normed hidden states [B, L, hidden]."""
    op, (step, cache) = opset(), shared
    parts, projected = {}, _queries_keys_values(x, index, decoder, weights)
    for part, count in (("q", decoder.heads), ("k", decoder.kv_heads), ("v", decoder.kv_heads)):
        value = _heads(projected[part], count, decoder.head_dim)
        norm = weights.plain.get(f"{decoder.name(index, f'{part}_norm')}.weight")
        value = value if norm is None else rms_norm(value, norm, decoder.eps)
        value = op.transpose(value, _ints(0, 2, 1, 3))
        parts[part] = value if part == "v" else _rotated(value, step, decoder.head_dim)
    past = f"past_key_values.{index}."
    keys = cache.extended(parts["k"], f"{past}keypresent.{index}.key", decoder, step)
    values = cache.extended(parts["v"], f"{past}valuepresent.{index}.value", decoder, step)
    scale = _float(1 / math.sqrt(decoder.head_dim))
    mixed = op.scaled_dot_product_attention(
        parts["q"], _repeated(keys, decoder, step), _repeated(values, decoder, step), step.mask, scale, causal=False
    )
    merged = op.reshape(op.transpose(mixed, _ints(0, 2, 1, 3)), _ints(0, 0, decoder.heads * decoder.head_dim), True)
    return linear(merged, decoder.name(index, "o"), weights)


def _block(x: Any, index: int, decoder: Decoder, weights: Weights, shared: tuple[_Step, _Cache]) -> Any:
    op, names = opset(), {role: decoder.name(index, role) for role in decoder.roles}
    normed = rms_norm(x, weights.plain[f"{names['attention_norm']}.weight"], decoder.eps)
    x = op.add(x, _attention(normed, index, decoder, weights, shared))
    normed = rms_norm(x, weights.plain[f"{names['mlp_norm']}.weight"], decoder.eps)
    gate = op.swish(linear(normed, names["gate"], weights))
    inner = op.multiply(gate, linear(normed, names["up"], weights))
    return op.add(x, linear(inner, names["down"], weights))


def build_model(decoder: Decoder, weights: Weights) -> Any:
    """The whole decoder as an openvino.Model."""
    op, openvino = opset(), require("openvino", "openvino", "openvino")
    shapes = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
    inputs = {}
    for name, shape in shapes.items():
        inputs[name] = op.parameter(shape, np.int32 if name == "beam_idx" else np.int64, name=name)
        inputs[name].output(0).set_names({name})
    ids = inputs["input_ids"]
    embedding = weights.plain[f"{decoder.embedding}.weight"]
    cosine, sine = _rotation(decoder, inputs["position_ids"])
    batch = op.gather(op.shape_of(ids, "i64"), _ints(0), _ints(0))
    step = _Step(cosine, sine, _mask(ids, inputs["attention_mask"]), batch, inputs["beam_idx"])
    cache = _Cache()
    x = op.gather(embedding, ids, _ints(0))
    for index in range(decoder.layers):
        x = _block(x, index, decoder, weights, (step, cache))
    x = rms_norm(x, weights.plain[f"{decoder.final_norm}.weight"], decoder.eps)
    head = Linear(embedding) if decoder.tied else weights.linears.get(decoder.head)
    named = weights if head is None else Weights({**weights.linears, decoder.head: head}, weights.plain)
    logits = op.result(linear(x, decoder.head, named))
    logits.output(0).set_names({"logits"})
    return openvino.Model([logits], cache.sinks, list(inputs.values()), "qwen_quant")
