"""`qwen-quant release`: one recipe from the source to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, note, running, show
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qwen_quant.release import ReleaseJob, ReleaseResult
    from qwen_quant.releasing.planning import ReleasePlan

WORK_PARENT = "release-work"
_CUT = 70

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="what to release and how (recipes/*.toml)")]
Until = Annotated[
    str, typer.Option("--until", metavar="STAGE", help="stop after this stage: download, gptq, validate, ... (all)")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would run and what it would take; write nothing")]
Work = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help=f"where everything is kept ({WORK_PARENT}/RECIPE)")
]
Repo = Annotated[str, typer.Option("--repo", metavar="ORG/NAME", help="where to push (repo in the recipe)")]
NoPush = Annotated[bool, typer.Option("--no-push", help="do everything but push")]


def release(
    recipe: RecipeFile,
    until: Until = "",
    dry_run: DryRun = False,
    work: Work = None,
    repo: Repo = "",
    no_push: NoPush = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download, quantize, validate, profile, check the gates, write the card and push, as one recipe says.

    A stage is skipped when nothing that it depends on has changed since it last ran in the same work folder; a release
    that was killed continues when the same command is run again. When a gate fails, the exit code is 4 and nothing is
    pushed. What was done and measured is in release.json in the work folder.

    \b
    Examples:
      qwen-quant release recipes/demo.toml --no-push
      qwen-quant release recipes/Qwen3-8B.toml --dry-run
      qwen-quant release recipes/Qwen3-8B.toml --repo me/Qwen3-8B-GPTQ-Int4
      qwen-quant release recipes/Qwen3-8B.toml --until gate --work /data/release --json
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.release import ReleaseJob, plan_release, run_release
    from qwen_quant.releasing.settings import load_release

    settings = load_release(recipe)
    place = work or Path(WORK_PARENT) / recipe.stem
    job = ReleaseJob(settings, place.absolute(), repo, push=not no_push, until=until)
    if dry_run:
        with running(output):
            plan = plan_release(job)
        show(Report("release", {"dry_run": True, **to_json(plan)}, plan_parts(plan)), output)
        return
    with running(output) as progress:
        result = run_release(job, progress, lambda text: note(text, output))
    show(Report("release", _data(result), report_parts(result, job)), output, result.error)
    if result.error is not None:
        raise typer.Exit(result.error.exit_code)


def _data(result: ReleaseResult) -> dict[str, Any]:
    """release.json's fields under --json; the console adds the error itself."""
    from qwen_quant.release import release_json

    return {key: value for key, value in release_json(result).items() if key != "error"}


def report_parts(result: ReleaseResult, job: ReleaseJob) -> tuple[str | Table, ...]:
    """The one summary table, and where everything lies."""
    from qwen_quant.release import RESULT_FILE

    rows = tuple(
        (
            row.name,
            row.status,
            "-" if row.seconds is None else format_seconds(row.seconds),
            _what(row.summary, row.reason),
        )
        for row in result.stages
    )
    table = Table(f"release of {result.model}", ("stage", "status", "time", ""), rows, text_columns=4)
    lines = [f"artifact: {result.artifact}"] if result.artifact else []
    if job.push and result.repo:
        lines.append(f"repository: {result.repo}")
    return (table, *lines, f"details: {result.work / RESULT_FILE}; this run took {format_seconds(result.seconds)}")


def _what(summary: str, reason: str) -> str:
    text = summary or reason
    return text if len(text) <= _CUT else text[: _CUT - 3] + "..."


def plan_parts(plan: ReleasePlan) -> tuple[str | Table, ...]:
    """The plan as a table, why figures are missing, and what would stop it."""
    from qwen_quant.releasing.planning import plan_notes, prediction_text

    rows = tuple((row.name, row.status, *prediction_text(row), _what(row.reason, "")) for row in plan.stages)
    columns = ("stage", "", "time", "memory", "disk", "output", "why")
    table = Table(f"plan of {plan.recipe}: {plan.model}", columns, rows, text_columns=2)
    free = f"free: {format_bytes(plan.free_disk_bytes)} of disk, {format_bytes(plan.free_memory_bytes)} of memory"
    problems = tuple(f"PROBLEM: {line}" for line in plan.problems)
    return (table, *plan_notes(plan), free, *problems)
