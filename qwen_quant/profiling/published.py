"""Figures published with first-generation Qwen, for the same cells as ours, labelled with their hardware.

Source: the README of the original repository (Apache-2.0), one A100-SXM4-80G, 2023; memory in "GB" as printed there.
"""

from __future__ import annotations

from dataclasses import replace

from qwen_quant.profiling.protocol import Cell
from qwen_quant.profiling.results import Published

HARDWARE = "A100-80G, 2023"
# (hidden_size, num_hidden_layers) of model_type "qwen"
_SIZES = {(4096, 32): "Qwen-7B", (5120, 40): "Qwen-14B"}
# model -> weights -> tokens/s of 1 + 2048 and 1 + 8192, GB of 2048 + 1 and 1 + 8192
_PROTOCOL = {
    "Qwen-7B": {"BF16": (30.34, 29.32, 17.66, 22.58), "Int4": (43.56, 33.92, 8.21, 13.62)},
    "Qwen-14B": {"BF16": (30.70, 21.73, 30.15, 38.94), "Int4": (37.11, 26.11, 13.00, 21.79)},
}
# Qwen-7B BF16: GB by batch size at 1024 new tokens, and by new tokens for one row; cache in BF16, then in Int8
_BATCHES = (1, 4, 16, 32, 64, 100)
_BY_BATCH = {"bf16": (16.3, 24.1, 31.7, 48.7, None, None), "int8": (15.5, 17.2, 22.3, 30.2, 48.2, 72.4)}
_LENGTHS = (512, 1024, 2048, 4096, 8192)
_BY_LENGTH = {"bf16": (15.2, 16.3, 17.6, 19.5, 23.2), "int8": (15.0, 15.5, 15.8, 16.6, 17.6)}


def _figures(model: str, weights: str) -> list[Published]:
    speed_short, speed_long, memory_encode, memory_long = _PROTOCOL[model][weights]
    rows = [
        Published(model, weights, "tokens_per_second", Cell(1, 2048), speed_short, "tokens/s", HARDWARE),
        Published(model, weights, "tokens_per_second", Cell(1, 8192), speed_long, "tokens/s", HARDWARE),
        Published(model, weights, "peak_memory", Cell(2048, 1), memory_encode, "GB", HARDWARE),
        Published(model, weights, "peak_memory", Cell(1, 8192), memory_long, "GB", HARDWARE),
    ]
    if (model, weights) != ("Qwen-7B", "BF16"):
        return rows
    # Another table of the same source, with its own figure for 1 + 8192: the protocol's comes first.
    for cache in ("bf16", "int8"):
        by_batch = [(Cell(1, 1024, batch, cache), v) for batch, v in zip(_BATCHES, _BY_BATCH[cache], strict=True)]
        by_length = [(Cell(1, new, 1, cache), v) for new, v in zip(_LENGTHS, _BY_LENGTH[cache], strict=True)]
        rows += [Published(model, weights, "peak_memory", cell, v, "GB", HARDWARE) for cell, v in by_batch + by_length]
    return rows


def published_figures(model_type: str, hidden_size: int, layers: int, kind: str) -> tuple[Published, ...]:
    """What was published for a model of this size; `kind` is its weights' ("16-bit", "gptq 4 bit")."""
    weights = {"16-bit": "BF16", "gptq 4 bit": "Int4"}.get(kind)
    name = _SIZES.get((hidden_size, layers)) if model_type == "qwen" else None
    if name is None or weights is None:
        return ()
    unique: dict[tuple[str, Cell], Published] = {}
    for row in _figures(name, weights):
        unique.setdefault((row.quantity, row.cell), row)
    return tuple(unique.values())


def matching(rows: tuple[Published, ...], cells: tuple[Cell, ...]) -> tuple[Published, ...]:
    """The rows for cells that were measured; the published Int8 cache is the scheme "qwen", and stands beside ours."""
    measured = {replace(cell, kv_cache="bf16" if cell.kv_cache == "bf16" else "int8") for cell in cells}
    return tuple(row for row in rows if row.cell in measured)
