"""`qwen-quant demo`: the main job on the checkpoint that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.commands.validate_report import comparison_table
from qwen_quant.console import Output, Report, Table, note, running, show
from qwen_quant.hub.download import ModelSource
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, Recipe, RunConfig, ValidationConfig
from qwen_quant.results import ValidationResult, to_json
from qwen_quant.units import format_seconds

if TYPE_CHECKING:
    from qwen_quant.sequential import QuantizeResult

DEMO_NAME = "demo_checkpoint"
DEMO_WINDOWS = 24
OutOption = Annotated[Path, typer.Option("--out", help="folder to write")]


def demo(
    out: OutOption = Path("demo-out"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize the small trained checkpoint inside this package and compare it with BF16. It needs no network.

    \b
    Examples:
      qwen-quant demo
      qwen-quant demo --out /tmp/demo --force
      qwen-quant demo --json --quiet
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.data import bundled_path
    from qwen_quant.evaluation.validate import validate_pair
    from qwen_quant.preparation import check_output
    from qwen_quant.sequential import quantize_checkpoint

    check_output(out, force=force)
    recipe = Recipe(
        gptq=GPTQConfig(group_size=64),
        calibration=CalibrationConfig("bundled", num_samples=64, seq_len=256),
        run=RunConfig(force=force),
    )
    source = ModelSource(bundled_path(DEMO_NAME), DEMO_NAME, None)
    with running(output) as progress:
        note(
            f"quantizing the bundled checkpoint into {out} (4 bit, group_size 64, 64 x 256 calibration tokens)", output
        )
        made = quantize_checkpoint(options.make_job(recipe, source, out), progress)
        note("comparing it with BF16 on the bundled evaluation text", output)
        compared = validate_pair(
            source.path, out, ValidationConfig(texts=("bundled:en",), max_windows=DEMO_WINDOWS, smoke=False), progress
        )
    data = {"quantize": to_json(made), "validate": to_json(compared)}
    show(Report("demo", data, report_parts(made, compared)), output)


def report_parts(made: QuantizeResult, compared: ValidationResult) -> tuple[str | Table, ...]:
    """The BF16 / Int4 table and the two times."""
    rows = comparison_table(compared, compared.texts[0]).rows
    times = f"quantized in {format_seconds(made.seconds)}, compared in {format_seconds(compared.seconds)}"
    return (Table("", ("", "BF16", "Int4"), rows), f"{times}; artifact: {made.out}")
