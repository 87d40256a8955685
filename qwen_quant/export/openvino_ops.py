"""Small pieces of the OpenVINO graphs: constants, norms, linears, and the variables that live between two calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.formats import require
from qwen_quant.export.graph_parts import Parts

END = 2**63 - 1  # of a slice that goes to the last


def openvino() -> Any:
    """The openvino library (InputError where it is not installed)."""
    return require("openvino", "openvino", "openvino")


def opset() -> Any:
    """openvino's Python opset (InputError where it is not installed)."""
    require("openvino", "openvino", "openvino")
    return require("openvino.opset13", "openvino", "openvino")


@dataclass(frozen=True)
class Linear:
    """A linear in the graph: `weight` FP32 [out, in], `order` int64 [in] (columns of the weight, None: as they are).

    The experts of a block that have the same role are one: [count, out, in].
    """

    weight: Any
    order: Any | None = None


@dataclass(frozen=True)
class Weights:
    """Nodes of all weights by their names on disk, FP32.

    `linears` are the quantized ones and stacks of experts; `plain` is all else as the model uses it: embedding, norms
    (with their 1 added where the family does), biases, matrices kept as stored.
    """

    linears: Mapping[str, Linear]
    plain: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What all blocks share.

    Attributes:
        cosine, sine: FP32 [B, 1, L, rotated columns].
        mask: FP32 [B, 1, L, S], added to the scores; real: FP32 [B, L, 1], 0 for a new token that is padding.
        batch: int64 [1]; beams: int32 [B].
    """

    cosine: Any
    sine: Any
    mask: Any
    real: Any
    batch: Any
    beams: Any


def ints(*values: int) -> Any:
    """int64 [len(values)]."""
    return opset().constant(np.array(values, dtype=np.int64))


def integer(value: int) -> Any:
    """int64, a scalar."""
    return opset().constant(np.array(value, dtype=np.int64))


def number(value: float) -> Any:
    """FP32, a scalar."""
    return opset().constant(np.array(value, dtype=np.float32))


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    op = opset()
    mean = op.reduce_mean(op.power(x, number(2.0)), ints(-1), keep_dims=True)
    root = op.sqrt(op.add(mean, number(eps)))
    return op.multiply(op.multiply(x, op.divide(number(1.0), root)), weight)


def linear(x: Any, name: str, weights: Weights) -> Any:
    """x [B, L, in] -> [B, L, out], with the bias if there is one."""
    op = opset()
    found = weights.linears.get(name) or Linear(weights.plain[f"{name}.weight"])
    if found.order is not None:
        x = op.gather(x, found.order, ints(2))
    product = op.matmul(x, found.weight, False, True)
    product.set_friendly_name(name)
    bias = weights.plain.get(f"{name}.bias")
    return product if bias is None else op.add(product, bias)


def silu(x: Any) -> Any:
    """x * sigmoid(x), without the constant 1 that the opset's own function adds: fusions of experts look for it so."""
    factory = require("openvino.utils.node_factory", "openvino", "openvino").NodeFactory("opset4")
    return factory.create("Swish", [x.output(0)], {})


def heads(x: Any, count: int, width: int) -> Any:
    """[B, L, count * width] -> [B, L, count, width]."""
    return opset().reshape(x, ints(0, 0, count, width), True)


def gated_mlp(x: Any, name: str, weights: Weights) -> Any:
    """down(silu(gate(x)) * up(x)) of the module `name`."""
    return swiglu(x, (f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj"), weights)


def swiglu(x: Any, names: tuple[str, str, str], weights: Weights) -> Any:
    """down(silu(gate(x)) * up(x)); `names` are those of gate, up and down."""
    op, (gate, up, down) = opset(), names
    return linear(op.multiply(silu(linear(x, gate, weights)), linear(x, up, weights)), down, weights)


class States:
    """Variables that keep their values from call to call, collected while the graph is built."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []

    def past(self, name: str, shape: tuple[int, ...], step: Step) -> tuple[Any, Callable[[Any], None]]:
        """(FP32 [B, *shape] as the last call left it, what leaves an output for the next); rows stand as `beams` says.

        A width of -1 grows and is 0 at first; all else is zeros at first.
        """
        op, util = opset(), require("openvino.op.util", "openvino", "openvino")
        info = util.VariableInfo()
        info.data_shape = openvino().PartialShape([-1, *shape])
        info.data_type = openvino().Type.f32
        info.variable_id = name
        variable = util.Variable(info)
        empty = op.concat([step.batch, ints(*(max(width, 0) for width in shape))], 0)
        past = op.read_value(op.broadcast(number(0.0), empty), variable)

        def keep(value: Any) -> None:
            sink = op.assign(past, variable)  # it takes nodes only, and one output of a Loop is none
            sink.input(0).replace_source_output(value)
            self.sinks.append(sink)

        return op.gather(past, step.beams, ints(0)), keep


@dataclass(frozen=True)
class Build:
    """A graph under construction: what is built, its weights, what its blocks share, and the variables so far."""

    decoder: Decoder
    parts: Parts
    weights: Weights
    step: Step
    states: States
