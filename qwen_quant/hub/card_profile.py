"""The part of a profile.json that a card shows: the artifact's cells, and those of its own source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.profiling.protocol import Cell
from qwen_quant.profiling.results import MEASURED, read_profile

SIXTEEN_BIT = "16-bit"


@dataclass(frozen=True)
class CardCell:
    """One measurement.

    Attributes:
        quantized: of the artifact, else of its source. status: "measured", "oom" or "failed".
        tokens_per_second, low, high: median, least and largest of `runs` runs; None where not measured.
        peak_bytes: model load included; None where not measured.
        extrapolated: whether time ran out before the last token.
    """

    quantized: bool
    cell: Cell
    status: str
    kernel: str
    tokens_per_second: float | None
    low: float | None
    high: float | None
    runs: int
    peak_bytes: int | None
    extrapolated: bool


@dataclass(frozen=True)
class CardProfile:
    """profile.json as far as a card shows it: where it ran, with what, and the cells."""

    device: str
    device_name: str
    threads: int
    versions: dict[str, str]
    cells: tuple[CardCell, ...]


def read_card_profile(path: Path, artifact_sha256: str, source_sha256: str) -> CardProfile:
    """Read a profile.json of the artifact with these weights; other models than it and its source are left out.

    Errors: InputError when it is damaged, or profiled no model with these weights.
    """
    document = read_profile(path)
    again = "qwen-quant profile MODEL ARTIFACT --report DIR"
    try:
        models = {str(row["name"]): (str(row["kind"]), str(row.get("sha256", ""))) for row in document["models"]}
        artifacts = [name for name, (_, sha256) in models.items() if sha256 == artifact_sha256]
        sources = [name for name, (kind, sha256) in models.items() if kind == SIXTEEN_BIT and sha256 == source_sha256]
        if not artifacts:
            found = ", ".join(f"{name} ({sha256[:16] or 'without a hash'})" for name, (_, sha256) in models.items())
            raise InputError(f"{path} is the profile of another artifact", f"it measured {found}", again)
        wanted = {**dict.fromkeys(sources[:1], False), artifacts[0]: True}
        cells = [_cell(row, wanted[row["model"]]) for row in document["measurements"] if row["model"] in wanted]
        return CardProfile(
            str(document["device"]),
            str(document["device_name"]),
            int(document["threads"]),
            {str(name): str(version) for name, version in document["versions"].items()},
            tuple(sorted(cells, key=lambda cell: cell.quantized)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged", f"{type(error).__name__}: {error}", again) from error


def _cell(row: dict[str, Any], quantized: bool) -> CardCell:
    cell, speed, memory = Cell(**row["cell"]), row["speed"], row["memory"]
    spread = speed["tokens_per_second"] if speed else {}
    return CardCell(
        quantized=quantized,
        cell=cell,
        status=str(row["status"]),
        kernel=str(row["kernel"]),
        tokens_per_second=float(spread["median"]) if spread else None,
        low=float(spread["low"]) if spread else None,
        high=float(spread["high"]) if spread else None,
        runs=int(spread["runs"]) if spread else 0,
        peak_bytes=int(memory["peak_bytes"]) if memory else None,
        extrapolated=row["status"] == MEASURED and int(row["measured_tokens"]) < cell.new_tokens,
    )
