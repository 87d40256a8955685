"""Which tensors a GGUF file has, under llama.cpp's names, and what each takes of the source.

gguf-py names the tensors (its own tables of what llama.cpp calls them).  Vectors and routers are FP32, which is what
llama.cpp computes them in; matrices that are not quantized stay as stored (FP16 would lose small BF16 values).
Linear attention is stored as hybrid.py says: rows and blocks of columns in another order, some vectors changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.export import hybrid
from qwen_quant.export.folder import items
from qwen_quant.export.formats import ExportOptions, require
from qwen_quant.export.gguf_blocks import BLOCK, BlockType, narrowest
from qwen_quant.export.gguf_metadata import ARCHITECTURES
from qwen_quant.export.stacks import EXPERT

if TYPE_CHECKING:
    from qwen_quant.checkpoint.families import ModelSpec
    from qwen_quant.export.source import ExportSource

RESTS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
ALIGNMENT = 32
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FULL_PRECISION = (".mlp.gate.weight", ".shared_expert_gate.weight")  # routers
_PLAIN_TYPES = {dtype: kind for kind, dtype in PLAIN.items()}


@dataclass(frozen=True)
class Move:
    """How the values of a tensor of the source stand in the file.

    Attributes:
        rows, columns: int64, which row or column of the source comes next in the file; None: all, in their order.
        value: what is stored instead of a value, in FP32; None: the value.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    value: Callable[[Tensor], Tensor] | None = None

    @property
    def changes(self) -> bool:
        """Whether anything differs from the source."""
        return self.rows is not None or self.columns is not None or self.value is not None

    def apply(self, values: Tensor) -> Tensor:
        """Values of the source, whole, as the file has them."""
        values = values if self.value is None else self.value(values)
        values = values if self.rows is None else values[self.rows]
        return values if self.columns is None else values[:, self.columns]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file. sources: names of the source that it holds, in order: several for a stack of experts.
        kind: GGUF type. shape: as torch has it. nbytes: of its data. move: of each source.
    """

    name: str
    sources: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    move: Move

    @property
    def space(self) -> int:
        """Bytes up to the next entry."""
        return padded(self.nbytes)


def padded(size: int) -> int:
    """The next multiple of the file's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_type(source: ExportSource) -> BlockType:
    """The type of the quantized linears (there is one: the format's check has seen to it)."""
    found = narrowest(source.facts.bits, sym=source.facts.sym)
    assert found is not None
    return found


def is_left_out(spec: ModelSpec, name: str) -> bool:
    """Kept tensors that llama.cpp's text models have no place for."""
    return spec.is_passenger(name) or hybrid.is_vision(spec, name)


def kept_kind(source: ExportSource, name: str, rest: str | None) -> str:
    """GGUF type of kept tensor `name`."""
    info = source.reader.info(name)
    if len(info.shape) < 2 or name.endswith(_FULL_PRECISION) or min(info.shape) == 1:
        return "F32"
    if rest == "q8_0" and info.shape[-1] % BLOCK:
        return "BF16"
    return RESTS[rest] if rest is not None else _PLAIN_TYPES[info.dtype]


