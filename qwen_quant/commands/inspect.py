"""`qwen-quant inspect`: what a checkpoint or artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.recipe import GPTQConfig
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qwen_quant.inspection import InspectResult

PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="folder of a checkpoint or artifact")]
GroupSize = Annotated[
    int, typer.Option("--group-size", metavar="-1|32|64|128", help="assumed for a folder that is not quantized yet")
]
SHOWN_LAYERS = 10
SHOWN_NAMES = 5
SETTINGS = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "load_in_8bit",
)


def inspect(
    path: PathArgument, group_size: GroupSize = 128, json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """Show family, sizes, dtypes, quantization, the audit's accounting, and shapes that kernels cannot take.

    For an artifact of this tool also where it came from and how far each layer is from its source. Only configs and
    file headers are read.

    \b
    Examples:
      qwen-quant inspect ./Qwen2.5-0.5B
      qwen-quant inspect ./Qwen2.5-0.5B --group-size 64
      qwen-quant inspect ./Qwen2.5-0.5B-Int4 --json
    """
    output = Output(json=json, quiet=quiet)
    GPTQConfig(group_size=group_size)  # refuses a group size that does not exist

    from qwen_quant.inspection import inspect_path

    with running(output):
        result = inspect_path(path, group_size)
    show(Report("inspect", to_json(result), report_parts(result)), output)


def report_parts(result: InspectResult) -> tuple[str | Table, ...]:
    """The result for people: facts, tensors, the audit, limits, provenance, the layers furthest off."""
    rows = tuple(
        (r.role, r.dtype, str(r.tensors), format_count(r.parameters) if r.parameters else "-", format_bytes(r.nbytes))
        for r in result.classes
    )
    tensors = Table("tensors", ("class", "dtype", "tensors", "parameters", "size"), rows, text_columns=2)
    return (_headline(result), tensors, _audit(result), *_limits(result), *_provenance(result), *_layers(result))


def _headline(result: InspectResult) -> str:
    head = "tied" if result.tied_head else "untied"
    lines = [
        f"{result.path}: {result.model_type} {result.kind}, {format_count(result.parameters)} parameters, "
        f"{result.num_layers} blocks of width {result.hidden_size}, {head} head",
        f"{format_bytes(result.weight_bytes)} of weights in {result.files} file(s), "
        f"{format_bytes(result.folder_bytes)} in all",
    ]
    if result.quantization is not None:
        settings = ", ".join(f"{k} {result.quantization[k]}" for k in SETTINGS if k in result.quantization)
        lines.append(f"quantization: {settings}")
    return "\n".join(lines)


def _audit(result: InspectResult) -> str:
    audit = result.accounting
    lines = [f"audit: {audit.quantized_linears} linears quantized, {audit.unquantized_linears} in 16 or 32 bit"]
    lines += [f"  kept: {count} tensors ({reason})" for reason, count in audit.kept.items()]
    for title, names in (("missing or incomplete", audit.missing), ("NOT ACCOUNTED FOR", audit.unaccounted)):
        if names:
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            lines.append(f"  {title}: {', '.join(names[:SHOWN_NAMES])}{more}")
    if not audit.missing and not audit.unaccounted:
        lines.append("  every tensor is accounted for")
    return "\n".join(lines)


def _limits(result: InspectResult) -> tuple[str | Table, ...]:
    if (result.quantization or {}).get("quant_method") == "bitsandbytes":
        return ()
    if not result.limits:
        return (
            f"every linear suits Marlin-class kernels and tensor parallelism 2, 4, 8 at group_size {result.group_size}",
        )
    rows = tuple((f"{limit.linear} x {limit.layers}", limit.target, limit.reason) for limit in result.limits)
    return (
        Table(f"shapes with limits at group_size {result.group_size}", ("linear", "for", "why"), rows, text_columns=3),
    )


def _provenance(result: InspectResult) -> tuple[str, ...]:
    facts = result.provenance
    if facts is None:
        return ()
    source, calibration, measured = (_object(facts, key) for key in ("source", "calibration", "measured"))
    commit = f" at {source['revision']}" if source.get("revision") else ""
    lines = [f"made from {source.get('id', '?')}{commit} by {_object(facts, 'versions').get('qwen-quant', '?')}"]
    if calibration:
        text, tokens, seed = (calibration.get(key, "?") for key in ("source", "tokens", "seed"))
        lines.append(f"calibration: {text}, {tokens} tokens, seed {seed}")
    if "wall_seconds" in measured and "peak_memory_bytes" in measured:
        peak = format_bytes(measured["peak_memory_bytes"])
        lines.append(f"it took {format_seconds(measured['wall_seconds'])} and {peak} at its peak")
    lines += [f"warning then: {text}" for text in facts.get("warnings", ())]
    return ("\n".join(lines),)


def _object(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """`facts[key]` if it is an object: a manifest may come from another version."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def _layers(result: InspectResult) -> tuple[Table, ...]:
    known = [layer for layer in result.layers if {"name", "relative_error", "rounding_error"} <= layer.keys()]
    worst = sorted(known, key=lambda layer: -layer["relative_error"])[:SHOWN_LAYERS]
    rows = tuple((str(x["name"]), f"{x['relative_error']:.4f}", f"{x['rounding_error']:.4f}") for x in worst)
    title = f"layers furthest from the source ({len(rows)} of {len(known)})"
    return (Table(title, ("layer", "relative error", "plain rounding"), rows),) if rows else ()
