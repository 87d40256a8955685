"""Linear attention (qwen3_next, qwen3_5) in an OpenVINO graph: a causal convolution, then the gated delta rule.

Both keep something between calls, in variables under the names that optimum gives them:

    cache_params.past.conv.N   FP32 [B, channels, kernel]               the last columns that the convolution has read
    cache_params.past.ssm.N    FP32 [B, value heads, key_dim, value_dim]  the recurrent state

The delta rule is a Loop over the new tokens, one token a turn, in FP32:

    S = exp(g) S;   S = S + k (beta (v - S^T k))^T;   out = S^T q

written operation by operation as optimum-intel exports it, because OpenVINO (since 2026.1; the pass is called
GatedDeltaNetFusion) knows that Loop and puts one GatedDeltaNet node in its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_quant.export.graph_parts import L2_EPS, LinearMixer
from qwen_quant.export.openvino_ops import (
    END,
    Build,
    Weights,
    heads,
    integer,
    ints,
    linear,
    number,
    openvino,
    opset,
    rms_norm,
    silu,
)


def linear_attention(x: Any, index: int, build: Build) -> Any:
    """x [B, L, hidden] -> [B, L, hidden] through the linear attention of block `index`."""
    op, mixer, weights, name = opset(), build.parts.mixer, build.weights, f"{build.decoder.blocks}.{index}.linear_attn"
    assert mixer is not None
    number_of_kind = sum(build.parts.linear[:index])
    x = op.multiply(x, build.step.real)  # padding must leave no trace in the states
    mixed, z, b, a = (_fused if mixer.fused else _apart)(x, name, mixer, weights)
    mixed = op.transpose(mixed, ints(0, 2, 1))
    mixed = _convolved(mixed, weights.plain[f"{name}.conv1d.weight"], mixer, build, number_of_kind)
    mixed = op.transpose(mixed, ints(0, 2, 1))
    sizes = ints(mixer.keys, mixer.keys, mixer.values)
    parts = op.variadic_split(mixed, ints(2), sizes)
    q, k = (_unit(_per_value_head(parts.output(i), mixer)) for i in range(2))
    v = heads(parts.output(2), mixer.value_heads, mixer.value_dim)
    rate = op.multiply(op.exp(weights.plain[f"{name}.A_log"]), number(-1.0))
    g = op.multiply(rate, op.softplus(op.add(a, weights.plain[f"{name}.dt_bias"])))
    out = _delta_rule((q, k, v, g, op.sigmoid(b)), mixer, build, number_of_kind)
    out = op.multiply(rms_norm(out, weights.plain[f"{name}.norm.weight"], build.decoder.eps), silu(z))
    return linear(op.reshape(out, ints(0, 0, mixer.values), True), f"{name}.out_proj", weights)


def _apart(x: Any, name: str, mixer: LinearMixer, weights: Weights) -> tuple[Any, Any, Any, Any]:
    """(q k v [B, L, channels], z [B, L, value heads, value_dim], b and a [B, L, value heads]) from four projections."""
    mixed, z, b, a = (linear(x, f"{name}.in_proj_{part}", weights) for part in ("qkv", "z", "b", "a"))
    return mixed, heads(z, mixer.value_heads, mixer.value_dim), b, a


def _fused(x: Any, name: str, mixer: LinearMixer, weights: Weights) -> tuple[Any, Any, Any, Any]:
    """The same from two projections that hold everything of one key head after another."""
    op, repeat = opset(), mixer.value_heads // mixer.key_heads
    wide = repeat * mixer.value_dim
    sizes = (mixer.key_dim, mixer.key_dim, wide, wide)
    parts = _split_heads(linear(x, f"{name}.in_proj_qkvz", weights), mixer.key_heads, sizes)
    mixed = op.concat([op.reshape(part, ints(0, 0, -1), True) for part in parts[:3]], 2)
    z = op.reshape(parts[3], ints(0, 0, mixer.value_heads, mixer.value_dim), True)
    b, a = _split_heads(linear(x, f"{name}.in_proj_ba", weights), mixer.key_heads, (repeat, repeat))
    return mixed, z, *(op.reshape(part, ints(0, 0, -1), True) for part in (b, a))


def _split_heads(x: Any, count: int, sizes: tuple[int, ...]) -> list[Any]:
    """[B, L, count * sum(sizes)] -> one [B, L, count, size] for each of `sizes`."""
    parts = opset().variadic_split(heads(x, count, sum(sizes)), ints(3), ints(*sizes))
    return [parts.output(k) for k in range(len(sizes))]


def _convolved(x: Any, weight: Any, mixer: LinearMixer, build: Build, index: int) -> Any:
    """silu(convolution of x [B, channels, L] with what came before it)."""
    op, kernel, channels = opset(), mixer.kernel, mixer.channels
    name = f"cache_params.past.conv.{index}cache_params.present.conv.{index}"
    past, keep = build.states.past(name, (channels, kernel), build.step)
    whole = op.concat([past, x], -1)
    keep(op.slice(whole, ints(-kernel), ints(END), ints(1), ints(2)).output(0))
    filters = op.reshape(weight, ints(channels, 1, 1, kernel), False)
    result = op.group_convolution(whole, filters, [1], [0], [0], [1])  # L + 1 columns, the first of the past alone
    new = op.multiply(op.gather(op.shape_of(x, "i64"), ints(2), integer(0)), ints(-1))
    return silu(op.slice(result, new, ints(END), ints(1), ints(2)))


def _per_value_head(x: Any, mixer: LinearMixer) -> Any:
    """Queries or keys [B, L, key heads * key_dim] -> [B, L, value heads, key_dim]."""
    op, times = opset(), mixer.value_heads // mixer.key_heads
    x = heads(x, mixer.key_heads, mixer.key_dim)
    if times == 1:
        return x
    wide = op.tile(op.unsqueeze(x, ints(3)), ints(1, 1, 1, times, 1))
    return op.reshape(wide, ints(0, 0, mixer.value_heads, mixer.key_dim), True)


def _unit(x: Any) -> Any:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    op = opset()
    total = op.add(op.reduce_sum(op.multiply(x, x), ints(-1), keep_dims=True), number(L2_EPS))
    return op.multiply(x, op.divide(number(1.0), op.sqrt(total)))


def _delta_rule(inputs: tuple[Any, ...], mixer: LinearMixer, build: Build, index: int) -> Any:
    """(q, k, v [B, L, heads, width], g, beta [B, L, heads]) -> [B, L, value heads, value_dim]."""
    op = opset()
    q, k, v = (op.transpose(part, ints(0, 2, 1, 3)) for part in inputs[:3])
    g, beta = (op.transpose(part, ints(0, 2, 1)) for part in inputs[3:])
    width = op.convert(op.gather(op.shape_of(q, "i64"), integer(3), integer(0)), "f32")
    q = op.divide(q, op.power(width, number(0.5)))
    name = f"cache_params.past.ssm.{index}cache_params.present.ssm.{index}"
    past, keep = build.states.past(name, (mixer.value_heads, mixer.key_dim, mixer.value_dim), build.step)
    length = op.gather(op.shape_of(q, "i64"), integer(2), integer(0))
    loop = op.loop(length, op.constant(np.array(True)))
    parameters, results = _turn(mixer)
    loop.set_function(openvino().Model(results, parameters, "delta_rule"))
    loop.set_special_body_ports([0, 0])
    for parameter, value in zip(parameters[1:6], (q, k, v, g, beta), strict=True):
        loop.set_sliced_input(parameter, value.output(0), 0, 1, 1, -1, 2)
    loop.set_merged_input(parameters[6], past.output(0), results[1].output(0))
    empty = op.broadcast(number(0.0), op.shape_of(v, "i64"))
    loop.set_merged_input(parameters[7], empty.output(0), results[2].output(0))
    out = loop.get_iter_value(results[2].output(0), -1)
    keep(loop.get_iter_value(results[1].output(0), -1))
    return op.transpose(out, ints(0, 2, 1, 3))


def _turn(mixer: LinearMixer) -> tuple[list[Any], list[Any]]:
    """(parameters, results) of the Loop's body, one token; the order and form of every operation are the fusion's."""
    op, count = opset(), mixer.value_heads
    shapes = [[-1, count, 1, mixer.key_dim]] * 2 + [[-1, count, 1, mixer.value_dim], [-1, count, 1], [-1, count, 1]]
    shapes += [[-1, count, mixer.key_dim, mixer.value_dim], [-1, count, -1, mixer.value_dim]]
    turn = op.parameter([], np.int32)
    q, k, v, g, beta, state, written = (op.parameter(shape, np.float32) for shape in shapes)
    decayed = op.multiply(state, op.unsqueeze(op.exp(g), ints(-1)))
    key = op.unsqueeze(op.squeeze(k, ints(2)), ints(-1))
    known = op.reduce_sum(op.multiply(decayed, key), ints(-2), keep_dims=False)
    change = op.multiply(op.subtract(op.squeeze(v, ints(2)), known), beta)
    state_now = op.add(decayed, op.multiply(key, op.unsqueeze(change, ints(-2))))
    query = op.unsqueeze(op.squeeze(q, ints(2)), ints(-1))
    out = op.reduce_sum(op.multiply(state_now, query), ints(-2), keep_dims=True)
    written_now = op.scatter_update(written, op.unsqueeze(turn, ints(0)), out, op.constant(np.array(2, dtype=np.int32)))
    results = [op.result(value) for value in (op.constant(np.array(True)), state_now, written_now)]
    return [turn, q, k, v, g, beta, state, written], results
