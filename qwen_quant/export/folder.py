"""What the formats that are folders of safetensors share: planning, writing, configs, reading back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import CheckpointReader, natural_order
from qwen_quant.checkpoint.writer import PlannedShard, PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.errors import InputError
from qwen_quant.export.behind import Behind, write_part, write_tensor
from qwen_quant.export.formats import ExportOptions, ExportPlan, Piece, Target
from qwen_quant.export.pivot import PackedRows
from qwen_quant.export.rows import row_pieces, stored_rows
from qwen_quant.progress import ProgressFn
from qwen_quant.resume import write_json_atomically

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource, Layout

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
COMMIT_BYTES = 1 << 30
REST_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_FLOATS = tuple(REST_DTYPES.values())


@dataclass(frozen=True)
class Encoding:
    """How a linear becomes tensors of a safetensors folder.

    Attributes:
        specs: (source, linear) -> suffix -> (dtype, shape), from headers.
        tensors: (source, linear) -> suffix -> tensor, as `specs` says.
    """

    specs: Callable[[ExportSource, str], Specs]
    tensors: Callable[[ExportSource, str], dict[str, Tensor]]


def kept_dtype(source: ExportSource, name: str, options: ExportOptions) -> torch.dtype:
    """What kept tensor `name` is written in: as stored, or --rest where it is a floating-point tensor."""
    stored = source.reader.info(name).dtype
    return REST_DTYPES[options.rest] if options.rest is not None and stored in _FLOATS else stored


def items(source: ExportSource) -> list[str]:
    """Linears and kept tensors in the order in which they are written: block by block."""
    return sorted((*source.linears, *source.kept), key=natural_order)


def plan_shards_of(source: ExportSource, options: ExportOptions, encoding: Encoding) -> tuple[PlannedShard, ...]:
    """Every byte of the folder's weights."""
    linears, planned = set(source.linears), []
    for name in items(source):
        if name in linears:
            specs = encoding.specs(source, name)
            planned += [PlannedTensor(f"{name}.{suffix}", *spec) for suffix, spec in specs.items()]
        else:
            planned.append(PlannedTensor(name, kept_dtype(source, name, options), source.reader.info(name).shape))
    return plan_shards(planned, options.max_shard_size_bytes)


def plan_folder(source: ExportSource, options: ExportOptions, encoding: Encoding) -> ExportPlan:
    """The ExportPlan of a safetensors folder; its sizes are exact."""
    shards = plan_shards_of(source, options, encoding)
    return ExportPlan(sum(shard.nbytes for shard in shards), len(shards), source.dropped)


def write_weights(
    source: ExportSource, options: ExportOptions, encoding: Encoding, target: Target, progress: ProgressFn
) -> None:
    """Write every linear and kept tensor; continues after the item that `target.state` counts last."""
    linears, names = set(source.linears), items(source)
    done = int(target.state.get("items_done", 0))
    writer = PlannedWriter(target.folder, plan_shards_of(source, options, encoding))
    for name in names[:done]:
        suffixes = encoding.specs(source, name) if name in linears else {}
        writer.mark_written([f"{name}.{suffix}" for suffix in suffixes] or [name])

    def write_item(name: str, behind: Behind) -> int:
        if name not in linears:
            return write_kept(source, writer, behind, name, kept_dtype(source, name, options))
        tensors = encoding.tensors(source, name).items()
        return sum(write_tensor(writer, behind, f"{name}.{suffix}", tensor) for suffix, tensor in tensors)

    write_items(writer, target, names[done:], write_item, Steps(progress, done, len(names)))


@dataclass(frozen=True)
class Steps:
    """Where a run stands: `done` items of `total` are on disk from an earlier one."""

    progress: ProgressFn
    done: int
    total: int


def write_items(
    writer: PlannedWriter, target: Target, names: list[str], write_item: Callable[[str, Behind], int], steps: Steps
) -> None:
    """Call `write_item` (name, behind) -> bytes for each of `names`, commit about every GiB, finish the writer."""
    pending = 0
    try:
        with Behind() as behind:
            for k, name in enumerate(names, steps.done):
                steps.progress("writing", k, steps.total)
                pending += write_item(name, behind)
                if pending >= COMMIT_BYTES:
                    behind.drain()
                    writer.sync()
                    target.commit({"items_done": k + 1})
                    pending = 0
        writer.finish()
    finally:
        writer.close()


def write_kept(source: ExportSource, writer: PlannedWriter, behind: Behind, name: str, dtype: torch.dtype) -> int:
    """Copy a kept tensor in pieces, in `dtype`; returns its bytes. Errors: InputError when a value does not fit."""
    width, count = source.reader.info(name).dtype.itemsize, 0
    for start, part in source.reader.parts(name):
        values = part.to(dtype)
        if values.dtype != part.dtype and bool((values.isinf() & ~part.isinf()).any()):
            raise InputError(
                f"'{name}' has values that {dtype} cannot hold", "they would become infinite", "use --rest bf16 or f32"
            )
        count += write_part(writer, behind, name, start // width * dtype.itemsize, values)
    writer.finish_parts(name)
    return count


def write_config(source: ExportSource, folder: Path, settings: dict[str, Any] | None, rest: str | None = None) -> None:
    """config.json with these quantization settings (None: a plain checkpoint) and, for a `rest`, its dtype.

    `auto_map` goes: it names Python files, which are not carried. `rope_theta` also stands where older readers and
    mlx-lm look for it; without it they take a default in silence.
    """
    dtype = None if rest is None else str(REST_DTYPES[rest]).removeprefix("torch.")
    config = {key: value for key, value in source.spec.config.items() if key not in ("auto_map", "quantization_config")}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
    for part in (part for part in (config, config.get("text_config")) if isinstance(part, dict)):
        theta = (part.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:
            part.setdefault("rope_theta", theta)
        if dtype is not None:
            part["dtype" if "dtype" in part else "torch_dtype"] = dtype
    if settings is not None:
        config["quantization_config"] = settings
    write_json_atomically(folder / "config.json", config)


def plain_modules(source: ExportSource) -> list[str]:
    """Modules with a matrix that stay as they are where a runtime would expect quantized linears (head left out)."""
    plain = set(source.unquantized_linears)
    found = []
    for name in source.kept:
        module = name.removesuffix(".weight")
        skipped = any(re.match(pattern, module) for pattern in source.spec.family.skips)
        if module in plain or (skipped and name.endswith(".weight") and len(source.reader.info(name).shape) >= 2):
            found.append(module)
    return found


def read_folder(folder: Path, source: ExportSource, layout: Layout) -> Iterator[Piece]:
    """Pieces of a written folder with packed linears in `layout`."""
    for name in source.linears:
        yield Piece(name, PackedRows(layout.stream(name), layout.bits, layout.grid(name)))
    yield from read_kept(CheckpointReader(folder), source)


def read_kept(reader: CheckpointReader, source: ExportSource) -> Iterator[Piece]:
    """Pieces of every kept tensor of a safetensors folder that stores it under its own name."""
    for name in source.kept:
        info = reader.info(name)
        for start, stop in row_pieces(info):
            yield Piece(name, stored_rows(info, start, stop), start)
