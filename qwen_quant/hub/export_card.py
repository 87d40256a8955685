"""Sections of the card of an export or a conversion: what it is, how to run it, why its numbers are the artifact's."""

from __future__ import annotations

import shlex

from qwen_quant.checkpoint.manifest import MANIFEST_FILE
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.hub.card_made import format_title, hub_link, licence_lines, links_section, listed
from qwen_quant.hub.card_markdown import code, escape, fence, plain, table
from qwen_quant.hub.card_metadata import block
from qwen_quant.hub.card_quality import failed_gates_notice, gates_section, quality_section
from qwen_quant.hub.card_run import private_inputs, quantize_command
from qwen_quant.hub.card_words import say
from qwen_quant.hub.download import HUB_ID
from qwen_quant.hub.export_facts import ExportFacts
from qwen_quant.hub.export_run import export_use_section
from qwen_quant.hub.export_table import HUB_FORMATS
from qwen_quant.hub.reencoded import CONVERT
from qwen_quant.recipe import GPTQConfig, RunConfig
from qwen_quant.units import format_count

DENSE = ("bf16", "f16", "f32")
_RUNTIMES = {
    "gguf": "llama.cpp",
    "mlx": "MLX",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "awq": "vLLM, transformers, mlx-lm",
    "compressed-tensors": "vLLM, transformers",
    "gptq": "transformers, vLLM",
    "gptq_v2": "GPTQModel, transformers",
    **dict.fromkeys(DENSE, "transformers, vLLM"),
}


def export_metadata(facts: ExportFacts) -> str:
    """The YAML block: library and tags that the Hub knows the format by."""
    made = facts.made
    family = [facts.model_type] if facts.model_type else []
    if made.method == CONVERT:
        own = ["gptq", f"int{made.bits}", f"{made.bits}-bit", "quantized"] if made.quantized else []
        tags = [*facts.source.tags, *own, *family, "qwen-quant"]
        relation = "quantized" if made.quantized else ""
        return block(facts, "transformers", list(dict.fromkeys(tags)), relation=relation)
    row = HUB_FORMATS[made.format]
    widths = [] if made.format in DENSE else [f"int{made.bits}", f"{made.bits}-bit"]
    tags = [*facts.source.tags, *row.tags, *widths, "quantized", *family, "qwen-quant"]
    return block(facts, row.library, list(dict.fromkeys(tags)), relation="quantized")


def _base(facts: ExportFacts) -> str:
    return hub_link(facts.source.base_model or facts.made.base_id)


def _artifact(facts: ExportFacts, language: str) -> str:
    """The artifact whose codes these are: its repository where that is known."""
    if HUB_ID.fullmatch(facts.made.source_id):
        return hub_link(facts.made.source_id)
    found = next((repo for name, repo in facts.links if name in ("gptq", "bitsandbytes")), "")
    return hub_link(found) if found else say(language, "an_artifact", bits=facts.made.bits)


def _title(facts: ExportFacts) -> str:
    return format_title(facts.made.format)


def intro(facts: ExportFacts, language: str) -> list[str]:
    """What this is, and where its numbers come from."""
    made, base = facts.made, _base(facts)
    if made.method == CONVERT:
        first = say(language, "convert_intro", base=base)
    else:
        key = "dense_intro" if made.format in DENSE else "export_intro"
        words = {"title": _title(facts), "runtimes": _RUNTIMES[made.format], "bits": made.bits}
        first = say(language, key, base=base, artifact=_artifact(facts, language), **words)
    files = listed(language, [code(name) for name in (MANIFEST_FILE, *([JSON_FILE] if facts.report else []))])
    tool = f"qwen-quant {escape(made.versions.get('qwen-quant', ''))}".strip()
    return [first, say(language, "evidence", tool=tool, files=files)]


def inexact_notice(facts: ExportFacts, language: str) -> list[str]:
    """A quotation at the top where the numbers are not the artifact's, with the reason for publishing all the same."""
    made = facts.made
    if made.exact or made.compared is None:
        return []
    largest = f"{made.compared.largest:.3g}"
    rows = [
        say(language, "inexact_line", what=escape(what), why=escape(why), largest=largest) for what, why in made.inexact
    ]
    if made.rest is not None:
        rest = f"{made.compared.kept_largest:.3g}"
        rows.append(say(language, "inexact_rest", rest=escape(made.rest.upper()), largest=rest))
    reason = facts.override_reason
    told = say(language, "failed_reason", reason=escape(reason)) if reason else say(language, "failed_no_reason")
    lines = [f"**{say(language, 'inexact_title')}**", "", *(f"- {row}" for row in rows), "", told]
    return ["\n".join(f"> {line}".rstrip() for line in lines)]


def proof_section(facts: ExportFacts, language: str) -> list[str]:
    """What was compared with what, and the largest difference."""
    made, parts = facts.made, [f"## {say(language, 'proof')}"]
    if made.logits is not None:
        tokens, largest = made.logits
        return [*parts, say(language, "proof_logits", tokens=tokens, largest=f"{largest:.3g}")]
    found = made.compared
    if found is None:
        return []
    rows = [
        (say(language, "compared_weights"), format_count(found.weights)),
        (say(language, "compared_linears"), str(found.linears)),
        (say(language, "largest_weight"), f"{found.largest:.3g}"),
        (say(language, "compared_kept"), str(found.kept_tensors)),
        (say(language, "largest_kept"), f"{found.kept_largest:.3g}"),
        (say(language, "read_back_with"), escape(found.read_with)),
        (say(language, "source_weights"), code(made.measured_sha256[1])),
    ]
    told = say(language, "proof_exact" if made.exact else "proof_inexact")
    return [*parts, told, table(("", ""), rows, 2)]


