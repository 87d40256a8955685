"""Plain checkpoints: every linear dequantized, (code - zero) * scale, in BF16, FP16 or FP32.

The product has up to 8 + 11 significant bits, which only FP32 holds: bf16 and f16 are rounded, and refused unless
--allow-inexact.  `check` computes the largest rounding error exactly, over every weight that a grid can express.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen_quant import __version__
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.export.folder import (
    REST_DTYPES,
    Encoding,
    Specs,
    plan_folder,
    read_kept,
    write_config,
    write_weights,
)
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target
from qwen_quant.export.pivot import row_slices
from qwen_quant.export.rows import row_pieces, stored_rows
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource


def rounding_error(source: ExportSource, dtype: torch.dtype) -> tuple[float, int]:
    """(largest |rounded - weight| over all weights that the grids can express, linears with any such weight)."""
    worst, linears = 0.0, 0
    for name in source.linears:
        grid = source.grid(name)
        scales, zeros, largest = grid.scales.float(), grid.zeros.float(), 0.0
        for code in range(2**source.layout.bits):
            value = (code - zeros) * scales
            largest = max(largest, float((value.to(dtype).float() - value).abs().max()))
        worst, linears = max(worst, largest), linears + (largest > 0)
    return worst, linears


def _dense(source: ExportSource, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight in `dtype`, made in chunks of rows."""
    out_features, in_features = source.shape(name)
    weight = torch.empty(out_features, in_features, dtype=dtype)
    for rows in row_slices(out_features, in_features):
        weight[rows] = source.dequantized(name, rows.start, rows.stop).to(dtype)
    return {"weight": weight}


def _format(name: str, runtimes: tuple[str, ...]) -> Format:
    """The row of one dtype."""
    dtype = REST_DTYPES[name]
    words = str(dtype).removeprefix("torch.")

    def specs(source: ExportSource, linear: str) -> Specs:
        return {"weight": (dtype, source.shape(linear))}

    encoding = Encoding(specs, lambda source, linear: _dense(source, linear, dtype))

    def check(source: ExportSource) -> list[Inexact]:
        if dtype == torch.float32:
            return []
        error, linears = rounding_error(source, dtype)
        if not linears:
            return []
        why = f"{words} has {8 if dtype == torch.bfloat16 else 11} significant bits, a dequantized weight needs more"
        bound = error if error < float("inf") else None
        return [Inexact("dequantized weights", why, "--format f32, or a format that keeps the codes", bound, linears)]

    def plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
        return plan_folder(source, options, encoding)

    def write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
        write_weights(source, options, encoding, target, progress)
        write_config(source, target.folder, None, name)

    def read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
        reader = CheckpointReader(folder)
        for linear in source.linears:
            info = reader.info(f"{linear}.weight")
            for start, stop in row_pieces(info):
                yield Piece(linear, stored_rows(info, start, stop), start)
        yield from read_kept(reader, source)

    return Format(
        name=name,
        summary=f"a plain checkpoint, dequantized to {words}",
        runtimes=runtimes,
        extra="",
        check=check,
        plan=plan,
        write=write,
        read_back=read_back,
        read_with=lambda: f"qwen-quant {__version__}",
        rests=tuple(REST_DTYPES),
    )


_EVERYTHING = ("transformers", "vLLM", "everything that reads a 16-bit checkpoint")
BF16 = _format("bf16", _EVERYTHING)
F16 = _format("f16", _EVERYTHING)
F32 = _format("f32", ("transformers", "everything that reads a 32-bit checkpoint"))
