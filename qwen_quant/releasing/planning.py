"""`release --dry-run`: what would run, and what it would take where that can be predicted. Nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from qwen_quant import bnb_plan
from qwen_quant.environment import free_disk_bytes, memory_bytes
from qwen_quant.errors import QwenQuantError
from qwen_quant.hub.download import SOURCES, parse_repo
from qwen_quant.hub.failures import client_errors
from qwen_quant.hub.plan_files import select
from qwen_quant.plan import make_plan
from qwen_quant.releasing.ahead import check_formats
from qwen_quant.releasing.making import DOWNLOAD, artifact_folder, bnb_job, gptq_job
from qwen_quant.releasing.records import Record, file_facts, read_record, why_run
from qwen_quant.releasing.settings import ReleaseRecipe, local_source, targets_of
from qwen_quant.releasing.stage import Context, Stage
from qwen_quant.units import format_bytes, format_seconds

WOULD_RUN, UNCHANGED, LEFT_OUT, NOT_ASKED = "would run", "unchanged", "left out", "not asked for"
NOT_PREDICTED = "not predicted"
_UNTOLD = "the hub does not say what it would fetch ({})"


@dataclass(frozen=True)
class Prediction:
    """What a stage would take; None is "not predicted", and `why` says why not.

    Attributes:
        seconds: of wall time on this machine.
        peak_memory_bytes: of host memory. disk_bytes: while it runs. output_bytes: of what stays.
    """

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    disk_bytes: int | None = None
    output_bytes: int | None = None
    why: str = ""


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan.

    Attributes:
        status: "would run", "unchanged", "left out" or "not asked for". reason: why.
        prediction: what it would take.
        earlier_seconds: what it took the last time in this work folder; None where it never ran there.
    """

    name: str
    status: str
    reason: str
    prediction: Prediction = field(default_factory=Prediction)
    earlier_seconds: float | None = None


@dataclass(frozen=True)
class ReleasePlan:
    """The plan of a release. Sizes are bytes; `problems` is what would stop it as far as can be seen now."""

    recipe: str
    model: str
    repo: str
    work: Path
    stages: tuple[StagePlan, ...]
    free_disk_bytes: int
    free_memory_bytes: int
    problems: tuple[str, ...]


def plan_stages(
    context: Context, stages: tuple[Stage, ...], skipped: Callable[[Stage], str], until: str
) -> ReleasePlan:
    """Walk the stages without running them; `skipped` says why one is not asked for.

    Once a stage would run, whether the output of a later one changes is not known: such a stage "would run".
    """
    rows: list[StagePlan] = []
    first, reached = "", True
    for stage in stages:
        if (why_not := skipped(stage)) != "" or not reached:
            rows.append(StagePlan(stage.name, LEFT_OUT if why_not else NOT_ASKED, why_not or f"--until {until}"))
            continue
        record = read_record(context.work, stage.name)
        reason = f"{first} runs before it" if first else why_run(record, stage.inputs(context), context.work)
        if record is not None and not reason:
            context.records[stage.name] = record
            rows.append(StagePlan(stage.name, UNCHANGED, "", Prediction(0.0), record.seconds))
        else:
            prediction = _predict(stage, context)
            rows.append(StagePlan(stage.name, WOULD_RUN, reason, prediction, record.seconds if record else None))
            first = first if first or stage.name in context.records else stage.name
        reached = stage.name != until
    return _finished(context, tuple(rows))


def _finished(context: Context, rows: tuple[StagePlan, ...]) -> ReleasePlan:
    disk, memory = free_disk_bytes(context.work), memory_bytes()[1]
    need = sum(row.prediction.disk_bytes or 0 for row in rows)
    peak = max((row.prediction.peak_memory_bytes or 0 for row in rows), default=0)
    problems = []
    if need > disk:
        problems.append(f"{format_bytes(need)} of disk are needed, {format_bytes(disk)} are free in {context.work}")
    if memory and peak > memory:
        problems.append(f"{format_bytes(peak)} of memory are needed, {format_bytes(memory)} are free")
    recipe = context.recipe
    return ReleasePlan(str(recipe.path), recipe.model, context.repo, context.work, rows, disk, memory, tuple(problems))


