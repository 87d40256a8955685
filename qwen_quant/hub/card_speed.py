"""Sections of the card about speed, peak memory and the KV cache, in the form of the published Qwen cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_quant.hub.card_facts import CardFacts
from qwen_quant.hub.card_markdown import code, escape, gibibytes, number, table
from qwen_quant.hub.card_profile import CardCell, CardProfile
from qwen_quant.hub.card_words import say
from qwen_quant.profiling.protocol import PUBLISHED_CELLS, Cell
from qwen_quant.profiling.results import MEASURED, OOM

PLAIN_CACHE = "bf16"
_ABSENT = "-"
Show = Callable[[CardCell, str], str]


def speed_sections(facts: CardFacts, language: str) -> list[str]:
    """Speed, memory and KV-cache tables; nothing where there is no profile or no cell for a table."""
    profile = facts.profile
    if profile is None:
        return []
    parts = [*_speed(facts, profile, language), *_memory(facts, profile, language)]
    caches = _kv_cache(facts, profile, language)
    if not parts and not caches:
        return []
    if any(cell.extrapolated for cell in profile.cells):
        caches.append(say(language, "extrapolated"))
    return [*parts, *caches, _hardware(profile, language), *_kernels(facts, profile, language)]


def generation_cells(profile: CardProfile) -> tuple[Cell, ...]:
    """Cells of one sequence from one context token with the plain cache, by length.

    Those of the published tables, where any was measured; else every length.
    """
    plain = (1, 1, PLAIN_CACHE)
    cells = _distinct(
        profile, lambda cell: (cell.context_tokens, cell.batch_size, cell.kv_cache) == plain and cell.new_tokens > 1
    )
    return tuple(cell for cell in cells if cell in PUBLISHED_CELLS) or cells


def encoding_cells(profile: CardProfile) -> tuple[Cell, ...]:
    """Cells that read a long context and generate one token."""
    return _distinct(
        profile,
        lambda cell: (
            (cell.new_tokens, cell.batch_size, cell.kv_cache) == (1, 1, PLAIN_CACHE) and cell.context_tokens > 1
        ),
    )


def show_speed(cell: CardCell, language: str) -> str:
    """ "43.56 (43.10 to 43.90)": the median and, of several runs, the least and the largest."""
    if cell.status != MEASURED or cell.tokens_per_second is None or cell.low is None or cell.high is None:
        return say(language, "oom") if cell.status == OOM else say(language, "failed")
    spread = ""
    if cell.runs > 1:
        spread = f" ({number(cell.low, 2)} {say(language, 'to')} {number(cell.high, 2)})"
    return ("~" if cell.extrapolated else "") + number(cell.tokens_per_second, 2) + spread


def show_memory(cell: CardCell, language: str) -> str:
    """The peak, model load included."""
    if cell.status != MEASURED or cell.peak_bytes is None:
        return say(language, "oom") if cell.status == OOM else say(language, "failed")
    return ("~" if cell.extrapolated else "") + gibibytes(cell.peak_bytes)


def _distinct(profile: CardProfile, wanted: Callable[[Cell], bool]) -> tuple[Cell, ...]:
    found = dict.fromkeys(row.cell for row in profile.cells if wanted(row.cell))
    return tuple(sorted(found, key=lambda cell: (cell.context_tokens, cell.new_tokens)))


def _rows(facts: CardFacts, cells: Sequence[Cell], show: Show, language: str) -> list[tuple[str, ...]]:
    """One row a model that measured any of the cells: source, then artifact."""
    assert facts.profile is not None
    rows = []
    for quantized, label in ((False, facts.baseline_label), (True, facts.label)):
        found = {row.cell: row for row in facts.profile.cells if row.quantized == quantized}
        if any(cell in found for cell in cells):
            rows.append((label, *(show(found[c], language) if c in found else _ABSENT for c in cells)))
    return rows


def _speed(facts: CardFacts, profile: CardProfile, language: str) -> list[str]:
    cells = generation_cells(profile)
    if not cells:
        return []
    columns = [say(language, "quantization")]
    columns += [say(language, "speed_cell", tokens=cell.new_tokens) for cell in cells]
    note = say(language, "speed_note", context=cells[0].context_tokens)
    return [f"## {say(language, 'speed')}", note, table(columns, _rows(facts, cells, show_speed, language))]


def _memory(facts: CardFacts, profile: CardProfile, language: str) -> list[str]:
    encoding, generating = encoding_cells(profile), generation_cells(profile)[-1:]
    cells = (*encoding, *generating)
    if not cells:
        return []
    columns = [say(language, "quantization")]
    columns += [say(language, "memory_encode", tokens=cell.context_tokens) for cell in encoding]
    columns += [say(language, "memory_generate", tokens=cell.new_tokens) for cell in generating]
    rows = _rows(facts, cells, show_memory, language)
    return [f"## {say(language, 'memory')}", say(language, "memory_note"), table(columns, rows)]


def _kv_cache(facts: CardFacts, profile: CardProfile, language: str) -> list[str]:
    """Memory by batch size and by length for each cache, where more than one cache or batch size was measured."""
    parts = []
    lengths = {row.cell.new_tokens for row in profile.cells if row.cell.batch_size > 1}
    for tokens in sorted(lengths):
        chosen = [row for row in profile.cells if row.cell.new_tokens == tokens]
        made = _sweep(facts, chosen, lambda cell: (cell.batch_size, f"bs={cell.batch_size}"), language)
        parts += [say(language, "kv_batch", tokens=tokens), made] if made else []
    single = [row for row in profile.cells if row.cell.batch_size == 1 and row.cell.new_tokens > 1]
    caches: dict[int, set[str]] = {}
    for row in single:
        caches.setdefault(row.cell.new_tokens, set()).add(row.cell.kv_cache)
    compared = [row for row in single if len(caches[row.cell.new_tokens]) > 1]
    if len({row.cell.new_tokens for row in compared}) > 1 or (compared and not parts):
        made = _sweep(facts, compared, lambda cell: (cell.new_tokens, f"sl={cell.new_tokens}"), language)
        parts += [say(language, "kv_length"), made]
    return [f"## {say(language, 'kv_cache')}", *parts] if parts else []


def _sweep(facts: CardFacts, rows: list[CardCell], axis: Callable[[Cell], tuple[int, str]], language: str) -> str:
    """One row a model and cache, one column a value of the axis; "" where the axis has a single value and cache."""
    columns = sorted({axis(row.cell) for row in rows})
    found = {(row.quantized, row.cell.kv_cache, axis(row.cell)): row for row in rows}
    heads = list(dict.fromkeys((row.quantized, row.cell.kv_cache) for row in rows))
    if len(columns) < 2 and len(heads) < 2:
        return ""
    lines = []
    for quantized, cache in heads:
        label = facts.label if quantized else facts.baseline_label
        cells = [found.get((quantized, cache, column)) for column in columns]
        head = say(language, "kv_row", label=label, cache=code(cache))
        lines.append((head, *(show_memory(cell, language) if cell else _ABSENT for cell in cells)))
    return table((say(language, "quantization"), *(title for _, title in columns)), lines)


def _hardware(profile: CardProfile, language: str) -> str:
    where = say(language, "threads", threads=profile.threads) if profile.threads else say(language, "gpu")
    names = ("qwen-quant", "torch", "transformers")
    versions = ", ".join(f"{name} {escape(profile.versions[name])}" for name in names if name in profile.versions)
    return say(language, "hardware", device=escape(profile.device_name), where=where, versions=versions)


def _kernels(facts: CardFacts, profile: CardProfile, language: str) -> list[str]:
    """What multiplied the weights of each model, in profile's words."""
    found = {row.quantized: row.kernel for row in reversed(profile.cells) if row.kernel}
    labels = {False: facts.baseline_label, True: facts.label}
    lines = [
        say(language, "kernel", label=labels[quantized], kernel=escape(found[quantized])) for quantized in sorted(found)
    ]
    return ["\n".join(f"- {line}" for line in lines)] if lines else []
