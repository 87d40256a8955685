"""`release`: one recipe from the source to the Hub, in stages that are skipped when nothing they depend on has changed.

Order: download, gptq or bnb, validate, profile, gate, export, card, push.  Each stage calls what the command of its
name calls, writes below one work folder and is remembered there (`releasing/records.py`).  A release that was killed
at any moment continues when the same command is run again.  `release.json` (schema `qwen-quant/release/1`, described
in docs/release.md) says after every stage what was done; a failed gate stops the release before anything is pushed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.manifest import versions
from qwen_quant.errors import QwenQuantError, UsageError
from qwen_quant.progress import ProgressFn
from qwen_quant.releasing.ahead import check_machine, check_push, problems_ahead
from qwen_quant.releasing.planning import ReleasePlan, plan_stages
from qwen_quant.releasing.records import (
    Made,
    Record,
    file_facts,
    inputs_sha256,
    locked,
    read_record,
    why_run,
    write_record,
)
from qwen_quant.releasing.settings import ReleaseRecipe, check_repo, targets_of
from qwen_quant.releasing.stage import Context, Stage
from qwen_quant.releasing.stages import STAGES
from qwen_quant.results import to_json
from qwen_quant.resume import write_json_atomically

SCHEMA = "qwen-quant/release/1"
RESULT_FILE = "release.json"
DONE, UNCHANGED, FAILED, RUNNING = "done", "unchanged", "failed", "running"
LEFT_OUT, NOT_REACHED = "left out", "not reached"

Announce = Callable[[str], None]


@dataclass(frozen=True)
class ReleaseJob:
    """One release.

    Attributes:
        recipe: its settings. work: folder for everything that it makes.
        repo: where to push, over the recipe's; "" is the recipe's. push: whether to push at all.
        until: the last stage to run; "" runs all.
    """

    recipe: ReleaseRecipe
    work: Path
    repo: str = ""
    push: bool = True
    until: str = ""


@dataclass(frozen=True)
class StageOutcome:
    """One row of release.json.

    Attributes:
        status: "done", "unchanged" (skipped), "failed", "left out" (by the recipe or the command line), "not reached".
            A release that was killed leaves the stage it was in as "running".
        reason: why it ran, was left out or failed.
        seconds: what making the output took, in whichever run that was; None where there is none.
        inputs_sha256: of everything that decided the output. inputs: the same, readable.
        folder: where the output lies. outputs: its files with their sha256.
        figures, summary: what was measured or made; in one line.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float | None = None
    inputs_sha256: str = ""
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: str = ""
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class ReleaseResult:
    """release.json (schema `qwen-quant/release/1`).

    Attributes:
        recipe, recipe_sha256: the file it was made from. model: as in it. repo: where it was pushed or will be.
        formats: format -> where it was pushed or will be ("" for nowhere).
        work: the work folder; artifact: the folder that is released ("" before it exists).
        stages: every stage in its order.
        complete: every stage that was asked for is done. error: what stopped it, None where nothing did.
        seconds: of this run.
    """

    recipe: str
    recipe_sha256: str
    model: str
    repo: str
    formats: dict[str, str]
    work: Path
    artifact: str
    stages: tuple[StageOutcome, ...]
    complete: bool
    error: QwenQuantError | None
    versions: dict[str, str]
    seconds: float


def stage_names(kind: str) -> tuple[str, ...]:
    """The stages of a release of this kind, in order."""
    other = {"gptq": "bnb", "bnb": "gptq"}[kind]
    return tuple(stage.name for stage in STAGES if stage.name != other)


def check_job(job: ReleaseJob) -> None:
    """Refuse what cannot be a release before any work (UsageError, InputError)."""
    names = stage_names(job.recipe.release.kind)
    if job.until and job.until not in names:
        raise UsageError(f"--until {job.until}: there is no such stage", next_step=f"use one of {', '.join(names)}")
    check_repo(job.repo)
    targets_of(job.recipe, target(job))


def target(job: ReleaseJob) -> str:
    """The repository of a job: the command line's, else the recipe's."""
    return job.repo or job.recipe.release.repo


def reached(job: ReleaseJob) -> tuple[str, ...]:
    """The stages that the job asks for."""
    names = stage_names(job.recipe.release.kind)
    wanted = names[: names.index(job.until) + 1] if job.until else names
    return tuple(name for name in wanted if name != "push" or job.push)


def run_release(job: ReleaseJob, progress: ProgressFn, announce: Announce) -> ReleaseResult:
    """Run every stage that has to run; `announce` gets one line a stage.

    What stops a release is in the result's `error`, with release.json written; an interruption and our own bugs are
    raised, after release.json is written too.

    Errors: UsageError and InputError before the first stage: a wrong job, or a work folder that is in use.
    """
    check_job(job)
    check_machine(job.recipe, reached(job))
    if "push" in reached(job):
        check_push(job.recipe, target(job))
    with locked(job.work):
        return _Run(job, progress, announce).to_the_end()


def make_context(job: ReleaseJob) -> Context:
    """The context of a job in which no stage has run yet."""
    return Context(job.recipe, job.work.absolute(), target(job), {})


def skipped(job: ReleaseJob, stage: Stage, context: Context) -> str:
    """Why a stage is not asked for; "" when it is."""
    if stage.name == "push" and not job.push:
        return "--no-push"
    return stage.left_out(context)


