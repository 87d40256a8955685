"""Routed experts in an OpenVINO graph, in the form that its plugins replace by products with the chosen experts only.

As written, every expert reads every token and the sum over experts weights those that a token did not choose by 0:

    x [T, hidden] -> Tile, [E, T, hidden] -> MatMul with gate and up [E, width, hidden] -> Swish, Multiply
      -> MatMul with down [E, hidden, width] -> Multiply by the routing weights [E, T, 1] -> ReduceSum over E

with the routing weights scattered into zeros [T, E].  OpenVINO (since 2026.0; the pass is called
ConvertTiledMoeBlockToGatherMatmuls now) knows this block by its operations and puts GatherMatmul nodes in the place of
the three MatMuls, which read the codes of the experts that TopK chose and of no others.
"""

from __future__ import annotations

from typing import Any

from qwen_quant.export.graph_parts import Experts
from qwen_quant.export.openvino_ops import Weights, gated_mlp, integer, ints, linear, number, opset, silu


def sparse_mlp(x: Any, name: str, experts: Experts, weights: Weights) -> Any:
    """x [B, L, hidden] -> [B, L, hidden] through the module `name`: routed experts, and a shared one where there is."""
    op = opset()
    routed = _routed(x, name, experts, weights)
    if not experts.shared:
        return routed
    share = op.sigmoid(linear(x, f"{name}.shared_expert_gate", weights))
    return op.add(routed, op.multiply(share, gated_mlp(x, f"{name}.shared_expert", weights)))


def _routed(x: Any, name: str, experts: Experts, weights: Weights) -> Any:
    op, hidden = opset(), x.get_output_partial_shape(0)[2].get_length()
    lengths = op.gather(op.shape_of(x, "i64"), ints(0, 1), ints(0))  # B, L
    tokens = op.reshape(x, ints(-1, hidden), False)
    tiled = op.reshape(op.tile(tokens, ints(experts.count, 1)), ints(experts.count, -1, hidden), False)
    gate = silu(_product(tiled, f"{name}.experts.gate_proj", weights))
    inner = op.multiply(gate, _product(tiled, f"{name}.experts.up_proj", weights))
    each = _product(inner, f"{name}.experts.down_proj", weights)
    each = op.reshape(each, op.concat([ints(experts.count), lengths, ints(hidden)], 0), False)  # [E, B, L, hidden]
    routing = op.transpose(_routing(tokens, name, experts, weights), ints(1, 0))
    routing = op.reshape(routing, op.concat([ints(experts.count), lengths], 0), False)
    return op.reduce_sum(op.multiply(each, op.unsqueeze(routing, ints(-1))), ints(0), keep_dims=False)


def _product(x: Any, name: str, weights: Weights) -> Any:
    """x [E, T, in] -> [E, T, out]: each expert's rows with its weight."""
    product = opset().matmul(x, weights.linears[name].weight, False, True)
    product.set_friendly_name(name)
    return product


def _routing(tokens: Any, name: str, experts: Experts, weights: Weights) -> Any:
    """FP32 [T, E]: the softmax of the router's logits where it is among the largest, divided by their sum or not."""
    op = opset()
    chances = op.softmax(op.matmul(tokens, weights.plain[f"{name}.gate.weight"], False, True), 1)
    chosen = op.topk(chances, integer(experts.top_k), 1, "max", "value", "i64")
    values = chosen.output(0)
    if experts.normalized:
        values = op.divide(values, op.reduce_sum(values, ints(1), keep_dims=True))
    zeros = op.broadcast(number(0.0), op.shape_of(chances, "i64"))
    return op.scatter_elements_update(zeros, chosen.output(1), values, ints(1), "none")
