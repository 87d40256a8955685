"""`qwen-quant validate`: how far an artifact is from its baseline, with gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.errors import GateError
from qwen_quant.recipe import ValidationConfig
from qwen_quant.results import ValidationResult, to_json
from qwen_quant.units import format_bytes, format_seconds

Quantized = Annotated[
    str | None, typer.Argument(metavar="OUT", help="quantized folder or hub id (out in qwen-quant.toml)")
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", metavar="MODEL", help="what it was made from (model in qwen-quant.toml)")
]
Text = Annotated[
    str,
    typer.Option("--text", metavar="FILE|bundled", help="UTF-8 text to score, or the bundled one", show_default=True),
]
Window = Annotated[int, typer.Option("--window", help="tokens per window; windows do not overlap")]
MaxWindows = Annotated[int | None, typer.Option("--max-windows", help="score only the first windows (all)")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="where to compute")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="gate: largest mean KL divergence, nats per token")]
MaxRatio = Annotated[
    float | None, typer.Option("--max-perplexity-ratio", help="gate: largest perplexity ratio, quantized / baseline")
]
MinTop1 = Annotated[float | None, typer.Option("--min-top1", help="gate: least top-1 agreement, 0 to 1")]


def validate(
    quantized: Quantized = None,
    baseline: Baseline = None,
    text: Text = "bundled",
    window: Window = 1024,
    max_windows: MaxWindows = None,
    device: Device = "auto",
    max_kl: MaxKl = None,
    max_perplexity_ratio: MaxRatio = None,
    min_top1: MinTop1 = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare a quantized folder with its baseline: perplexity of both, KL divergence, top-1 agreement.

    The exit code is 4 when a gate fails; the result is printed all the same.

    \b
    Examples:
      qwen-quant validate ./Qwen2.5-0.5B-Int4 --baseline ./Qwen2.5-0.5B
      qwen-quant validate ./out --baseline Qwen/Qwen3-0.6B --text wiki.test.txt --window 1024 --max-windows 16
      qwen-quant validate ./out --baseline ./model --max-kl 0.1 --min-top1 0.85 --json
    """
    output = Output(json=json, quiet=quiet)
    config = ValidationConfig(None if text == "bundled" else Path(text), window, max_windows, device)
    recipe = options.project_recipe(output)
    target_name = options.required(quantized or recipe.out, "out")
    if not (baseline or recipe.model):
        raise typer.BadParameter("it is required: the checkpoint OUT was made from", param_hint="'--baseline'")
    target = options.find_model(target_name, output)
    source = options.find_model(baseline or options.required(recipe.model, "model"), output)

    from qwen_quant.evaluation.gates import check_gates
    from qwen_quant.evaluation.validate import validate_pair

    with running(output) as progress:
        result = validate_pair(source.path, target.path, config, progress)
    error: GateError | None = None
    try:
        check_gates(result, max_kl, max_perplexity_ratio, min_top1)
    except GateError as failed:
        error = failed
    limits = {"max_kl": max_kl, "max_perplexity_ratio": max_perplexity_ratio, "min_top1": min_top1}
    gates = {"limits": limits, "passed": error is None}
    show(Report("validate", {**to_json(result), "gates": gates}, report_parts(result)), output, error)
    if error is not None:
        raise typer.Exit(error.exit_code)


def report_parts(result: ValidationResult) -> tuple[str | Table, ...]:
    """The comparison as people read it, with its protocol in the line above."""
    protocol = (
        f"{result.dataset} (sha256 {result.dataset_sha256[:16]}): {result.windows} windows of "
        f"{result.window_tokens} tokens, {result.perplexity.tokens} scored; "
        f"{format_seconds(result.seconds)}, peak {format_bytes(result.peak_memory_bytes)}"
    )
    divergence = result.divergence
    tail = (
        f"KL divergence per token: median {divergence.kl_median:.4g}, p90 {divergence.kl_p90:.4g}, "
        f"p99 {divergence.kl_p99:.4g}, max {divergence.kl_max:.4g}"
    )
    return (protocol, comparison_table(result), tail)


def comparison_table(result: ValidationResult) -> Table:
    """Baseline and quantized side by side: size, perplexity, KL divergence, top-1 agreement."""
    pair, divergence = result.perplexity, result.divergence
    rows = (
        ("size", format_bytes(result.baseline_bytes), format_bytes(result.quantized_bytes)),
        ("perplexity", f"{pair.baseline:.3f}", f"{pair.quantized:.3f}"),
        ("KL divergence", "0", f"{divergence.kl_mean:.4f}"),
        ("top-1 agreement", "100%", f"{100 * divergence.top1_agreement:.2f}%"),
    )
    return Table("", ("", "baseline", "quantized"), rows)
