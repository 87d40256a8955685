"""`qwen-quant export`: an Int4 artifact in another runtime's format, without quantizing again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.errors import UsageError
from qwen_quant.recipe import RunConfig
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qwen_quant.export.export import ExportResult, FormatOffer

Artifact = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT", help="Int4 folder or hub id org/name[@revision]: ours, GPTQ, AWQ or compressed-tensors"
    ),
]
Out = Annotated[Path | None, typer.Argument(metavar="OUT", help="folder to write")]
FormatName = Annotated[str | None, typer.Option("--format", metavar="FORMAT", help="what to write; see --list")]
Rest = Annotated[
    Literal["f16", "bf16", "f32", "q8_0"] | None,
    typer.Option("--rest", help="dtype of what is not quantized (as it is)"),
]
AllowInexact = Annotated[
    bool, typer.Option("--allow-inexact", help="write a format that has to round, and report the largest error")
]
List = Annotated[
    bool,
    typer.Option(
        "--list", help="say which formats hold ARTIFACT exactly, their sizes (with --rest) and who reads them"
    ),
]


def export(
    artifact: Artifact,
    out: Out = None,
    format: FormatName = None,
    rest: Rest = None,
    allow_inexact: AllowInexact = False,
    list_formats: List = False,
    max_shard_size: options.MaxShardSize = None,
    resume: options.Resume = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write an Int4 artifact in another runtime's format: the same codes, scales and zeros, nothing quantized again.

    What was written is read back and every dequantized weight compared with ARTIFACT; OUT appears only when all are
    equal. A format that cannot hold ARTIFACT exactly is refused with the reason and the nearest one that can.

    \b
    Examples:
      qwen-quant export ./Qwen3-8B-Int4 --list
      qwen-quant export ./Qwen3-8B-Int4 ./Qwen3-8B-AWQ --format awq
      qwen-quant export Qwen/Qwen2.5-7B-Instruct-AWQ ./out --format compressed-tensors --json
    """
    output = Output(json=json, quiet=quiet)
    run = options.override_run(RunConfig(), max_shard_size, resume=resume, force=force or None)
    if list_formats:
        given = {"OUT": out, "--format": format, "--allow-inexact": allow_inexact or None, "--resume": resume}
        given |= {"--max-shard-size": max_shard_size, "--force": force or None}
        if (extra := next((name for name, value in given.items() if value is not None), None)) is not None:
            raise UsageError(f"--list does not go with {extra}", "it writes nothing", f"leave {extra} out")
        _show_list(artifact, rest, output)
        return
    if out is None or format is None:
        missing = "OUT" if out is None else "--format"
        step = f"qwen-quant export {artifact} --list says which formats suit it"
        raise UsageError(f"{missing} is missing", next_step=step)

    from qwen_quant.export.export import ExportJob, export_artifact
    from qwen_quant.export.formats import find_format
    from qwen_quant.preparation import check_output

    find_format(format)
    check_output(out, force=run.force)
    found = options.find_model(artifact, output)
    split = None if max_shard_size is None else run.max_shard_size_bytes  # GGUF is one file unless this was asked for
    job = ExportJob(found.path, out, format, rest, allow_inexact, run, found.source_id, found.revision, split)
    with running(output) as progress:
        result = export_artifact(job, progress)
    show(Report("export", to_json(result), report_parts(result)), output)


def _show_list(artifact: str, rest: str | None, output: Output) -> None:
    """--list: one row a format."""
    from qwen_quant.export.export import offers
    from qwen_quant.export.formats import all_formats
    from qwen_quant.export.source import ExportSource

    source = ExportSource(options.find_model(artifact, output).path)
    rows, facts = offers(source, all_formats(), rest), source.facts
    grid = {
        "kind": source.layout.kind,
        "bits": facts.bits,
        "group_size": facts.group_size,
        "sym": facts.sym,
        "act_order": bool(facts.act_order),
    }
    data = {"artifact": artifact, **grid, "formats": to_json(rows)}
    words = ", ".join(f"{key} {str(value).lower()}" for key, value in grid.items() if key != "kind")
    show(Report("export", data, (f"{artifact}: {source.layout.kind}, {words}", *list_parts(rows))), output)


def list_parts(rows: tuple[FormatOffer, ...]) -> tuple[str | Table, ...]:
    """The offers for people: a table, and a line for each that is not exact."""
    size = {row.name: "" if row.weight_bytes is None else format_bytes(row.weight_bytes) for row in rows}
    cells = tuple((row.name, _verdict(row), size[row.name], ", ".join(row.runtimes)) for row in rows)
    reasons = tuple(
        f"{row.name}: {reason.what}: {reason.why}; use {reason.nearest}" for row in rows for reason in row.reasons
    )
    return Table("formats", ("format", "holds it", "size", "read by"), cells, text_columns=4), *reasons


def _verdict(row: FormatOffer) -> str:
    if row.exact:
        return "exactly"
    if not row.possible:
        return "no"
    largest = sum(reason.max_error or 0.0 for reason in row.reasons)
    return f"within {largest:.3g}" if largest else "weights only"


def report_parts(result: ExportResult) -> tuple[str | Table, ...]:
    """The result for people: what was made, the proof, what it cost."""
    symmetry = "symmetric" if result.sym else "asymmetric"
    headline = (
        f"{result.out}: {result.format} from {result.source_kind}, {result.bits} bit, group_size {result.group_size}, "
        f"{symmetry}{', act-order' if result.act_order else ''}"
    )
    inexact = tuple(f"WARNING: {reason.what}: {reason.why}" for reason in result.inexact)
    dropped = tuple(_left_out(result.dropped))
    costs = (
        f"{format_bytes(result.output_bytes)} in {len(result.files)} files, {format_seconds(result.seconds)} "
        f"(writing {format_seconds(result.write_seconds)}, reading back {format_seconds(result.verify_seconds)}), "
        f"peak memory {format_bytes(result.peak_memory_bytes)}"
    )
    return headline, *inexact, *result.notes, *dropped, _proof(result), f"read by: {', '.join(result.runtimes)}", costs


def _left_out(dropped: dict[str, str]) -> Iterator[str]:
    """One line for each reason."""
    for why in dict.fromkeys(dropped.values()):
        names = [name for name, reason in dropped.items() if reason == why]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"left out: {names[0]}{more} ({why})"


def _proof(result: ExportResult) -> Table:
    proof = result.proof
    rows = (
        ("read back with", result.read_with),
        ("linears equal to the source's", f"{proof.equal_linears} of {proof.linears}"),
        ("weights compared", format_count(proof.weights)),
        ("largest difference of a dequantized weight", f"{proof.max_abs_difference:.3g}"),
        *([("in", proof.worst_linear)] if proof.worst_linear else []),
        ("other tensors compared", f"{proof.kept_tensors} ({format_count(proof.kept_values)} values)"),
        ("largest difference of them", f"{proof.kept_max_abs_difference:.3g}"),
    )
    return Table("proof", ("", ""), rows)
