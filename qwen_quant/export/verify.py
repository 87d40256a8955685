"""The proof of an export: what was written is read back and every value is compared with the source.

A linear counts as equal when every dequantized weight is the same FP32 number.  Where a format keeps codes and grid
apart, equal codes, zeros, scales and groups say so without the products; where they differ, the products are compared.
Kept tensors are compared in the dtype they are stored in; those that a format stores as a function of their values
(`Piece.meaning`) as the FP32 number that the model itself computes from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.errors import AuditError
from qwen_quant.export.folder import REST_DTYPES
from qwen_quant.export.formats import ExportPlan, Inexact, Piece
from qwen_quant.export.pivot import PackedRows, row_slices
from qwen_quant.export.source import ExportSource
from qwen_quant.progress import ProgressFn

_Q8_BLOCK, _Q8_STEP = 32, 0.5 + 127 * 2.0**-11


@dataclass(frozen=True)
class Verification:
    """What reading back found.

    Attributes:
        linears, weights: how many linears and weights were compared; equal_linears: how many of them are equal.
        max_abs_difference: largest |written - source| of a dequantized weight; worst_linear: where ("" for 0).
        kept_tensors, kept_values: what is not quantized; kept_max_abs_difference: likewise.
    """

    linears: int
    weights: int
    equal_linears: int
    max_abs_difference: float
    worst_linear: str
    kept_tensors: int
    kept_values: int
    kept_max_abs_difference: float

    @property
    def exact(self) -> bool:
        """Whether nothing differs at all."""
        return self.max_abs_difference == 0 and self.kept_max_abs_difference == 0


class _Tally:
    """What has been seen of each tensor: next row expected, largest difference."""

    def __init__(self, source: ExportSource, rest: str | None) -> None:
        self.source, self.rest = source, rest
        self.linears = set(source.linears)
        self.kept = set(source.kept)
        self.rows: dict[str, int] = {}
        self.worst: dict[str, float] = {}

    def add(self, piece: Piece) -> None:
        """Compare one piece. Errors: AuditError for an unknown name, or rows out of place."""
        if piece.name not in self.linears and piece.name not in self.kept:
            raise AuditError(f"reading back gave '{piece.name}', which the source does not have")
        if piece.first_row != self.rows.get(piece.name, 0):
            raise AuditError(f"reading back '{piece.name}' gave row {piece.first_row}", "rows come in order, once each")
        difference, rows = self._compare(piece)
        self.rows[piece.name] = piece.first_row + rows
        self.worst[piece.name] = max(self.worst.get(piece.name, 0.0), difference)

    def _compare(self, piece: Piece) -> tuple[float, int]:
        """(largest difference, rows compared) of one piece."""
        if isinstance(piece.values, PackedRows):
            return _packed_difference(self.source, piece.name, piece.values), piece.values.shape[0]
        rows = piece.values.shape[0] if piece.values.dim() else 1
        stop = piece.first_row + rows
        if piece.name in self.linears:
            width, total = self.source.shape(piece.name)[1], 0.0
            if tuple(piece.values.shape) != (rows, width):
                raise AuditError(f"'{piece.name}' reads back as {tuple(piece.values.shape)}", f"it has {width} columns")
            for part in row_slices(rows, width):
                start = piece.first_row + part.start
                expected = self.source.dequantized(piece.name, start, piece.first_row + part.stop)
                total = max(total, largest_difference(piece.values[part], expected))
            return total, rows
        kept = self.source.kept_rows(piece.name, piece.first_row, stop)
        difference = largest_difference(piece.values, kept if piece.meaning is None else piece.meaning(kept))
        if difference and self.rest is not None and not (piece.meaning is None and rounded_to(self.rest, piece, kept)):
            raise AuditError(f"'{piece.name}' reads back with values that --rest {self.rest} does not explain")
        return difference, rows

    def incomplete(self, dropped: set[str]) -> str:
        """The first tensor that did not come back whole, "" when all did."""
        for name in self.source.linears:
            if self.rows.get(name) != self.source.shape(name)[0]:
                return name
        for name in (name for name in self.source.kept if name not in dropped):
            shape = self.source.reader.info(name).shape
            if self.rows.get(name) != (shape[0] if shape else 1):
                return name
        return ""


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| (infinite where one is NaN, or where shapes differ); 0.0 only where all are equal."""
    if found.shape != expected.shape:
        return math.inf
    if torch.equal(found, expected) or not found.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs()
    same = (found == expected) | (found.isnan() & expected.isnan())  # Inf - Inf is NaN and still equal
    return float(torch.where(same, 0.0, difference).nan_to_num(nan=math.inf).max())


