"""An ONNX graph under construction: nodes, small constants, and the linears and norms that every decoder has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_quant.export.decoder import Decoder
from qwen_quant.export.formats import require
from qwen_quant.export.graph_parts import Parts

if TYPE_CHECKING:
    from qwen_quant.export.source import SourceFacts

DOMAIN = "com.microsoft"


def onnx() -> Any:
    """The onnx library (InputError where it is not installed)."""
    return require("onnx", "onnx", "onnx")


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        decoder, parts: what is built.
        facts: bits, group size and symmetry of every quantized linear.
        shapes: quantized linear -> (out, in).
        kept: names of the kept tensors.
        nodes: in order. constants: small initializers by name. made: FP32 values that exist already.
    """

    decoder: Decoder
    parts: Parts
    facts: SourceFacts
    shapes: Mapping[str, tuple[int, int]]
    kept: Collection[str]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def add(self, kind: str, inputs: list[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, which is called as the node is; returns that name."""
        self.many(kind, inputs, [name], domain=domain, **attributes)
        return name

    def many(self, kind: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any) -> None:
        """Append a node that is called as its first output."""
        make = onnx().helper.make_node
        self.nodes.append(make(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def ints(self, *values: int) -> str:
        """Name of a small int64 constant [len(values)]."""
        library, name = onnx(), "const.int64." + "_".join(map(str, values))
        if name not in self.constants:
            kind = library.TensorProto.INT64
            self.constants[name] = library.helper.make_tensor(name, kind, [len(values)], list(values))
        return name

    def floats(self, value: float, count: int) -> str:
        """Name of an FP32 constant [count] that is `value` everywhere."""
        library, name = onnx(), f"const.float.{count}.{value!r}"
        if name not in self.constants:
            kind = library.TensorProto.FLOAT
            self.constants[name] = library.helper.make_tensor(name, kind, [count], [value] * count)
        return name

    def plain(self, name: str) -> str:
        """The FP32 value of a kept tensor."""
        value = f"{name}.f32"
        if value not in self.made:
            self.add("Cast", [name], value, to=onnx().TensorProto.FLOAT)
            self.made.add(value)
        return value

    def has(self, name: str) -> bool:
        """Whether a kept tensor of this name exists."""
        return name in self.kept

    def rms_norm(self, x: str, factor: str, name: str, eps: float) -> str:
        """factor * x / sqrt(mean(x^2) + eps) over the last axis."""
        return self.add("SimplifiedLayerNormalization", [x, factor], name, axis=-1, epsilon=eps, stash_type=1)

    def norm(self, x: str, weight: str, name: str) -> str:
        """The model's RMSNorm, with the factor 1 + weight in the families that have it."""
        factor = self.plain(weight)
        if self.parts.one_plus:
            factor = self.add("Add", [factor, self.floats(1.0, 1)], f"{weight}.factor")
        return self.rms_norm(x, factor, name, self.decoder.eps)

    def linear(self, x: str, name: str) -> str:
        """A linear without its bias: MatMulNBits where it is quantized."""
        if name not in self.shapes:
            turned = self.add("Transpose", [self.plain(f"{name}.weight")], f"{name}.turned", perm=[1, 0])
            return self.add("MatMul", [x, turned], name)
        weights = [f"{name}.codes", f"{name}.scales", *([] if self.facts.sym else [f"{name}.zeros"])]
        return self.packed_product(x, weights, name, self.shapes[name])

    def packed_product(self, x: str, weights: list[str], name: str, shape: tuple[int, int]) -> str:
        """x times the transpose of packed `weights` (codes, scales and perhaps zeros) of `shape` (out, in), in FP32."""
        out, width = shape
        sizes = {"K": width, "N": out, "bits": self.facts.bits, "block_size": self.facts.group_size}
        return self.add("MatMulNBits", [x, *weights], name, domain=DOMAIN, accuracy_level=1, **sizes)

    def project(self, x: str, name: str) -> str:
        """A linear with its bias."""
        product, bias = self.linear(x, name), f"{name}.bias"
        return self.add("Add", [product, self.plain(bias)], f"{name}.biased") if self.has(bias) else product

    def silu(self, x: str, name: str) -> str:
        """x * sigmoid(x)."""
        return self.add("Mul", [x, self.add("Sigmoid", [x], f"{name}.sigmoid")], f"{name}.silu")

    def mlp(self, x: str, gate: str, up: str, down: str) -> str:
        """down(silu(gate(x)) * up(x)), the three named."""
        gated, upper = self.silu(self.project(x, gate), gate), self.project(x, up)
        return self.project(self.add("Mul", [gated, upper], f"{down}.input"), down)

    def heads(self, x: str, name: str, *shape: int) -> str:
        """x [B, L, ...] -> [B, L, *shape]."""
        return self.add("Reshape", [x, self.ints(0, 0, *shape)], name)
