"""Routed experts in formats that keep those of a block in stacks: one tensor for all that have the same role."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_quant.checkpoint.families import ModelSpec

# A linear of a routed expert, by its name on disk without ".weight".
EXPERT = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.(?P<index>\d+)\.(?P<linear>(?P<role>gate|up|down)_proj)")


@dataclass(frozen=True)
class Place:
    """Where a linear goes: the module's name in the file, and its index in a stack of `stack` experts (0: no stack)."""

    module: str
    index: int
    stack: int


def place_of(spec: ModelSpec, name: str, stacks: str) -> Place:
    """Place of linear `name` where a format calls the stacks of a block, beside its router, `stacks`."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return Place(name, 0, 0)
    return Place(f"{found['mlp']}.{stacks}.{found['linear']}", int(found["index"]), spec.expert_count)
