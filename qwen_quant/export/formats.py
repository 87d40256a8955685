"""What a format of export must provide, and the table of all of them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qwen_quant.errors import InputError, UsageError
from qwen_quant.export.pivot import PackedRows
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

REST = ("f16", "bf16", "f32", "q8_0")
# name -> "module:attribute" of its Format. Adding a format is adding its line here.
LOCATIONS = {
    "gptq": "qwen_quant.export.gptq:GPTQ",
    "gptq_v2": "qwen_quant.export.gptq:GPTQ_V2",
    "awq": "qwen_quant.export.awq:AWQ",
    "compressed-tensors": "qwen_quant.export.compressed_tensors:COMPRESSED_TENSORS",
    "bf16": "qwen_quant.export.dense:BF16",
    "f16": "qwen_quant.export.dense:F16",
    "f32": "qwen_quant.export.dense:F32",
    "mlx": "qwen_quant.export.mlx:MLX",
    "gguf": "qwen_quant.export.gguf:GGUF",
    "openvino": "qwen_quant.export.openvino:OPENVINO",
    "onnx": "qwen_quant.export.onnx:ONNX",
}


@dataclass(frozen=True)
class Inexact:
    """One reason why a format cannot hold this source exactly.

    Attributes:
        what: what about the source, e.g. "act-order" or "scales beyond FP16".
        why: why the format cannot hold it.
        nearest: the nearest exact choice, as words after "use", e.g. "--format gptq".
        max_error: bound of |written - source| over all weights when it is written all the same; None: it cannot be
            written at all, --allow-inexact or not.
        linears: how many linears it concerns (0: the folder as a whole).
    """

    what: str
    why: str
    nearest: str
    max_error: float | None = None
    linears: int = 0


@dataclass(frozen=True)
class ExportOptions:
    """What decides the bytes of an export beside the source.

    Attributes:
        rest: dtype of what is not quantized: one of REST, or None to keep every tensor as stored.
        max_shard_size_bytes: largest file, where the format has several.
        split_bytes: largest file of a format that is one file otherwise (GGUF); None: one file.
    """

    rest: str | None = None
    max_shard_size_bytes: int = 2_000_000_000
    split_bytes: int | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What writing would give, known from the headers alone.

    Attributes:
        weight_bytes: bytes of the weight files (exact, or an upper bound within a few percent).
        files: how many weight files.
        dropped: tensors of the source that the format has no place for, with the reason (a tied copy of the head, a
            bias of zeros, ...). Everything else must come back in `read_back`.
        notes: what somebody who loads the result should know.
    """

    weight_bytes: int
    files: int = 1
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where a format writes, and how a killed run continues.

    Attributes:
        folder: the folder being built; it may hold the files of an earlier, killed run of the same export.
        state: what that run committed last ({} for a new one). A writer that ignores it writes its files again.
        commit: make a new state durable; everything it speaks of must be on disk already.
    """

    folder: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    commit: Callable[[dict[str, Any]], None] = lambda state: None


@dataclass(frozen=True)
class Piece:
    """Values read back from written files, for the comparison with the source.

    Attributes:
        name: of a linear of the source (`ExportSource.linears`, without ".weight"), or of a kept tensor
            (`ExportSource.kept`), whatever it is called in the format.
        values: what the file means. For a linear: FP32 [rows, in] (or FP16/BF16 if that is what it stores), or all of
            it as `PackedRows` where the format keeps codes and grid apart (equal codes and grids have equal products,
            and comparing them is many times faster). For a kept tensor: [rows, ...] in the stored dtype.
        first_row: first row (index of dimension 0) of `values`.
        meaning: for a kept tensor that the format stores as a function of its rows (1 + weight, -exp(A_log)), that
            function in FP32, as the model computes it; `values` are compared with its result.
    """

    name: str
    values: Tensor | PackedRows
    first_row: int = 0
    meaning: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: as --format takes it.
        summary: one line for --list.
        runtimes: who reads it.
        extra: pip extra that `write` or `read_back` needs ("" for none).
        packages: modules of that extra that must import; they are tried before anything is written.
        check: source -> why it cannot be exact; empty when it is. Needs no optional package; reads grids at most.
        plan: (source, options) -> ExportPlan, from headers alone. Needs no optional package.
        write: (source, options, target, progress) -> None. Fills `target.folder` with weights and every config the
            format's runtimes need; tokenizer, generation_config and licence are there already (rewrite or delete them
            where the format has them inside). Holds one linear at a time.
        read_back: (folder, source) -> Pieces of every linear and every kept tensor that the plan does not drop, read by
            the format's own library where there is one.
        read_with: what `read_back` reads with, for the manifest, e.g. "gguf 0.17.1".
        rests: which values of --rest it takes besides None.
    """

    name: str
    summary: str
    runtimes: tuple[str, ...]
    extra: str
    check: Callable[[ExportSource], list[Inexact]]
    plan: Callable[[ExportSource, ExportOptions], ExportPlan]
    write: Callable[[ExportSource, ExportOptions, Target, ProgressFn], None]
    read_back: Callable[[Path, ExportSource], Iterator[Piece]]
    read_with: Callable[[], str]
    rests: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def find_format(name: str) -> Format:
    """The Format called `name`. Errors: UsageError that names the nearest one."""
    check_name(name)
    module, attribute = LOCATIONS[name].split(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, Format)
    return found


def check_name(name: str) -> None:
    """UsageError naming the nearest format where there is none called `name`."""
    if name not in LOCATIONS:
        near = difflib.get_close_matches(name.lower(), LOCATIONS, n=1, cutoff=0.4)
        step = f"did you mean {near[0]}?" if near else "qwen-quant export ARTIFACT --list says what suits it"
        raise UsageError(f"unknown format '{name}'", f"known formats: {', '.join(LOCATIONS)}", step)


def all_formats() -> tuple[Format, ...]:
    """Every Format of the table."""
    return tuple(find_format(name) for name in LOCATIONS)


def require(package: str, format_name: str, extra: str) -> ModuleType:
    """An optional package, imported. Errors: InputError naming the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"--format {format_name} needs the package {package}", str(error), f"pip install 'qwen-quant[{extra}]'"
        ) from error
