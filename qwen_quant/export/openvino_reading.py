"""An OpenVINO model as a source of values: what the MatMul nodes of a saved graph multiply with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export.decoder import unpacked_zeros
from qwen_quant.export.formats import Piece
from qwen_quant.export.openvino_ops import openvino
from qwen_quant.export.openvino_spool import STACKS, TYPES
from qwen_quant.export.pivot import LinearGrid, PackedRows, consecutive_groups
from qwen_quant.export.stacks import place_of

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

_CHAIN = ("Reshape", "Multiply", "Subtract", "Convert", "Constant")  # from a stack of experts to its codes


def pieces(model: Any, source: ExportSource, kept: list[str]) -> Iterator[Piece]:
    """Every linear and the kept tensors named. Errors: AuditError for one that the graph has no node for."""
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    places = {name: place_of(source.spec, name, STACKS) for name in source.linears}
    for name in (*(place.module for place in places.values()), *kept):
        if name not in nodes:
            raise AuditError(f"the graph has no node '{name}'")
    for name, place in places.items():
        node = nodes[place.module]
        if place.stack:
            yield Piece(name, _expert(node, source, name))
            continue
        before = node.input_value(0).get_node()
        order = before.input_value(1).get_node() if name in source.facts.act_order else None
        yield Piece(name, _weight(node, order))
    for name in kept:
        yield Piece(name, _plain(nodes[name]))


def _raw(constant: Any) -> np.ndarray[Any, Any]:
    """The bytes of a constant."""
    return np.asarray(constant.data).reshape(-1).view(np.uint8)


def _plain(constant: Any) -> Tensor:
    """A plain constant, bit for bit."""
    dtype = {kind: dtype for dtype, kind in TYPES.items()}[constant.get_element_type().to_string()]
    return torch.from_numpy(_raw(constant).copy()).view(dtype).view(tuple(constant.get_output_shape(0)))


def _weight(node: Any, order: Any | None) -> Tensor:
    """FP32 [out, in] of a linear's MatMul, computed by openvino itself from the constants in front of it."""
    part = openvino().Model([node.input_value(1)], [], node.get_friendly_name())
    compiled = openvino().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = torch.from_numpy(np.array(compiled([])[0]))
    if order is None:
        return values
    result = torch.empty_like(values)
    result[:, torch.from_numpy(np.array(order.data).astype(np.int64).reshape(-1))] = values
    return result


def _expert(node: Any, source: ExportSource, name: str) -> PackedRows:
    """One expert's part of the constants in front of the MatMul of its stack; a stack may be too large to compute."""
    place, bits, sym = place_of(source.spec, name, STACKS), source.facts.bits, source.facts.sym
    (out, width), groups = source.shape(name), source.groups(name)
    constants = _constants(node, name)

    def share(part: str) -> Tensor:
        raw = _raw(constants[part])
        size = len(raw) // place.stack
        return torch.from_numpy(raw[place.index * size : (place.index + 1) * size].copy())

    if sym:
        zeros = torch.full((out, groups), int(constants["zeros"].data), dtype=torch.uint8)
    else:
        zeros = unpacked_zeros(share("zeros").view(1, -1), out * groups, bits).view(out, groups)
    dtype = {kind: dtype for dtype, kind in TYPES.items()}[constants["scales"].get_element_type().to_string()]
    scales = share("scales").view(dtype).view(out, groups)
    return PackedRows(share("codes").view(out, -1), bits, LinearGrid(scales, zeros, consecutive_groups(width, groups)))


def _constants(node: Any, name: str) -> dict[str, Any]:
    """codes, zeros and scales of a stack. Errors: AuditError where other operations stand between them and the MatMul.

    (code - zero) * scale is then the weight, whichever expert's.
    """
    found, at = {}, node.input_value(1).get_node()
    for kind in _CHAIN:
        if at.get_type_name() != kind:
            raise AuditError(f"the weight of '{name}' comes from a {at.get_type_name()}", f"not from a {kind}")
        if kind in ("Multiply", "Subtract"):
            other = at.input_value(1).get_node()
            converts = other.get_type_name() == "Convert"
            found["scales" if kind == "Multiply" else "zeros"] = other.input_value(0).get_node() if converts else other
        if kind == "Constant":
            return {**found, "codes": at}
        at = at.input_value(0).get_node()
    raise AssertionError("unreachable")
