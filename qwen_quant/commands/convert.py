"""`qwen-quant convert`: a first-generation checkpoint as one that every current runtime serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.recipe import RunConfig
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qwen_quant.convert import ConvertResult

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="first-generation folder or hub id org/name[@revision] (16-bit or GPTQ)")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")]
To = Annotated[Literal["qwen2"], typer.Option("--to", help="what to write")]


def convert(
    model: Model,
    out: Out,
    to: To,
    max_shard_size: options.MaxShardSize = None,
    resume: options.Resume = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a first-generation Qwen checkpoint under Qwen2's names, with the same numbers in every tensor.

    Takes 16-bit and GPTQ folders, and writes weights, config.json, tokenizer.json, chat template and
    generation_config.json, so that current runtimes load OUT without remote code. It proves the result: every tensor
    is read back and compared by sha256, and both models must give the same logits.

    The copy is exact up to the trained length (seq_length). Past it Qwen-1.8B, 7B and 14B use dynamic NTK and LogN,
    which Qwen2 does not have; Qwen-72B uses neither and stays exact at any length.

    \b
    Examples:
      qwen-quant convert ./Qwen-7B-Chat ./Qwen-7B-Chat-qwen2 --to qwen2
      qwen-quant convert Qwen/Qwen-14B-Chat-Int4 ./out --to qwen2 --json
    """
    output = Output(json=json, quiet=quiet)
    run = options.override_run(RunConfig(), max_shard_size, resume=resume, force=force or None)

    from qwen_quant.convert import ConvertJob, convert_to_qwen2
    from qwen_quant.preparation import check_output

    check_output(out, force=run.force)
    found = options.find_model(model, output)
    with running(output) as progress:
        result = convert_to_qwen2(ConvertJob(found.path, out, found.source_id, found.revision, run), progress)
    show(Report("convert", to_json(result), report_parts(result)), output)


def report_parts(result: ConvertResult) -> tuple[str | Table, ...]:
    """The result for people: what was made, its limit, the proof, what it cost."""
    headline = f"{result.out}: {result.to}, {result.kind}, {format_count(result.parameters)} parameters"
    limit = () if result.exact_up_to_tokens is not None else ("exact at any length: no dynamic NTK, no LogN",)
    warnings = tuple(f"WARNING: {line}" for line in result.warnings)
    costs = (
        f"{format_bytes(result.output_bytes)} of weights in {format_seconds(result.seconds)}, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}"
    )
    return (headline, *limit, *warnings, _proof(result), costs)


def _proof(result: ConvertResult) -> Table:
    logits = result.logits
    whole = sum(len(record.targets) == 1 for record in result.tensors)
    split = sum(record.how.startswith("split") for record in result.tensors)
    shared = len(result.tensors) - whole - split
    dropped = [(f"left out ({why})", str(n)) for why, n in _counts(result.dropped).items()]
    rows = (
        ("tensors of MODEL accounted for", f"{len(result.tensors) + len(result.dropped)} of {result.source_tensors}"),
        ("unchanged, sha256 equal", str(whole)),
        ("split into q, k, v; sha256 equal when joined again", str(split)),
        *([("shared by q, k, v; sha256 equal", str(shared))] if shared else []),
        *dropped,
        ("tensors of OUT", str(result.output_tensors)),
        (f"largest difference of a logit ({logits.tokens} tokens)", f"{logits.largest_difference:.2e}"),
        ("FP32 noise of the same logits", f"{logits.fp32_noise:.2e}"),
        ("largest logit", f"{logits.largest_logit:.2f}"),
        ("same top token", f"{logits.same_top_token} of {logits.tokens}"),
    )
    return Table("proof", ("", ""), rows)


def _counts(dropped: dict[str, str]) -> dict[str, int]:
    """Reason -> how many tensors it drops."""
    reasons = list(dropped.values())
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
