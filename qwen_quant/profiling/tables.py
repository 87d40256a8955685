"""The figures of a profile as tables of text, for the terminal and for the page. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_quant.evaluation.report_numbers import number, percent
from qwen_quant.profiling.results import MEASURED, OOM, Measurement, ProfileResult, Published, Spread
from qwen_quant.units import format_bytes

NOTHING = "-"


@dataclass(frozen=True)
class TextTable:
    """A titled table; the first `text_columns` columns are words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 3


def tables(result: ProfileResult) -> tuple[TextTable, ...]:
    """Speed, memory, ratios and published figures; those without rows are left out."""
    found = (_speed(result), _memory(result), _ratios(result), _published(result))
    return tuple(table for table in found if table.rows)


def milliseconds(seconds: float | None) -> str:
    """ "12.34 ms"; "-" for None."""
    return NOTHING if seconds is None else f"{number(1e3 * seconds)} ms"


def tokens_per_second(m: Measurement) -> str:
    """The median of a cell, "~" in front when it is extrapolated, or its status; "-" for one token: a prefill."""
    if m.speed is None:
        return m.status
    if m.cell.new_tokens == 1:
        return NOTHING
    return ("~" if m.extrapolated else "") + number(m.speed.tokens_per_second.median)


def _head(m: Measurement) -> tuple[str, str, str]:
    return _named(m), m.cell.label, m.cache_name


def _named(m: Measurement) -> str:
    """The model, and that its weights ran dequantized where they did."""
    return f"{m.model} (dequantized)" if m.dequantized else m.model


def _range(values: Spread) -> str:
    return f"{number(values.low)} to {number(values.high)}" if values.runs > 1 else NOTHING


def _speed(result: ProfileResult) -> TextTable:
    columns = (
        "model", "tokens", "KV cache", "tokens/s", "least to most", "first token", "p50", "p99",
        "prefill tokens/s", "J/token", "roofline", "reached",
    )  # fmt: skip
    rows = []
    for m in result.measurements:
        if m.speed is None:
            rows.append((*_head(m), m.status, *[NOTHING] * (len(columns) - 4)))
            continue
        s, line = m.speed, m.roofline
        rows.append(
            (
                *_head(m),
                tokens_per_second(m),
                NOTHING if m.cell.new_tokens == 1 else _range(s.tokens_per_second),
                milliseconds(s.time_to_first_token_seconds.median),
                milliseconds(s.inter_token_p50_seconds),
                milliseconds(s.inter_token_p99_seconds),
                NOTHING if s.prefill_tokens_per_second is None else number(s.prefill_tokens_per_second),
                NOTHING if s.joules_per_token is None else number(s.joules_per_token),
                NOTHING if line is None else number(line.tokens_per_second),
                NOTHING if line is None else percent(line.share),
            )
        )
    return TextTable("Speed", columns, tuple(rows))


def _memory(result: ProfileResult) -> TextTable:
    columns = (
        "model",
        "tokens",
        "KV cache",
        "peak",
        "with model load",
        "program",
        "weights",
        "cache",
        "rest",
        "whole GPU",
    )
    rows = []
    for m in result.measurements:
        memory = m.memory
        if memory is None:
            rows.append((*_head(m), m.status, *[NOTHING] * (len(columns) - 4)))
            continue
        sign = "~" if memory.extrapolated else ""
        sizes = (memory.process_bytes, memory.weights_bytes, memory.kv_cache_bytes, memory.rest_bytes)
        rows.append(
            (
                *_head(m),
                sign + format_bytes(memory.generation_peak_bytes),
                sign + format_bytes(memory.peak_bytes),
                *(format_bytes(size) for size in sizes),
                NOTHING if memory.device_peak_bytes is None else sign + format_bytes(memory.device_peak_bytes),
            )
        )
    if all(m.memory is None or m.memory.device_peak_bytes is None for m in result.measurements):
        return TextTable("Peak memory, one process each", columns[:-1], tuple(row[:-1] for row in rows))
    return TextTable("Peak memory, one process each", columns, tuple(rows))


def _ratios(result: ProfileResult) -> TextTable:
    names = {m.model: _named(m) for m in result.measurements if m.status == MEASURED}
    rows = tuple(
        (
            names.get(r.model, r.model),
            r.cell.label,
            r.cell.kv_cache,
            NOTHING if r.tokens_per_second is None else f"{r.tokens_per_second:.2f} x",
            NOTHING if r.generation_peak_bytes is None else f"{r.generation_peak_bytes:.2f} x",
        )
        for r in result.ratios
    )
    base = result.models[0].name
    return TextTable(f"Compared with {base}", ("model", "tokens", "KV cache", "speed", "peak memory"), rows)


def _published(result: ProfileResult) -> TextTable:
    """Each published figure with ours of the same cell beside it; memory in GB as printed, ours in 10^9 bytes."""
    rows = []
    for figure in result.published:
        for m in result.measurements:
            cache = "bf16" if m.cell.kv_cache == "bf16" else "int8"
            if replace(m.cell, kv_cache=cache) == figure.cell and m.model == figure.beside:
                value = OOM if figure.value is None else f"{figure.value:g} {figure.unit}"
                rows.append((*_head(m), figure.quantity.replace("_", " "), value, figure.hardware, _ours(m, figure)))
    columns = ("model", "tokens", "KV cache", "figure", "published", "on", f"ours, on {result.device_name}")
    return TextTable("Published for the same model", columns, tuple(rows), 4)


def _ours(m: Measurement, figure: Published) -> str:
    if m.status != MEASURED or m.memory is None:
        return m.status
    if figure.quantity == "tokens_per_second":
        return f"{tokens_per_second(m)} tokens/s"
    return f"{'~' if m.memory.extrapolated else ''}{m.memory.peak_bytes / 1e9:.4g} GB"
