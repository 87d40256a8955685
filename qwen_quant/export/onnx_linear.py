"""Linear attention (gated delta rule) in an ONNX graph, with the operator LinearAttention of ONNX Runtime.

Past and present of a block with C channels, n value heads and K taps:

    past.N.conv        FP32 [B, C, K - 1]                   inputs of the convolution of the last K - 1 tokens
    past.N.recurrent   FP32 [B, n, key_dim, value_dim]

The convolution is a sum of K shifted products, and what it keeps is gathered at each sequence's own last tokens: so
padding on the right changes no state (its decay is exp(0) and its rate 0).
"""

from __future__ import annotations

import math

from qwen_quant.export.graph_parts import L2_EPS, LinearMixer
from qwen_quant.export.onnx_graph import DOMAIN, Graph, onnx

VALID, KEPT = "tokens.valid", "tokens.kept"
_END = 2**31 - 1


def tokens(graph: Graph, mixer: LinearMixer) -> None:
    """VALID FP32 [B, L, 1]: 1 for new tokens; KEPT int64 [B, K - 1, 1]: where in [past, new] the last ones stand."""
    size = graph.add("Gather", [graph.add("Shape", ["input_ids"], "tokens.shape"), graph.ints(1)], "tokens.new")
    start = graph.add("Sub", ["mask.size", size], "tokens.start")
    new = graph.add("Slice", ["attention_mask", start, "mask.size", graph.ints(1)], "tokens.mask")
    column = graph.add("Unsqueeze", [new, graph.ints(2)], "tokens.column")
    graph.add("Cast", [column], VALID, to=onnx().TensorProto.FLOAT)
    count = graph.add("ReduceSum", [new, graph.ints(1)], "tokens.count", keepdims=1)
    places = graph.add("Add", [count, graph.ints(*range(mixer.kernel - 1))], "tokens.places")
    graph.add("Unsqueeze", [places, graph.ints(2)], KEPT)


def linear_attention(graph: Graph, x: str, index: int) -> str:
    """The mixer of block `index` on normed [B, L, H]."""
    mixer, name = graph.parts.mixer, f"{graph.decoder.blocks}.{index}.linear_attn"
    assert mixer is not None
    mixed, z, b, a = (_fused if mixer.fused else _apart)(graph, x, name, mixer)
    mixed = graph.silu(_convolution(graph, mixed, index, mixer), f"{name}.conv1d")
    query, key, value = (f"{name}.{part}" for part in ("query", "key", "value"))
    graph.many("Split", [mixed, graph.ints(mixer.keys, mixer.keys, mixer.values)], [query, key, value], axis=-1)
    query, key = (_unit(graph, part, mixer) for part in (query, key))
    rate = graph.add("Mul", [graph.add("Sigmoid", [b], f"{name}.beta"), VALID], f"{name}.rate")
    output = f"{name}.read"
    graph.many(
        "LinearAttention",
        [query, key, value, f"past.{index}.recurrent", _decay(graph, a, name), rate],
        [output, f"present.{index}.recurrent"],
        domain=DOMAIN,
        q_num_heads=mixer.key_heads,
        kv_num_heads=mixer.value_heads,
        update_rule="gated_delta",
        scale=1 / math.sqrt(mixer.key_dim),
    )
    shape = (mixer.value_heads, mixer.value_dim)
    read = graph.heads(output, f"{output}.heads", *shape)
    normed = graph.rms_norm(read, graph.plain(f"{name}.norm.weight"), f"{name}.norm.normed", graph.decoder.eps)
    gate = graph.silu(graph.heads(z, f"{name}.gate", *shape), f"{name}.gate")
    gated = graph.heads(graph.add("Mul", [normed, gate], f"{name}.gated"), f"{name}.flat", mixer.values)
    return graph.project(gated, f"{name}.out_proj")


def _apart(graph: Graph, x: str, name: str, mixer: LinearMixer) -> tuple[str, str, str, str]:
    mixed, z, b, a = (graph.project(x, f"{name}.in_proj_{part}") for part in ("qkv", "z", "b", "a"))
    return mixed, z, b, a