def export_quality(facts: ExportFacts, language: str) -> list[str]:
    """The report's tables, under the sentence that says why they hold here."""
    parts, found = quality_section(facts, language), facts.made.compared
    if not parts:
        return []
    if found is None:
        return [parts[0], say(language, "quality_of_names"), *parts[1:]]
    words = {"weights": format_count(found.weights), "largest": f"{found.largest:.3g}"}
    told = [say(language, "quality_of_codes", **words)] if facts.made.exact else []
    return [parts[0], *told, *parts[1:]]


def made_section(facts: ExportFacts, language: str) -> list[str]:
    """Format, codes, how they were made, versions; and the commands."""
    made = facts.made
    rows = [] if made.method == CONVERT else [(say(language, "export_format"), _title(facts))]
    if made.quantized:
        rows.append(
            (say(language, "codes"), say(language, "codes_value", bits=made.bits, scheme=_scheme(facts, language)))
        )
        rows.append((say(language, "quantized_by"), _method(facts, language)))
    rest = escape(made.rest.upper()) if made.rest else say(language, "rest_kept")
    rows += [] if made.method == CONVERT else [(say(language, "rest"), rest)]
    versions = [f"{escape(name)} {escape(version)}" for name, version in made.versions.items()]
    rows.append((say(language, "versions"), ", ".join(versions)))
    columns = (say(language, "setting"), say(language, "value"))
    return [f"## {say(language, 'how')}", table(columns, rows, 2), *_reproduce(facts, language)]


def _scheme(facts: ExportFacts, language: str) -> str:
    made = facts.made
    row = made.group_size == -1
    parts = [say(language, "scheme_row" if row else "scheme_group", group_size=made.group_size)]
    parts.append(say(language, "scheme_sym" if made.sym else "scheme_asym"))
    parts += [say(language, "scheme_act_order")] if made.act_order else []
    return listed(language, parts)


def _method(facts: ExportFacts, language: str) -> str:
    origin = facts.made.origin
    if origin is None:
        return say(language, "unknown_method")
    method = {"gptq": "GPTQ", "rounding": "rounding", "bitsandbytes": "bitsandbytes"}[origin.method]
    return f"{method}, qwen-quant {escape(origin.tool_version)}"


def _reproduce(facts: ExportFacts, language: str) -> list[str]:
    """The command of the artifact, where it is known, and the one that made this of it."""
    made, commands = facts.made, []
    parts = [f"### {say(language, 'reproduce')}", say(language, "reproduce_export_note")]
    source = made.source_id if HUB_ID.fullmatch(made.source_id) else f"./{plain(made.source_id)}"
    source += f"@{made.revision}" if made.revision and HUB_ID.fullmatch(made.source_id) else ""
    if made.origin is not None and isinstance(made.origin.config, GPTQConfig):
        commands.append(quantize_command(made.origin, source))
    out = f"./{plain(facts.name)}"
    if made.method == CONVERT:
        command = ["qwen-quant", "convert", source, out, "--to", "qwen2"]
    else:
        command = ["qwen-quant", "export", source, out, "--format", made.format]
        command += ["--rest", made.rest] if made.rest else []
        command += [] if made.exact or not made.inexact else ["--allow-inexact"]
    size = made.split_bytes if made.format == "gguf" else made.max_shard_size_bytes
    usual = None if made.format == "gguf" else RunConfig().max_shard_size_bytes  # a GGUF is one file by default
    command += [] if size in (None, usual) else ["--max-shard-size", str(size)]
    parts.append(fence("bash", "\n".join([*commands, shlex.join(command)])))
    if made.origin is not None:
        return [*parts, *private_inputs(made.origin, language, text_key="reproduce_text_of")]
    local = not HUB_ID.fullmatch(made.source_id) and len(made.measured_sha256) > 1
    return [*parts, *([say(language, "reproduce_local", sha256=made.measured_sha256[1])] if local else [])]


def export_limits(facts: ExportFacts, language: str) -> list[str]:
    """Gates, what was not measured, and the tool's notes."""
    lines = [say(language, "export_bias", base=_base(facts))]
    if facts.report is None and facts.made.quantized:
        lines.append(say(language, "no_report"))
    elif facts.report is not None and not facts.report.tasks:
        lines.append(say(language, "no_tasks"))
    rows = "\n".join(f"- {line}" for line in lines)
    parts = [f"## {say(language, 'limits')}", *gates_section(facts, language), rows]
    notes = dict.fromkeys((*facts.made.notes, *(facts.report.warnings if facts.report else ())))
    told = "\n".join(f"- {escape(line)}" for line in notes)
    return [*parts, say(language, "notes_of_tool"), told] if notes else parts


def export_provenance(facts: ExportFacts, language: str) -> list[str]:
    """Source, hashes, how to check them, licence."""
    made, base = facts.made, _base(facts)
    if made.base_revision is not None:
        source = say(language, "source_commit", source=base, revision=code(made.base_revision))
    else:
        source = say(language, "source", source=base)
    folder = f"./{plain(facts.name)}"
    fetch = f"{shlex.join(['hf', 'download', facts.repo_id, '--local-dir', folder])} && " if facts.repo_id else ""
    lines = [
        source,
        say(language, "own_weights", sha256=made.weights_sha256),
        say(language, "verify", command=f"`{fetch}{shlex.join(['qwen-quant', 'verify', folder])}`"),
        *licence_lines(facts, language),
    ]
    return [f"## {say(language, 'provenance')}", "\n".join(f"- {line}" for line in lines)]


EXPORT_BEFORE = (failed_gates_notice, inexact_notice, intro)
EXPORT_AFTER = (
    export_use_section,
    links_section,
    proof_section,
    export_quality,
    made_section,
    export_limits,
    export_provenance,
)
