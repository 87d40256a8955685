"""A decoder as an OpenVINO graph with everything it remembers inside, op by op.

Inputs (B sequences, L new tokens, S = past + L):

    input_ids       int64 [B, L]
    attention_mask  int64 [B, S]    1 for a token, 0 for padding
    position_ids    int64 [B, L]    places of the tokens of a sequence, from 0, padding not counted
    beam_idx        int32 [B]       which sequence of the last step each sequence continues

Output: logits FP32 [B, L, vocabulary].  Keys and values live in variables [B, kv_heads, past, head_dim] under the names
that optimum gives them, because openvino-genai looks for such a graph and turns its attention into paged attention;
blocks with linear attention have two other variables (openvino_delta.py).  All arithmetic is FP32 in the order in which
transformers computes it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.graph_parts import Parts
from qwen_quant.export.openvino_delta import linear_attention
from qwen_quant.export.openvino_experts import sparse_mlp
from qwen_quant.export.openvino_ops import (
    END,
    Build,
    Linear,
    States,
    Step,
    Weights,
    heads,
    integer,
    ints,
    linear,
    number,
    openvino,
    opset,
    rms_norm,
    swiglu,
)

_MASKED = float(np.finfo(np.float32).min)


def _rotation(decoder: Decoder, position_ids: Any) -> tuple[Any, Any]:
    """(cosine, sine) [B, 1, L, rotated columns]."""
    op = opset()
    positions = op.convert(op.unsqueeze(position_ids, ints(1)), "f32")  # [B, 1, L]
    angles = op.multiply(
        op.unsqueeze(positions, ints(3)), op.constant(decoder.inv_freq.numpy().reshape(1, 1, 1, -1).copy())
    )
    both, scale = op.concat([angles, angles], -1), number(decoder.rope_scale)
    return op.multiply(op.cos(both), scale), op.multiply(op.sin(both), scale)


def _columns(x: Any, start: int, stop: int) -> Any:
    """Columns start..stop of the last of four axes."""
    return opset().slice(x, ints(start), ints(stop), ints(1), ints(3))


def _rotated(x: Any, step: Step, decoder: Decoder) -> Any:
    """x * cosine + (-second half, first half) * sine, of the columns that are rotated; the others as they are."""
    op, half = opset(), decoder.inv_freq.numel()
    whole = decoder.head_dim == 2 * half
    part = x if whole else _columns(x, 0, 2 * half)
    first, second = _columns(part, 0, half), _columns(part, half, 2 * half)
    turned = op.concat([op.multiply(second, number(-1.0)), first], -1)
    result = op.add(op.multiply(part, step.cosine), op.multiply(turned, step.sine))
    return result if whole else op.concat([result, _columns(x, 2 * half, decoder.head_dim)], -1)


def _lengths(input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """(past, past + new) int64 [1]."""
    op, zero, one = opset(), ints(0), ints(1)
    total = op.gather(op.shape_of(attention_mask, "i64"), one, zero)
    return op.subtract(total, op.gather(op.shape_of(input_ids, "i64"), one, zero)), total


def _mask(input_ids: Any, attention_mask: Any) -> Any:
    """FP32 [B, 1, L, S]: 0 where a token may look, the least number elsewhere."""
    op, zero, one = opset(), ints(0), ints(1)
    scalars = [op.squeeze(value, zero) for value in _lengths(input_ids, attention_mask)]
    step = op.constant(np.array(1, dtype=np.int64))
    rows = op.range(scalars[0], scalars[1], step, output_type="i64")
    columns = op.range(op.constant(np.array(0, dtype=np.int64)), scalars[1], step, output_type="i64")
    causal = op.less_equal(op.unsqueeze(columns, zero), op.unsqueeze(rows, one))  # [L, S]
    real = op.unsqueeze(op.convert(attention_mask, "boolean"), ints(1, 2))  # [B, 1, 1, S]
    return op.select(op.logical_and(causal, real), number(0.0), number(_MASKED))


def _real(input_ids: Any, position_ids: Any) -> Any:
    """FP32 [B, L, 1]: 1 for a token, 0 for padding in front of it, as positions say, which count tokens from 0.

    The attention mask would say so too; but paged attention has none, and the graph may not read it then.
    """
    op, one = opset(), ints(1)
    new = op.squeeze(op.gather(op.shape_of(input_ids, "i64"), one, ints(0)), ints(0))
    last = op.slice(position_ids, ints(-1), ints(END), one, one)  # [B, 1]
    places = op.range(op.subtract(integer(1), new), integer(1), integer(1), output_type="i64")  # 1 - L ... 0
    counted = op.add(last, op.unsqueeze(places, ints(0)))
    return op.unsqueeze(op.convert(op.greater_equal(counted, integer(0)), "f32"), ints(2))


def _repeated(x: Any, decoder: Decoder) -> Any:
    """Keys or values of every query head: [B, kv_heads, S, D] -> [B, heads, S, D]."""
    op, times = opset(), decoder.heads // decoder.kv_heads
    if times == 1:
        return x
    wide = op.broadcast(op.unsqueeze(x, ints(2)), ints(1, 1, times, 1, 1), broadcast_spec="BIDIRECTIONAL")
    return op.reshape(wide, ints(0, decoder.heads, -1, decoder.head_dim), True)


def _queries_keys_values(x: Any, index: int, build: Build) -> dict[str, Any]:
    """q [B, L, heads, head_dim], k and v [B, L, kv_heads, head_dim], and where the family has it a "gate" like q.

    Three projections, or the parts of one that holds them one after another.
    """
    op, decoder, fused = opset(), build.decoder, build.decoder.name(index, "qkv")
    counts = {"q": decoder.heads, "k": decoder.kv_heads, "v": decoder.kv_heads}
    if fused:
        sizes = ints(*(count * decoder.head_dim for count in counts.values()))
        divided = op.variadic_split(linear(x, fused, build.weights), ints(2), sizes)
        return {part: heads(divided.output(k), counts[part], decoder.head_dim) for k, part in enumerate("qkv")}
    found = {part: linear(x, decoder.name(index, part), build.weights) for part in "qkv"}
    if build.parts.gated:
        both = heads(found["q"], decoder.heads, 2 * decoder.head_dim)
        found["q"], found["gate"] = (_columns(both, k * decoder.head_dim, (k + 1) * decoder.head_dim) for k in (0, 1))
        counts.pop("q")
    return {**found, **{part: heads(found[part], count, decoder.head_dim) for part, count in counts.items()}}


def _remembered(new: Any, name: str, build: Build) -> Any:
    """Past and `new` [B, kv_heads, L, head_dim] along the tokens; the result is the next step's past."""
    past, keep = build.states.past(name, (build.decoder.kv_heads, -1, build.decoder.head_dim), build.step)
    whole = opset().concat([past, new], 2)
    keep(whole.output(0))
    return whole