def _fused(graph: Graph, x: str, name: str, mixer: LinearMixer) -> tuple[str, str, str, str]:
    """q, k, v and z of one key head after another, and b and a likewise."""
    heads, ratio = mixer.key_heads, mixer.value_heads // mixer.key_heads
    values = ratio * mixer.value_dim
    sizes = [mixer.key_dim, mixer.key_dim, values, values]
    parts = _head_parts(graph, graph.project(x, f"{name}.in_proj_qkvz"), heads, sizes)
    small = _head_parts(graph, graph.project(x, f"{name}.in_proj_ba"), heads, [ratio, ratio])
    return graph.add("Concat", parts[:3], f"{name}.mixed", axis=-1), parts[3], small[0], small[1]


def _head_parts(graph: Graph, x: str, heads: int, sizes: list[int]) -> list[str]:
    """[B, L, heads * sum(sizes)] -> one [B, L, heads * size] for each size."""
    apart = graph.heads(x, f"{x}.heads", heads, sum(sizes))
    pieces = [f"{x}.piece.{k}" for k in range(len(sizes))]
    graph.many("Split", [apart, graph.ints(*sizes)], pieces, axis=-1)
    return [graph.heads(piece, f"{piece}.flat", heads * size) for piece, size in zip(pieces, sizes, strict=True)]


def _convolution(graph: Graph, x: str, index: int, mixer: LinearMixer) -> str:
    """Causal depthwise convolution of [B, L, C]; writes present.N.conv."""
    name, taps = f"{graph.decoder.blocks}.{index}.linear_attn.conv1d", mixer.kernel
    past = graph.add("Transpose", [f"past.{index}.conv"], f"{name}.past", perm=[0, 2, 1])
    window = graph.add("Concat", [past, x], f"{name}.window", axis=1)  # [B, K - 1 + L, C]
    weight = graph.add("Transpose", [graph.plain(f"{name}.weight")], f"{name}.taps", perm=[2, 1, 0])  # [K, 1, C]
    total = ""
    for tap in range(taps):
        end = graph.ints(tap - taps + 1 if tap < taps - 1 else _END)
        shifted = graph.add("Slice", [window, graph.ints(tap), end, graph.ints(1)], f"{name}.shifted.{tap}")
        product = graph.add(
            "Mul",
            [shifted, graph.add("Gather", [weight, graph.ints(tap)], f"{name}.tap.{tap}")],
            f"{name}.product.{tap}",
        )
        total = product if not total else graph.add("Add", [total, product], f"{name}.sum.{tap}")
    kept = graph.add("GatherND", [window, KEPT], f"{name}.kept", batch_dims=1)  # [B, K - 1, C]
    graph.add("Transpose", [kept], f"present.{index}.conv", perm=[0, 2, 1])
    return total


def _unit(graph: Graph, x: str, mixer: LinearMixer) -> str:
    """x / sqrt(sum(x^2) + eps) head by head: RMSNorm with the factor 1 / sqrt(width)."""
    width = mixer.key_dim
    apart = graph.heads(x, f"{x}.heads", mixer.key_heads, width)
    unit = graph.rms_norm(apart, graph.floats(1 / math.sqrt(width), width), f"{x}.unit", L2_EPS / width)
    return graph.heads(unit, f"{x}.flat", mixer.keys)


def _decay(graph: Graph, a: str, name: str) -> str:
    """-exp(A_log) * softplus(a + dt_bias), and 0 for padding."""
    speed = graph.add("Neg", [graph.add("Exp", [graph.plain(f"{name}.A_log")], f"{name}.speed")], f"{name}.slope")
    step = graph.add(
        "Softplus", [graph.add("Add", [a, graph.plain(f"{name}.dt_bias")], f"{name}.step")], f"{name}.soft"
    )
    return graph.add("Mul", [graph.add("Mul", [step, speed], f"{name}.log_decay"), VALID], f"{name}.decay")
