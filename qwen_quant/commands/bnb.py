"""`qwen-quant bnb`: checkpoint in, bitsandbytes folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qwen_quant.bnb_convert import BnbResult

WORST_LINEARS = 5

QuantType = Annotated[
    Literal["nf4", "fp4", "int8"] | None, typer.Option("--quant-type", help="what the linears become (nf4)")
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant", help="4 bit: quantize the scales of the blocks too (no)", show_default=False
    ),
]
BlockSize = Annotated[
    int | None, typer.Option("--block-size", metavar="64..4096", help="4 bit: weights that share a scale (64)")
]
ComputeDtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    typer.Option("--compute-dtype", help="4 bit: what a runtime multiplies in (bf16)"),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PATTERN",
        help="keep these modules in 16 bit: the end of a name, its beginning or a regular expression; repeat for more",
    ),
]
Int8Threshold = Annotated[
    float | None, typer.Option("--int8-threshold", help="int8: larger activations are multiplied in 16 bit (6.0)")
]


def bnb(
    model: options.Model = None,
    out: options.Out = None,
    quant_type: QuantType = None,
    double_quant: DoubleQuant = None,
    block_size: BlockSize = None,
    compute_dtype: ComputeDtype = None,
    skip: Skip = None,
    int8_threshold: Int8Threshold = None,
    max_shard_size: options.MaxShardSize = None,
    resume: options.Resume = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint as the bitsandbytes folder (NF4, FP4 or Int8) that transformers itself would save.

    No calibration, no GPU and no bitsandbytes are needed: tensors go from file to file one at a time. OUT loads with
    AutoModelForCausalLM.from_pretrained where bitsandbytes is installed. An interrupted run continues when the same
    command is run again. OUT appears only when it is complete and every parameter of MODEL is accounted for. Settings
    default from [bnb] of qwen-quant.toml in the working directory; options given here override them.

    \b
    Examples:
      qwen-quant bnb ./Qwen2.5-7B ./Qwen2.5-7B-nf4 --quant-type nf4 --double-quant
      qwen-quant bnb Qwen/Qwen3-0.6B@main ./out --quant-type int8
      qwen-quant bnb ./model ./out --quant-type nf4 --skip o_proj --skip model.layers.0
      qwen-quant bnb ./model ./out --json --quiet > result.json
    """
    output = Output(json=json, quiet=quiet)
    recipe = options.project_recipe(output)
    given: dict[str, Any] = {
        "quant_type": quant_type,
        "double_quant": double_quant,
        "block_size": block_size,
        "compute_dtype": compute_dtype,
        "skip": tuple(skip) if skip else None,
        "int8_threshold": int8_threshold,
    }
    config = dataclasses.replace(recipe.bnb, **{key: value for key, value in given.items() if value is not None})
    run = options.override_run(recipe.run, max_shard_size, resume=resume, force=force or None)
    target = Path(options.required(out or recipe.out, "out"))
    name = options.required(model or recipe.model, "model")

    from qwen_quant.bnb_convert import quantize_bnb
    from qwen_quant.bnb_plan import BnbJob
    from qwen_quant.preparation import check_output

    check_output(target, force=run.force)
    found = options.find_model(name, output)
    with running(output) as progress:
        result = quantize_bnb(BnbJob(found.path, target, config, run, found.source_id, found.revision), progress)
    show(Report("bnb", to_json(result), report_parts(result)), output)


def report_parts(result: BnbResult) -> tuple[str | Table, ...]:
    """What a person wants to read of a finished run: what was made, what it cost, and the linears furthest off."""
    details = "" if result.quant_type == "int8" else f", block size {result.block_size}"
    double = ", double quantization" if result.double_quant else ""
    headline = f"{result.out}: bitsandbytes {result.quant_type}{details}{double}"
    counts = (
        f"{len(result.linears)} linears ({format_count(result.quantized_parameters)} parameters) quantized, "
        f"{format_count(result.kept_parameters)} parameters kept in 16 bit"
    )
    skipped = () if result.skip_modules is None else (f"kept by name: {', '.join(result.skip_modules)}",)
    warnings = tuple(f"warning: {line}" for line in result.warnings)
    costs = (
        f"{format_bytes(result.source_bytes)} became {format_bytes(result.output_bytes)} in "
        f"{format_seconds(result.seconds)}, peak memory {format_bytes(result.peak_memory_bytes)}"
    )
    worst = sorted(result.linears, key=lambda linear: -linear.relative_error)[:WORST_LINEARS]
    rows = tuple((linear.name, f"{linear.relative_error:.4f}") for linear in worst)
    return (headline, counts, *skipped, *warnings, costs, Table("linears furthest off", ("linear", "error"), rows))
