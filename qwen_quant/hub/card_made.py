"""Sections of the card about the artifact itself: summary, what is quantized, how it was made, limits, provenance."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import PurePath
from typing import Any

from qwen_quant.checkpoint.identity import weights_sha256_of
from qwen_quant.checkpoint.manifest import MANIFEST_FILE
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.hub.card_facts import PROFILE_FILE, CardFacts, Described
from qwen_quant.hub.card_markdown import code, escape, gibibytes, number, plain, table
from qwen_quant.hub.card_profile import CardCell
from qwen_quant.hub.card_quality import dataset_name, gates_section
from qwen_quant.hub.card_run import MARLIN, reproduce_section
from qwen_quant.hub.card_speed import generation_cells, show_memory, show_speed
from qwen_quant.hub.card_words import phrase, say
from qwen_quant.hub.download import HUB_ID
from qwen_quant.hub.export_table import HUB_FORMATS
from qwen_quant.recipe import BnbConfig, GPTQConfig
from qwen_quant.units import format_bytes, format_count, format_seconds


def source_link(facts: CardFacts) -> str:
    """The source as a link where it is on the Hub, else its name."""
    return hub_link(facts.source.base_model or facts.made.source_id)


def hub_link(name: str) -> str:
    """A repository as a link, anything else as its name."""
    return f"[{escape(name)}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else code(name)


def intro_section(facts: CardFacts, language: str) -> list[str]:
    """What this is, and where its numbers come from."""
    files = [MANIFEST_FILE, *([JSON_FILE] if facts.report else []), *([PROFILE_FILE] if facts.profile else [])]
    shown = [*(code(name) for name in files), say(language, "headers")]
    tool = f"qwen-quant {escape(facts.made.tool_version)}".strip()
    method = say(language, f"method_{facts.made.method}", bits=_bits(facts), scheme=scheme(facts, language))
    return [
        say(language, "intro", label=facts.label, base=source_link(facts), method=method),
        say(language, "evidence", tool=tool, files=listed(language, shown)),
    ]


def listed(language: str, items: list[str]) -> str:
    """The items with the commas of the language."""
    return ("、" if language == "zh" else ", ").join(items)


def links_section(facts: Described, language: str) -> list[str]:
    """The repositories of the same weights in other formats."""
    rows = [f"- {format_title(name)}: {hub_link(repo)}" for name, repo in facts.links if repo != facts.repo_id]
    return [f"## {say(language, 'links')}", "\n".join(rows)] if rows else []


def format_title(name: str) -> str:
    """What people call a format."""
    return HUB_FORMATS[name].title if name in HUB_FORMATS else escape(name)


def _bits(facts: CardFacts) -> Any:
    return facts.made.config.bits if isinstance(facts.made.config, GPTQConfig) else ""


def scheme(facts: CardFacts, language: str) -> str:
    """The grid in words: groups, symmetry, blocks."""
    config = facts.made.config
    if isinstance(config, BnbConfig):
        blocks = [say(language, "scheme_blocks", block_size=config.block_size)] if config.quant_type != "int8" else []
        double = [say(language, "scheme_double")] if config.double_quant else []
        return listed(language, [facts.label, *blocks, *double])
    row = config.group_size == -1
    parts = [say(language, "scheme_row" if row else "scheme_group", group_size=config.group_size)]
    parts.append(say(language, "scheme_sym" if config.sym else "scheme_asym"))
    parts += [say(language, "scheme_desc_act")] if config.desc_act else []
    return listed(language, parts)


def glance_section(facts: CardFacts, language: str) -> list[str]:
    """Size, perplexity, speed and memory of both, as far as each was measured."""
    rows = [*_quality_rows(facts, language), *_speed_rows(facts, language)]
    if not rows:
        return []
    return [f"## {say(language, 'glance')}", table(("", facts.baseline_label, facts.label), rows)]


def _quality_rows(facts: CardFacts, language: str) -> list[tuple[str, str, str]]:
    report = facts.report
    if report is None:
        return []
    rows = [(say(language, "size"), gibibytes(report.baseline_bytes), gibibytes(report.quantized_bytes))]
    for text in report.texts:
        both = text.perplexity
        title = say(language, "perplexity_of", text=code(dataset_name(text.dataset)))
        rows.append((title, number(both.baseline, 2), number(both.quantized, 2)))
    return rows


def _speed_rows(facts: CardFacts, language: str) -> list[tuple[str, str, str]]:
    """Generation at the first and memory at the last length, where both models were measured."""
    profile = facts.profile
    cells = generation_cells(profile) if profile else ()
    if profile is None or not cells:
        return []
    found = {(row.quantized, row.cell): row for row in profile.cells}
    rows = []
    for key, cell, show in (("speed_of", cells[0], show_speed), ("memory_of", cells[-1], show_memory)):
        pair = [found.get((quantized, cell)) for quantized in (False, True)]
        if all(pair):
            title = say(language, "glance_cell", tokens=cell.new_tokens)
            shown = [show(_median(row), language) for row in pair if row]
            rows.append((say(language, key, cell=title), shown[0], shown[1]))
    return rows


def _median(cell: CardCell) -> CardCell:
    """The cell as one run, so that a summary shows the median alone."""
    return CardCell(**{**cell.__dict__, "runs": 1})


def what_section(facts: CardFacts, language: str) -> list[str]:
    """Every kind of linear and every reason to keep a parameter, counted from the audit's records."""
    made, read = facts.made, facts.inspected
    grid = scheme(facts, language)
    gptq = isinstance(made.config, GPTQConfig)
    stored = say(language, "with", name=facts.label, detail=grid) if gptq else grid
    names = ", ".join(f"{code(kind)} x {count}" for kind, count in made.kinds)
    rows = [(say(language, "linears", names=names), str(made.quantized), stored)]
    kept = say(language, "kept_as")
    for reason, count in Counter(made.kept.values()).items():
        rows.append((escape(phrase(language, reason)), str(count), kept))
    columns = [say(language, key) for key in ("part", "count", "stored")]
    parts = [f"## {say(language, 'what')}", table(columns, rows, 3)]
    counts = {"quantized": format_count(read.quantized_parameters), "all": format_count(read.parameters)}
    parts.append(say(language, "share", **counts))
    if made.experts:
        shown = listed(language, [f"{escape(phrase(language, how))}: {count}" for how, count in made.experts])
        parts.append(say(language, "experts", counts=shown, fewest=made.fewest_tokens))
    if made.worst is not None:
        linear, error, rounding = made.worst
        figures = {"error": number(error, 4), "rounding": number(rounding, 4)}
        parts.append(say(language, "worst", linear=code(linear), **figures))
    return parts


