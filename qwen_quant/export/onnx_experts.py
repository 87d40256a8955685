"""Routed experts in an ONNX graph: the stacks that hold their codes, and the two ways of multiplying from them.

The experts of a block stand in stacks of E, with the rows of gate and up interleaved (gate 0, up 0, gate 1, ...):

    MLP.experts.gate_up.codes   uint8 [E, 2I, H * bits / 8]    .scales FP32 [E, 2I, G]    .zeros uint8 [E, 2I, packed G]
    MLP.experts.down.codes      uint8 [E, H, I * bits / 8]     .scales FP32 [E, H, G]     .zeros uint8 [E, H, packed G]

ONNX Runtime's QMoE reads just these, and at 4 bits its products are those of MatMulNBits in FP32.  At 8 bits it rounds
activations to 8 bits, and on how the zeros of rows with a single group are packed its own paths do not agree: there
the graph has a Loop over the experts that any token of the batch was sent to, which picks one expert's codes and its
tokens at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_quant.export.graph_parts import Experts
from qwen_quant.export.onnx_graph import DOMAIN, Graph, onnx

if TYPE_CHECKING:
    from qwen_quant.export.source import SourceFacts

GATE_UP, DOWN = "gate_up", "down"


def stack_name(mlp: str, part: str, kind: str) -> str:
    """Name of a stack; `part`: GATE_UP or DOWN, `kind`: codes, scales or zeros."""
    return f"{mlp}.experts.{part}.{kind}"


def takes_qmoe(facts: SourceFacts, experts: Experts, hidden: int) -> bool:
    """Whether QMoE computes these experts exactly; see the module's docstring."""
    single = min(experts.width, hidden) <= facts.group_size
    return facts.bits == 4 and (facts.sym or not single)


def qmoe_attributes(facts: SourceFacts, experts: Experts) -> dict[str, Any]:
    """Attributes of a QMoE node."""
    return {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "expert_weight_bits": facts.bits,
        "block_size": facts.group_size,
        "k": experts.top_k,
        "normalize_routing_weights": int(experts.normalized),
        "use_sparse_mixer": 0,
    }


def sparse_mlp(graph: Graph, x: str, mlp: str) -> str:
    """Routed experts of [B, L, H], and the shared one if there is one."""
    experts = graph.parts.experts
    assert experts is not None
    flat = graph.add("Reshape", [graph.project(x, f"{mlp}.gate"), graph.ints(-1, experts.count)], f"{mlp}.logits")
    chances = graph.add("Softmax", [flat], f"{mlp}.chances", axis=-1)
    if takes_qmoe(graph.facts, experts, graph.decoder.hidden):
        routed = _qmoe(graph, [x, flat, chances], mlp, experts)
    else:
        routed = _loop(graph, x, chances, mlp, experts)
    if not experts.shared:
        return routed
    shared = f"{mlp}.shared_expert"
    output = graph.mlp(x, *(f"{shared}.{part}_proj" for part in ("gate", "up", "down")))
    gate = graph.add("Sigmoid", [graph.project(x, f"{shared}_gate")], f"{shared}_gate.sigmoid")
    return graph.add("Add", [routed, graph.add("Mul", [output, gate], f"{shared}.gated")], f"{mlp}.output")


def _qmoe(graph: Graph, values: list[str], mlp: str, experts: Experts) -> str:
    x, logits, chances = values
    first, second = ([stack_name(mlp, part, kind) for kind in ("codes", "scales")] for part in (GATE_UP, DOWN))
    zeros = ["", ""] if graph.facts.sym else [stack_name(mlp, part, "zeros") for part in (GATE_UP, DOWN)]
    inputs = [x, logits, *first, "", *second, "", "", "", "", *zeros, "", chances]
    return graph.add("QMoE", inputs, f"{mlp}.experts", domain=DOMAIN, **qmoe_attributes(graph.facts, experts))