def _predict(stage: Stage, context: Context) -> Prediction:
    """What a stage would take, from what is known before it runs."""
    if stage.name == "download":
        return _predict_download(context)
    if stage.name == "export" and context.recipe.release.kind in context.records:
        return _predict_export(context)
    if stage.name not in ("gptq", "bnb"):
        return Prediction(why="it depends on the artifact and on this machine")
    if "download" not in context.records:
        return Prediction(why="the source is not here yet: --until download fetches it")
    return _predict_gptq(context, stage) if stage.name == "gptq" else _predict_bnb(context)


def _predict_download(context: Context) -> Prediction:
    """A local folder is only hashed, which happens here and now: later stages need to know what it holds."""
    if local_source(context.recipe.model) is None:
        return _predict_fetch(context.recipe)
    inputs = DOWNLOAD.inputs(context)
    made = DOWNLOAD.run(context, inputs, lambda label, done, total: None)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = file_facts(made.folder, made.names)
    context.records["download"] = Record(
        "download", inputs, str(made.folder), facts, (), made.figures, made.summary, 0.0, now
    )
    return Prediction(disk_bytes=0, output_bytes=0, why="nothing is fetched: the files are hashed")


def _predict_fetch(recipe: ReleaseRecipe) -> Prediction:
    """The size of what would be fetched, where the hub answers; what is in its cache already counts too."""
    repo, revision = parse_repo(recipe.model)
    hub = SOURCES[recipe.release.source]()
    try:
        size = select(hub.listing(repo, revision)).size
    except QwenQuantError as error:
        return Prediction(why=_UNTOLD.format(error))
    except client_errors() as error:
        return Prediction(why=_UNTOLD.format(hub.failure(recipe.model, error)))
    finally:
        hub.close()
    return Prediction(disk_bytes=size, output_bytes=size, why="the rate of the connection is not known")


def _predict_gptq(context: Context, stage: Stage) -> Prediction:
    """`qwen-quant plan`: one block of each kind is timed."""
    check_formats(context.recipe, context.folder("download"))
    found = make_plan(gptq_job(context, artifact_folder(context, stage.inputs(context))))
    return Prediction(found.seconds, found.peak_memory_bytes, found.disk_bytes, found.output_bytes)


def _predict_bnb(context: Context) -> Prediction:
    """Sizes from the plan of every byte."""
    with tempfile.TemporaryDirectory(prefix="qwen-quant-plan-") as place:
        ready = bnb_plan.prepare(bnb_job(context, Path(place) / "out"))
    offsets = dict.fromkeys(ready.accounting.quantized, 1.0) if ready.job.bnb.double_quant else {}
    size = sum(shard.nbytes for shard in bnb_plan.plan(ready, offsets))
    return Prediction(disk_bytes=size, output_bytes=size, why="its speed is the disk's")


def _predict_export(context: Context) -> Prediction:
    """Sizes of every format, from the headers of the artifact."""
    from qwen_quant.export.formats import ExportOptions, find_format
    from qwen_quant.export.source import ExportSource

    source = ExportSource(context.folder(context.recipe.release.kind))
    options = ExportOptions(max_shard_size_bytes=context.recipe.base.run.max_shard_size_bytes)
    rows = targets_of(context.recipe, context.repo)
    size = sum(find_format(row.format).plan(source, options).weight_bytes for row in rows)
    where = ", ".join(f"{row.format} for {row.repo_id}" if context.repo else row.format for row in rows)
    return Prediction(disk_bytes=size, output_bytes=size, why=f"its speed is the disk's ({where})")


def prediction_text(row: StagePlan) -> tuple[str, str, str, str]:
    """(time, memory, disk, output) of a row for people; "-" where there is nothing to predict."""
    if row.status != WOULD_RUN:
        return ("-", "-", "-", "-")
    found = row.prediction
    seconds = NOT_PREDICTED if found.seconds is None else f"about {format_seconds(found.seconds)}"
    sizes = (found.peak_memory_bytes, found.disk_bytes, found.output_bytes)
    memory, disk, output = (NOT_PREDICTED if size is None else format_bytes(size) for size in sizes)
    return (seconds, memory, disk, output)


def plan_notes(plan: ReleasePlan) -> tuple[str, ...]:
    """Why each missing prediction is missing, and what stages took the last time."""
    lines = []
    for row in plan.stages:
        if row.status == WOULD_RUN and row.prediction.seconds is None:
            last = (
                "" if row.earlier_seconds is None else f"; it took {format_seconds(row.earlier_seconds)} the last time"
            )
            lines.append(f"{row.name}: {NOT_PREDICTED}, {row.prediction.why}{last}")
    return tuple(lines)