def how_section(facts: CardFacts, language: str) -> list[str]:
    """Settings, calibration, machine and versions; and the command."""
    rows = [(code(name), _value(value, language)) for name, value in _settings(facts)]
    rows += [(say(language, key), value) for key, value in _calibration(facts, language)]
    made = facts.made
    if made.compute is not None:
        device, dtype = (escape(word) for word in made.compute)
        rows.append((say(language, "computed"), say(language, "computed_value", device=device, dtype=dtype)))
    cost = {"seconds": format_seconds(made.seconds), "memory": format_bytes(made.peak_memory_bytes)}
    rows.append((say(language, "cost"), say(language, "cost_value", **cost)))
    versions = [f"{escape(name)} {escape(version)}" for name, version in made.versions.items()]
    rows.append((say(language, "versions"), ", ".join(versions)))
    columns = (say(language, "setting"), say(language, "value"))
    return [f"## {say(language, 'how')}", table(columns, rows, 2), *reproduce_section(facts, language)]


def _settings(facts: CardFacts) -> list[tuple[str, Any]]:
    """The settings that have a meaning for this artifact, under their own names."""
    config = facts.made.config
    values = dict(config.__dict__)
    if isinstance(config, GPTQConfig):
        solver = ("damp_percent", "order", "scales", "asymmetric_calibration") if config.rounding_only else ()
        experts = () if facts.made.experts else ("expert_policy", "expert_min_tokens")
        left = {*solver, *experts, *(() if config.rounding_only else ("rounding_only",))}
    elif config.quant_type == "int8":
        left = {"double_quant", "block_size", "compute_dtype"}
    else:
        left = {"int8_threshold"}
    return [(name, value) for name, value in values.items() if name not in left and value != ()]