def _attention(x: Any, index: int, build: Build) -> Any:
    """Self-attention of block `index` on normed hidden states [B, L, hidden]."""
    op, decoder = opset(), build.decoder
    found = _queries_keys_values(x, index, build)
    for part in "qkv":
        norm = build.weights.plain.get(f"{decoder.name(index, f'{part}_norm')}.weight")
        value = found[part] if norm is None else rms_norm(found[part], norm, decoder.eps)
        value = op.transpose(value, ints(0, 2, 1, 3))
        found[part] = value if part == "v" else _rotated(value, build.step, decoder)
    past = f"past_key_values.{index}."
    keys = _remembered(found["k"], f"{past}keypresent.{index}.key", build)
    values = _remembered(found["v"], f"{past}valuepresent.{index}.value", build)
    mixed = op.scaled_dot_product_attention(
        found["q"],
        _repeated(keys, decoder),
        _repeated(values, decoder),
        build.step.mask,
        number(1 / math.sqrt(decoder.head_dim)),
        causal=False,
    )
    mixed = op.transpose(mixed, ints(0, 2, 1, 3))
    if "gate" in found:
        mixed = op.multiply(mixed, op.sigmoid(found["gate"]))
    merged = op.reshape(mixed, ints(0, 0, decoder.heads * decoder.head_dim), True)
    return linear(merged, decoder.name(index, "o"), build.weights)


def _mlp(x: Any, index: int, build: Build) -> Any:
    decoder, experts = build.decoder, build.parts.experts
    if experts is not None and build.parts.sparse[index]:
        return sparse_mlp(x, f"{decoder.blocks}.{index}.mlp", experts, build.weights)
    gate, up, down = (decoder.name(index, role) for role in ("gate", "up", "down"))
    return swiglu(x, (gate, up, down), build.weights)


def _block(x: Any, index: int, build: Build) -> Any:
    op, decoder, plain = opset(), build.decoder, build.weights.plain
    mixer = linear_attention if build.parts.linear[index] else _attention
    normed = rms_norm(x, plain[f"{decoder.name(index, 'attention_norm')}.weight"], decoder.eps)
    x = op.add(x, mixer(normed, index, build))
    normed = rms_norm(x, plain[f"{decoder.name(index, 'mlp_norm')}.weight"], decoder.eps)
    return op.add(x, _mlp(normed, index, build))


def _inputs() -> dict[str, Any]:
    shapes = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
    found = {}
    for name, shape in shapes.items():
        found[name] = opset().parameter(shape, np.int32 if name == "beam_idx" else np.int64, name=name)
        found[name].output(0).set_names({name})
    return found


def build_model(decoder: Decoder, parts: Parts, weights: Weights) -> Any:
    """The whole decoder as an openvino.Model."""
    op, inputs = opset(), _inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embedding = weights.plain[f"{decoder.embedding}.weight"]
    step = Step(
        *_rotation(decoder, inputs["position_ids"]),
        mask=_mask(ids, mask),
        real=_real(ids, inputs["position_ids"]) if any(parts.linear) else None,
        batch=op.gather(op.shape_of(ids, "i64"), ints(0), ints(0)),
        beams=inputs["beam_idx"],
    )
    build = Build(decoder, parts, weights, step, States())
    x = op.gather(embedding, ids, ints(0))
    for index in range(decoder.layers):
        x = _block(x, index, build)
    x = rms_norm(x, weights.plain[f"{decoder.final_norm}.weight"], decoder.eps)
    head = Linear(embedding) if decoder.tied else weights.linears.get(decoder.head)
    named = weights if head is None else Weights({**weights.linears, decoder.head: head}, weights.plain)
    logits = op.result(linear(x, decoder.head, named))
    logits.output(0).set_names({"logits"})
    return openvino().Model([logits], build.states.sinks, list(inputs.values()), "qwen_quant")
