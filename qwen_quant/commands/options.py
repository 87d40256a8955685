"""Option types that several commands share, and what a command line and `qwen-quant.toml` mean together.

Options default to None, "not given": the recipe in the working directory fills them in, then the built-in default. The
help texts name the built-in default in round brackets.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from qwen_quant.console import Output, note, running
from qwen_quant.errors import UsageError
from qwen_quant.hub.download import ModelSource, resolve_model
from qwen_quant.recipe import (
    RECIPE_NAME,
    CalibrationConfig,
    GateConfig,
    GPTQConfig,
    Recipe,
    RunConfig,
    ValidationConfig,
    load_recipe,
    parse_size,
)

if TYPE_CHECKING:
    from qwen_quant.preparation import QuantizeJob

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"checkpoint folder or hub id org/name[@revision] (model in {RECIPE_NAME})"),
]
Out = Annotated[str | None, typer.Argument(metavar="OUT", help=f"folder to write (out in {RECIPE_NAME})")]
Bits = Annotated[int | None, typer.Option("--bits", metavar="2|3|4|8", help="bits per weight (4)")]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", metavar="-1|32|64|128", help="input columns per scale; -1: one group per row (128)"),
]
Sym = Annotated[
    bool | None,
    typer.Option("--sym/--asym", help="symmetric grid, or a zero point per group (sym)", show_default=False),
]
DescAct = Annotated[
    bool | None,
    typer.Option(
        "--desc-act/--no-desc-act",
        help="let groups follow the activation order; only kernels that read g_idx can run it (no)",
        show_default=False,
    ),
]
DampPercent = Annotated[
    float | None, typer.Option("--damp-percent", help="fraction of the mean Hessian diagonal added to it (0.01)")
]
Order = Annotated[
    Literal["activation", "column"] | None,
    typer.Option("--order", help="order in which columns are solved; groups stay where they are (activation)"),
]
Scales = Annotated[
    Literal["search", "minmax"] | None,
    typer.Option("--scales", help="Hessian-weighted search of each scale, or the plain range (search)"),
]
AsymmetricCalibration = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric-calibration/--no-asymmetric-calibration",
        help="solve against the inputs of the full-precision model; 'no' saves time (yes)",
        show_default=False,
    ),
]
CheckpointFormat = Annotated[
    Literal["gptq", "gptq_v2"] | None,
    typer.Option("--format", help="qzeros hold zero-1 (gptq), as every runtime reads, or zero (gptq_v2) (gptq)"),
]
ExpertPolicy = Annotated[
    Literal["route-all", "pool", "round"] | None,
    typer.Option(
        "--expert-policy",
        help="a routed expert with too few tokens: give it all, give it some of the layer's, or round it (route-all)",
    ),
]
ExpertMinTokens = Annotated[
    int | None,
    typer.Option("--expert-min-tokens", help="fewest tokens per group of an expert's input columns (64)"),
]
RoundingOnly = Annotated[
    bool | None, typer.Option("--rounding-only", help="no GPTQ, only rounding: the baseline row", show_default=False)
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="FILE|bundled", help=".json, .jsonl or .txt file, or the bundled mix (bundled)"
    ),
]
NumSamples = Annotated[int | None, typer.Option("--num-samples", help="rows of calibration text (128)")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="tokens per row (2048)")]
Seed = Annotated[int | None, typer.Option("--seed", help="picks and orders the rows (0)")]
Device = Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option("--device", help="where to compute (auto)")]
MaxShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", help="largest file to write, e.g. 500MB (2GB)")
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume", help="continue an unfinished run of the same OUT (resume)", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="replace what is there, once the new one is complete")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print the result and errors only")]

Config = TypeVar("Config", GPTQConfig, CalibrationConfig, RunConfig, ValidationConfig, GateConfig)


def project_recipe(output: Output) -> Recipe:
    """The recipe of the working directory, or the built-in defaults when there is none."""
    path = Path(RECIPE_NAME)
    if not path.is_file():
        return Recipe()
    note(f"using {path.absolute()}", output)
    return load_recipe(path)


def override(config: Config, **given: Any) -> Config:
    """`config` with every option that was given (is not None) put in its place; the result validates itself."""
    return dataclasses.replace(config, **{key: value for key, value in given.items() if value is not None})


def override_run(config: RunConfig, max_shard_size: str | None = None, **given: Any) -> RunConfig:
    """`override` of a RunConfig, with the shard size still as text ("2GB")."""
    size = None if max_shard_size is None else parse_size(max_shard_size)
    return override(config, max_shard_size_bytes=size, **given)


def required(value: str | None, name: str) -> str:
    """An argument that the command line or the recipe has to give (UsageError when neither does)."""
    if value:
        return value
    exists = Path(RECIPE_NAME).is_file()
    raise UsageError(
        f"{name.upper()} is missing",
        f"{RECIPE_NAME} here does not set '{name}'" if exists else f"there is no {RECIPE_NAME} in this folder",
        f"give {name.upper()} on the command line, or set '{name}' in {RECIPE_NAME}"
        + ("" if exists else " (qwen-quant init writes one)"),
    )


def find_model(model: str, output: Output) -> ModelSource:
    """The folder of a model argument; says on stderr what is fetched from where."""
    with running(output) as progress:
        source = resolve_model(model, progress)
    if source.revision is not None:
        note(f"{source.source_id} at commit {source.revision}", output)
    return source


def make_job(recipe: Recipe, source: ModelSource, out: Path) -> QuantizeJob:
    """The job that the stages take, from a recipe whose options have been overridden."""
    from qwen_quant.preparation import QuantizeJob

    return QuantizeJob(
        model=source.path,
        out=out,
        gptq=recipe.gptq,
        calibration=recipe.calibration,
        run=recipe.run,
        source_id=source.source_id,
        revision=source.revision,
    )