def kept_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a kept tensor in `kind`."""
    count = math.prod(shape)
    return count // BLOCK * 34 if kind == "Q8_0" else count * PLAIN[kind].itemsize


def _name_map(source: ExportSource) -> Any:
    gguf: Any = require("gguf", "gguf", "gguf")
    wanted = ARCHITECTURES[source.spec.config["model_type"]]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    return gguf.get_tensor_name_map(architecture, source.spec.num_layers)


def entries_of(source: ExportSource, options: ExportOptions) -> list[Entry]:
    """Every tensor of the file, in order. Errors: InputError for one that gguf-py has no name for."""
    names, linears, found = _name_map(source), set(source.linears), []
    for name in items(source):
        expert = EXPERT.fullmatch(name)
        if is_left_out(source.spec, name) or (expert is not None and int(expert["index"])):
            continue
        if expert is not None:
            base, suffix = f"{expert['mlp']}.experts.{expert['linear']}", ".weight"
        else:
            base, suffix = (name, ".weight") if name in linears else _parts(name)
        for module, move in placements(source.spec, base):
            short = names.get_name(module)
            if short is None:
                raise InputError(f"gguf-py has no name for '{name}'", "this architecture lacks it", "use --format gptq")
            if name in linears:
                found.append(_linear_entry(source, short + suffix, _stack(source, name, expert), move))
            else:
                found.append(_kept_entry(source, short + suffix, name, move, options.rest))
    return found


def _parts(name: str) -> tuple[str, str]:
    """(module, suffix) of a kept tensor, in the words of gguf-py's tables."""
    module, _, last = name.rpartition(".")
    if last == "dt_bias":
        return f"{module}.dt_proj", ".bias"
    return (name, "") if last == "A_log" else (module, f".{last}")


def _stack(source: ExportSource, name: str, expert: re.Match[str] | None) -> tuple[str, ...]:
    if expert is None:
        return (name,)
    return tuple(f"{expert['mlp']}.experts.{k}.{expert['linear']}" for k in range(source.spec.expert_count))


def _linear_entry(source: ExportSource, name: str, sources: tuple[str, ...], move: Move) -> Entry:
    rows, width = source.shape(sources[0])
    rows = rows if move.rows is None else len(move.rows)
    block = block_type(source)
    nbytes = len(sources) * rows * (width // BLOCK * block.block_bytes)
    shape = (len(sources), rows, width) if EXPERT.fullmatch(sources[0]) else (rows, width)
    return Entry(name, sources, block.name, shape, nbytes, move)


def _kept_entry(source: ExportSource, name: str, kept: str, move: Move, rest: str | None) -> Entry:
    kind, shape = kept_kind(source, kept, rest), source.reader.info(kept).shape
    if move.rows is not None:
        shape = (len(move.rows), *shape[1:])
    shape = tuple(size for size in shape if size != 1) or (1,)
    return Entry(name, (kept,), kind, shape, kept_bytes(kind, shape), move)


def placements(spec: ModelSpec, base: str) -> tuple[tuple[str, Move], ...]:
    """(module as gguf-py knows it, move) of every entry that holds something of module `base`."""
    name = base.replace("model.language_model.", "model.", 1)
    module, _, last = name.rpartition(".")
    if hybrid.is_hybrid(spec) and last == "in_proj_qkvz":
        qkv, z = hybrid.fused_rows(spec)
        return (f"{module}.in_proj_qkv", Move(rows=qkv)), (f"{module}.in_proj_z", Move(rows=z))
    if hybrid.adds_one(spec, f"{base}.weight"):
        return ((name, Move(value=hybrid.one_plus)),)
    value = hybrid.decay if last == "A_log" else None
    if not module.endswith("linear_attn") or not moves_heads(spec):
        return ((name, Move(value=value)),)
    width = int(spec.text_config["linear_value_head_dim"])
    if last in ("in_proj_qkv", "conv1d"):
        return ((name, Move(rows=hybrid.behind_keys(spec))),)
    if last == "in_proj_z":
        return ((name, Move(rows=hybrid.value_head_order(spec, width))),)
    if last == "out_proj":
        return ((name, Move(columns=hybrid.value_head_order(spec, width))),)
    if last in ("in_proj_a", "in_proj_b", "A_log", "dt_proj"):
        return ((name, Move(rows=hybrid.value_head_order(spec, 1), value=value)),)
    return ((name, Move()),)


def moves_heads(spec: ModelSpec) -> bool:
    """Whether llama.cpp takes the value heads of this model in another order."""
    config = spec.text_config
    different = config.get("linear_num_key_heads") != config.get("linear_num_value_heads")
    return hybrid.is_hybrid(spec) and spec.family.model_type != "qwen3_next" and different