class _Run:
    """One run of a release: the rows so far, and release.json after each."""

    def __init__(self, job: ReleaseJob, progress: ProgressFn, announce: Announce) -> None:
        self.job, self.announce = job, announce
        self.progress = progress
        self.context = make_context(job)
        self.rows: list[StageOutcome] = []
        self.error: QwenQuantError | None = None
        self.started = time.perf_counter()

    def to_the_end(self) -> ReleaseResult:
        """All stages, or those up to the first that fails."""
        for number, stage in enumerate(STAGES):
            if (why_not := skipped(self.job, stage, self.context)) != "":
                self.rows.append(StageOutcome(stage.name, LEFT_OUT, why_not))
                continue
            try:
                self._stage(stage, number)
            except QwenQuantError as error:
                self.error = error
                self._failed(stage, str(error))
            except BaseException as error:
                name = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
                self._failed(stage, f"{name}: {error}" if str(error) else name)
                self._write(number + 1)
                raise
            if self.error is not None or stage.name == self.job.until:
                break
        return self._write(len(self.rows))

    def _stage(self, stage: Stage, number: int) -> None:
        inputs = stage.inputs(self.context)
        record = read_record(self.context.work, stage.name)
        reason = why_run(record, inputs, self.context.work)
        if record is None or reason:
            self.announce(f"{stage.name}: {stage.title} ({reason})")
            self.rows.append(StageOutcome(stage.name, RUNNING, reason, None, inputs_sha256(inputs), inputs))
            self._write(number + 1)
            self.rows.pop()
            started = time.perf_counter()
            made = stage.run(self.context, inputs, self._labelled(stage.name))
            record = self._remember(stage, inputs, made, time.perf_counter() - started)
            self.rows.append(_row(record, FAILED if made.error else DONE, str(made.error or reason)))
            self.error = made.error
        else:
            self.announce(f"{stage.name}: unchanged")
            self.rows.append(_row(record, UNCHANGED, ""))
        self.context.records[stage.name] = record
        self._write(number + 1)

    def _labelled(self, name: str) -> ProgressFn:
        return lambda label, done, total: self.progress(f"{name}: {label}", done, total)

    def _remember(self, stage: Stage, inputs: dict[str, Any], made: Made, seconds: float) -> Record:
        """The record of what was made; kept on disk unless it stops the release."""
        work = self.context.work
        folder = made.folder.relative_to(work) if made.folder.is_relative_to(work) else made.folder
        facts = file_facts(made.folder, made.names)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        rest = (made.present, made.figures, made.summary, seconds, finished)
        record = Record(stage.name, inputs, str(folder), facts, *rest)
        if made.error is None:
            write_record(work, record)
        return record

    def _failed(self, stage: Stage, why: str) -> None:
        self.rows = [row for row in self.rows if row.name != stage.name]
        self.rows.append(StageOutcome(stage.name, FAILED, why))

    def _write(self, count: int) -> ReleaseResult:
        """Write release.json of the rows so far; stages beyond them are "not reached"."""
        rest = []
        for stage in STAGES[count:]:
            why_not = skipped(self.job, stage, self.context)
            rest.append(StageOutcome(stage.name, LEFT_OUT if why_not else NOT_REACHED, why_not))
        result = self._result((*self.rows, *rest))
        document = {"schema": SCHEMA, **release_json(result)}
        write_json_atomically(self.context.work / RESULT_FILE, document)
        return result

    def _result(self, rows: tuple[StageOutcome, ...]) -> ReleaseResult:
        recipe, kind = self.job.recipe, self.job.recipe.release.kind
        names, repo = [row.name for row in rows], self.context.repo if self.job.push else ""
        wanted = rows[: names.index(self.job.until) + 1] if self.job.until else rows
        return ReleaseResult(
            recipe=str(recipe.path),
            recipe_sha256=recipe.sha256,
            model=recipe.model,
            repo=repo,
            formats={row.format: row.repo_id if repo else "" for row in targets_of(recipe, self.context.repo)},
            work=self.context.work,
            artifact=str(self.context.folder(kind)) if kind in self.context.records else "",
            stages=rows,
            complete=all(row.status in (DONE, UNCHANGED, LEFT_OUT) for row in wanted),
            error=self.error,
            versions=versions(),
            seconds=time.perf_counter() - self.started,
        )


def _row(record: Record, status: str, reason: str) -> StageOutcome:
    return StageOutcome(
        name=record.stage,
        status=status,
        reason=reason,
        seconds=record.seconds,
        inputs_sha256=inputs_sha256(record.inputs),
        inputs=record.inputs,
        folder=record.folder,
        outputs={name: facts.sha256 for name, facts in record.files.items()},
        figures=record.figures,
        summary=record.summary,
    )


def release_json(result: ReleaseResult) -> dict[str, Any]:
    """The fields of release.json; an error is its message, its next step and the exit code that goes with it."""
    error = result.error
    told = error and {"what": error.what, "why": error.why, "next_step": error.next_step, "exit_code": error.exit_code}
    fields: dict[str, Any] = to_json(dataclasses.replace(result, error=None))
    return {**fields, "error": told or None}


def plan_release(job: ReleaseJob) -> ReleasePlan:
    """What a release would do, without writing anything. Errors: as what it would run into before its first work."""
    check_job(job)
    context = make_context(job)
    problems = problems_ahead(job.recipe, target(job), reached(job))
    plan = plan_stages(context, STAGES, lambda stage: skipped(job, stage, context), job.until)
    return dataclasses.replace(plan, problems=(*problems, *plan.problems))