def _value(value: Any, language: str) -> str:
    if isinstance(value, bool):
        return say(language, "yes" if value else "no")
    return ", ".join(code(item) for item in value) if isinstance(value, tuple) else escape(str(value))


def _calibration(facts: CardFacts, language: str) -> list[tuple[str, str]]:
    calibration = facts.made.calibration
    if calibration is None:
        return [("calibration", say(language, "no_calibration"))]
    bundled = calibration.source == "bundled"
    text = say(language, "bundled") if bundled else code(PurePath(calibration.source).name)
    shape = {"rows": calibration.rows, "seq_len": calibration.seq_len, "tokens": calibration.tokens}
    return [
        ("calibration", text),
        ("calibration_size", say(language, "calibration_shape", seed=calibration.seed, **shape)),
        ("calibration_hash", code(calibration.sha256)),
    ]


def limits_section(facts: CardFacts, language: str) -> list[str]:
    """Gates, what was not measured, shapes that runtimes cannot take, warnings of the tools in their own words."""
    lines = [say(language, "bias")]
    if facts.report is None:
        lines.append(say(language, "no_report"))
    elif not facts.report.tasks:
        lines.append(say(language, "no_tasks"))
    lines += _shape_lines(facts, language)
    rows = "\n".join(f"- {line}" for line in lines)
    parts = [f"## {say(language, 'limits')}", *gates_section(facts, language), rows]
    warnings = dict.fromkeys((*facts.made.warnings, *(facts.report.warnings if facts.report else ())))
    if warnings:
        told = "\n".join(f"- {escape(line)}" for line in warnings)
        parts += [say(language, "warnings"), told]
    return parts


def _shape_lines(facts: CardFacts, language: str) -> list[str]:
    """One line a reason that Marlin kernels have, and one for all numbers of GPUs that do not divide the weights."""
    marlin: dict[str, list[str]] = {}
    ranks: dict[str, None] = {}
    for limit in facts.inspected.limits:
        if limit.target == MARLIN:
            marlin.setdefault(limit.reason, []).append(code(limit.linear))
        else:
            ranks[limit.target.rpartition(" ")[2]] = None
    lines = [
        say(language, "marlin", linears=listed(language, list(dict.fromkeys(names))), reason=escape(reason))
        for reason, names in marlin.items()
    ]
    shown = listed(language, sorted(ranks, key=int))
    return lines + ([say(language, "tensor_parallel", ranks=shown)] if ranks else [])


def provenance_section(facts: CardFacts, language: str) -> list[str]:
    """Source, hashes, how to check them, licence."""
    made = facts.made
    if made.revision is not None:
        source = say(language, "source_commit", source=source_link(facts), revision=code(made.revision))
    else:
        source = say(language, "source", source=source_link(facts))
    lines = [
        source,
        say(language, "weights", sha256=weights_sha256_of(made.output_sha256)),
        say(language, "verify", command=code(shlex.join(["qwen-quant", "verify", plain(facts.target)]))),
        *licence_lines(facts, language),
    ]
    return [f"## {say(language, 'provenance')}", "\n".join(f"- {line}" for line in lines)]


def licence_lines(facts: Described, language: str) -> list[str]:
    """The licence."""
    lines = []
    licence = facts.source.license_name or facts.source.license
    if licence:
        text = say(language, "licence_text", file=facts.licence_file) if facts.licence_file else ""
        gap = " " if language == "en" and text else ""
        lines.append(say(language, "licence", licence=escape(licence)) + gap + text)
    return lines