def rounded_to(rest: str, piece: Piece, kept: Tensor) -> bool:
    """Whether every value of `piece` is the one of `kept`, or what --rest makes of it.

    Q8_0 is q * d with d = FP16(amax / 127) over 32 values: half a step, and what FP16 takes off d 127 times.
    """
    values = piece.values
    assert isinstance(values, Tensor)
    if values.shape != kept.shape:
        return False
    dtype = REST_DTYPES.get(rest, torch.bfloat16)  # which q8_0 falls back to where blocks do not fit
    wide, exact = values.double(), kept.double()
    right = (wide == exact) | (wide == kept.to(dtype).to(values.dtype).double()) | (wide.isnan() & exact.isnan())
    if rest == "q8_0" and kept.dim() > 1 and kept.shape[-1] % _Q8_BLOCK == 0:
        blocks = exact.unflatten(-1, (-1, _Q8_BLOCK))
        allowed = (blocks.abs().amax(-1, keepdim=True) * (_Q8_STEP / 127)).expand_as(blocks).flatten(-2)
        right |= (wide - exact).abs() <= allowed + exact.abs() * 2.0**-8  # it is read back in the dtype of the source
    return bool(right.all())


def _packed_difference(source: ExportSource, name: str, found: PackedRows) -> float:
    """Largest difference of the dequantized weights of two packed linears."""
    expected = source.packed(name)
    if found.shape != expected.shape or found.bits != expected.bits:
        return math.inf
    grids = (found.grid, expected.grid)
    if (
        torch.equal(found.stream, expected.stream)
        and torch.equal(grids[0].zeros, grids[1].zeros)
        and torch.equal(grids[0].g_idx, grids[1].g_idx)
        and torch.equal(grids[0].scales.float(), grids[1].scales.float())
    ):
        return 0.0
    return largest_difference(found.unpacked().dequantized(), expected.unpacked().dequantized())


def verify(
    source: ExportSource, pieces: Iterator[Piece], plan: ExportPlan, progress: ProgressFn, *, rest: str | None = None
) -> Verification:
    """Compare all pieces with the source.

    Errors: AuditError when something is unknown, misplaced or missing, or a kept value is none that `rest` gives.
    """
    tally = _Tally(source, rest)
    total = len(source.linears) + len(source.kept) - len(plan.dropped.keys() & set(source.kept))
    for piece in pieces:
        progress("reading back", len(tally.rows), total)
        tally.add(piece)
    missing = tally.incomplete(set(plan.dropped))
    if missing:
        raise AuditError(f"'{missing}' did not come back whole from what was written")
    linears = {name: value for name, value in tally.worst.items() if name in tally.linears}
    kept = {name: value for name, value in tally.worst.items() if name in tally.kept}
    worst = max(linears, key=lambda name: linears[name])
    return Verification(
        linears=len(linears),
        weights=sum(math.prod(source.shape(name)) for name in linears),
        equal_linears=sum(value == 0 for value in linears.values()),
        max_abs_difference=linears[worst],
        worst_linear=worst if linears[worst] else "",
        kept_tensors=len(kept),
        kept_values=sum(math.prod(source.reader.info(name).shape) for name in kept),
        kept_max_abs_difference=max(kept.values(), default=0.0),
    )


def judge(found: Verification, reasons: list[Inexact], rest: str | None) -> None:
    """Accept what was found, or raise.

    Errors: AuditError when a weight differs although the format was found exact, or by more than the bound that was
    predicted; or a kept tensor differs although it was to be kept as it is.
    """
    bound = sum(reason.max_error or 0.0 for reason in reasons)
    if found.max_abs_difference > bound:
        what = f"'{found.worst_linear}' reads back with a difference of {found.max_abs_difference:.3g}"
        raise AuditError(what, f"at most {bound:.3g} was predicted" if bound else "the export was to be exact")
    if found.kept_max_abs_difference and rest is None:
        raise AuditError(
            f"a tensor that is kept as it is reads back with a difference of {found.kept_max_abs_difference:.3g}"
        )