def _loop(graph: Graph, x: str, chances: str, mlp: str, experts: Experts) -> str:
    """One turn for each expert that a token was sent to."""
    helper, kinds, hidden = onnx().helper, onnx().TensorProto, graph.decoder.hidden
    weights, chosen, name = f"{mlp}.weights", f"{mlp}.chosen", f"{mlp}.experts"
    graph.many("TopK", [chances, graph.ints(experts.top_k)], [f"{mlp}.top", chosen], axis=-1)
    if experts.normalized:
        total = graph.add("ReduceSum", [f"{mlp}.top", graph.ints(-1)], f"{mlp}.top.sum", keepdims=1)
        graph.add("Div", [f"{mlp}.top", total], weights)
    else:
        graph.add("Identity", [f"{mlp}.top"], weights)
    rows = graph.add("Reshape", [x, graph.ints(-1, hidden)], f"{mlp}.rows")
    called = graph.add("Unique", [chosen], f"{mlp}.called", sorted=1)
    turns = graph.add("Size", [called], f"{mlp}.turns")
    start = graph.add("Sub", [rows, rows], f"{mlp}.start")
    body = replace(graph, nodes=[])
    _turn(body, mlp, experts)
    value = helper.make_tensor_value_info
    inputs = [value(f"{name}.turn", kinds.INT64, []), value(f"{name}.go", kinds.BOOL, [])]
    inputs.append(value(f"{name}.before", kinds.FLOAT, [None, hidden]))
    outputs = [value(f"{name}.on", kinds.BOOL, []), value(f"{name}.after", kinds.FLOAT, [None, hidden])]
    made = helper.make_graph(body.nodes, f"{name}.body", inputs, outputs)
    graph.many("Loop", [turns, "", start], [f"{name}.sum"], body=made)
    return graph.add("Reshape", [f"{name}.sum", graph.add("Shape", [x], f"{mlp}.shape")], name)


def _turn(body: Graph, mlp: str, experts: Experts) -> None:
    """What one turn adds: the outputs of one expert for its tokens, times their weights."""
    name, hidden, width = f"{mlp}.experts", body.decoder.hidden, experts.width
    body.add("Identity", [f"{name}.go"], f"{name}.on")
    expert = body.add("Gather", [f"{mlp}.called", f"{name}.turn"], f"{name}.number")
    sent = body.add("NonZero", [body.add("Equal", [f"{mlp}.chosen", expert], f"{name}.mine")], f"{name}.sent")
    places = body.add("Transpose", [sent], f"{name}.places", perm=[1, 0])  # [n, 2]: token, and which of its choices
    weights = body.add("GatherND", [f"{mlp}.weights", places], f"{name}.weights")
    tokens = body.add("Gather", [places, body.ints(0)], f"{name}.tokens", axis=1)  # [n, 1]
    x = body.add("GatherND", [f"{mlp}.rows", tokens], f"{name}.input")
    both = _product(body, x, mlp, GATE_UP, expert, (2 * width, hidden))
    pairs = body.add("Reshape", [both, body.ints(-1, width, 2)], f"{name}.pairs")
    body.many("Split", [pairs, body.ints(1, 1)], [f"{name}.gate", f"{name}.up"], axis=-1)
    inner = body.add("Mul", [body.silu(f"{name}.gate", f"{name}.gate"), f"{name}.up"], f"{name}.inner")
    inner = body.add("Reshape", [inner, body.ints(-1, width)], f"{name}.down.input")
    output = _product(body, inner, mlp, DOWN, expert, (hidden, width))
    scaled = body.add("Mul", [output, body.add("Unsqueeze", [weights, body.ints(1)], f"{name}.column")], f"{name}.part")
    body.add("ScatterND", [f"{name}.before", tokens, scaled], f"{name}.after", reduction="add")


def _product(body: Graph, x: str, mlp: str, part: str, expert: str, shape: tuple[int, int]) -> str:
    """x times one expert's weights of `shape` (out, in), which are picked from their stacks."""
    (out, width), facts = shape, body.facts
    groups = width // facts.group_size
    shapes = {"codes": (out, groups, facts.group_size * facts.bits // 8), "scales": (out, groups)}
    shapes |= {} if facts.sym else {"zeros": (out, -(-groups * facts.bits // 8))}
    weights = []
    for kind, sizes in shapes.items():
        stack = stack_name(mlp, part, kind)
        picked = body.add("Gather", [stack, expert], f"{stack}.picked")
        weights.append(body.add("Reshape", [picked, body.ints(*sizes)], f"{stack}.own"))
    return body.packed_product(x, weights, f"{mlp}.experts.{part}", shape)
