"""`qwen-quant gptq`: checkpoint in, Int4 artifact out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, note, running, show
from qwen_quant.recipe import GPTQConfig
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qwen_quant.sequential import QuantizeResult

WORST_LAYERS = 5


def gptq(
    model: options.Model = None,
    out: options.Out = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    sym: options.Sym = None,
    desc_act: options.DescAct = None,
    damp_percent: options.DampPercent = None,
    order: options.Order = None,
    scales: options.Scales = None,
    asymmetric_calibration: options.AsymmetricCalibration = None,
    checkpoint_format: options.CheckpointFormat = None,
    rounding_only: options.RoundingOnly = None,
    expert_policy: options.ExpertPolicy = None,
    expert_min_tokens: options.ExpertMinTokens = None,
    calibration: options.Calibration = None,
    num_samples: options.NumSamples = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = None,
    device: options.Device = None,
    max_shard_size: options.MaxShardSize = None,
    resume: options.Resume = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a Qwen checkpoint with GPTQ, one decoder block in memory at a time.

    An interrupted run continues when the same command is run again. OUT appears only when it is complete and every
    parameter of MODEL is accounted for. MODEL and OUT default from qwen-quant.toml in the working directory; options
    given here override it.

    \b
    Examples:
      qwen-quant gptq ./Qwen2.5-0.5B ./Qwen2.5-0.5B-Int4 --bits 4
      qwen-quant gptq Qwen/Qwen3-0.6B@main ./out --group-size 64 --calibration chats.jsonl
      qwen-quant gptq                          # MODEL, OUT and settings from qwen-quant.toml
      qwen-quant gptq ./model ./out --json --quiet > result.json
    """
    output = Output(json=json, quiet=quiet)
    recipe = options.project_recipe(output)
    recipe = dataclasses.replace(
        recipe,
        gptq=options.override(
            recipe.gptq,
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=desc_act,
            damp_percent=damp_percent,
            order=order,
            scales=scales,
            asymmetric_calibration=asymmetric_calibration,
            checkpoint_format=checkpoint_format,
            rounding_only=rounding_only,
            expert_policy=expert_policy,
            expert_min_tokens=expert_min_tokens,
        ),
        calibration=options.override(
            recipe.calibration, source=calibration, num_samples=num_samples, seq_len=seq_len, seed=seed
        ),
        run=options.override_run(recipe.run, max_shard_size, device=device, resume=resume, force=force or None),
    )
    target = Path(options.required(out or recipe.out, "out"))
    name = options.required(model or recipe.model, "model")

    from qwen_quant.preparation import check_output
    from qwen_quant.sequential import quantize_checkpoint

    check_output(target, force=recipe.run.force)
    job = options.make_job(recipe, options.find_model(name, output), target)
    with running(output) as progress:
        result = quantize_checkpoint(job, progress, lambda estimate: note("\n".join(estimate.lines), output))
    show(Report("gptq", to_json(result), report_parts(result, recipe.gptq)), output)


def report_parts(result: QuantizeResult, config: GPTQConfig) -> tuple[str | Table, ...]:
    """What a person wants to read of a finished run: what was made, what it cost, and the layers furthest off."""
    grid = "sym" if config.sym else "asym"
    quantized, kept = format_count(result.quantized_parameters), format_count(result.kept_parameters)
    headline = f"{result.out}: Int{config.bits}, group_size {config.group_size}, {grid}"
    counts = f"{len(result.layers)} linears ({quantized} parameters) quantized, {kept} parameters kept in 16 bit"
    tokens = f"{result.tokens} calibration tokens, sha256 {result.calibration_sha256[:16]}"
    warnings = tuple(f"warning: {line}" for line in result.warnings)
    return (headline, counts, tokens, *warnings, _costs(result), *_worst(result))


def _costs(result: QuantizeResult) -> Table:
    estimate = result.predicted
    rows = (
        ("source size", "-", format_bytes(result.source_bytes)),
        ("output size", format_bytes(estimate.output_bytes), format_bytes(result.output_bytes)),
        ("peak memory", format_bytes(estimate.peak_memory_bytes), format_bytes(result.peak_memory_bytes)),
        ("time", format_seconds(estimate.seconds), format_seconds(result.seconds)),
    )
    return Table("", ("", "predicted", "actual"), rows)


def _worst(result: QuantizeResult) -> tuple[Table, ...]:
    layers = sorted(result.layers, key=lambda layer: -layer.relative_error)[:WORST_LAYERS]
    rows = tuple(
        (layer.name, f"{layer.relative_error:.4f}", f"{layer.rounding_error:.4f}", f"{layer.damp_percent:g}")
        for layer in layers
    )
    columns = ("layer", "relative error", "plain rounding", "damp_percent")
    return (Table("layers furthest from the source", columns, rows),) if rows else ()
