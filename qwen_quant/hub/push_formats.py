"""An artifact and its exports, each to a repository of its own: exported, checked and looked at together, then pushed.

Everything that can refuse comes before the first byte is sent: every format is exported and checked, every card is
written, and the hub is asked about every repository. Then the artifact goes first and the formats follow; one that the
hub refuses all the same is told beside those that are there, and the same command goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_quant.checkpoint.families import read_config
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, files_sha256, read_manifest
from qwen_quant.errors import InputError, QwenQuantError, UsageError
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.hub.card_state import CARD_FILE
from qwen_quant.hub.download import HUB_ID
from qwen_quant.hub.export_table import HUB_FORMATS, repository_of
from qwen_quant.hub.push import PushResult, send, survey
from qwen_quant.hub.push_prepare import Checked, PushJob, check_job, prepare
from qwen_quant.hub.reencoded import EXPORT, is_reencoded, read_reencoded
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import RunConfig

NOT_TRIED = "not tried: the artifact itself was not pushed"
TO_EXPORT = "would be exported first"


@dataclass(frozen=True)
class FormatTarget:
    """A format of `export` and the repository that it goes to."""

    format: str
    repo_id: str


@dataclass(frozen=True)
class Exported:
    """An export that is pushed with its artifact: its target and its folder."""

    target: FormatTarget
    folder: Path


@dataclass(frozen=True)
class PushedRepository:
    """What became of one repository.

    Attributes:
        format: of an export; "" for the artifact itself. folder: what was to be pushed there.
        result: None where nothing was. error: why not. note: what else to say, "" for nothing.
    """

    format: str
    repo_id: str
    folder: Path
    result: PushResult | None = None
    error: QwenQuantError | None = None
    note: str = ""


def parse_targets(values: Sequence[str], repo_id: str, bits: int) -> tuple[FormatTarget, ...]:
    """--format values ("gguf,mlx=me/other") as targets beside the artifact's repository.

    Errors: UsageError for an unknown format (naming the nearest), one given twice, or a repository given twice.
    """
    from qwen_quant.export.formats import check_name

    found: list[FormatTarget] = []
    for word in (word.strip() for value in values for word in value.split(",")):
        name, equals, repo = (part.strip() for part in word.partition("="))
        check_name(name)
        match = HUB_ID.fullmatch(repo) if equals else None
        if equals and (match is None or match["revision"]):
            raise UsageError(f"'{repo}' is not a repository", next_step=f"write {name}=ORG/NAME")
        if name in (row.format for row in found):
            raise UsageError(f"the format {name} is given twice", next_step="give each format once")
        found.append(FormatTarget(name, repo or repository_of(repo_id, name, bits)))
    _check_apart(repo_id, found)
    return tuple(found)


def _check_apart(repo_id: str, targets: Sequence[FormatTarget]) -> None:
    """Every repository is another one (the hub's names do not tell upper from lower case)."""
    seen = {repo_id.casefold(): "the artifact itself"}
    for row in targets:
        other = seen.setdefault(row.repo_id.casefold(), row.format)
        if other != row.format:
            raise UsageError(
                f"'{row.repo_id}' is given for {other} and for {row.format}",
                "a runtime loads a repository's root, so that each format needs its own",
                f"write {row.format}=ORG/OTHER",
            )


def artifact_bits(folder: Path) -> int:
    """The width of an artifact's codes, for the names of repositories.

    Errors: InputError for a folder that formats are not made from.
    """
    method = read_manifest(folder).get("method")
    if method in (EXPORT, "bitsandbytes"):
        why = "it is an export itself" if method == EXPORT else "bitsandbytes weights have no codes to re-encode"
        step = "push it without --format" if method != EXPORT else "give the folder that qwen-quant gptq wrote"
        raise InputError(f"{folder} has no other formats", why, step)
    settings = read_config(folder).get("quantization_config") or {}
    if settings.get("quant_method") != "gptq":
        raise InputError(f"{folder} has no other formats", "its weights are not quantized", "push it without --format")
    return int(settings.get("bits", 4))


def links_of(repo_id: str, targets: Sequence[FormatTarget]) -> tuple[tuple[str, str], ...]:
    """All repositories of the same weights, for their cards."""
    return (("gptq", repo_id), *((row.format, row.repo_id) for row in targets))


def push_formats(job: PushJob, targets: Sequence[FormatTarget], progress: ProgressFn) -> tuple[PushedRepository, ...]:
    """Export the artifact of `job` into every format, beside it or as found there, and push all.

    Errors: as `export_artifact` and `push`, before anything is sent. What fails later is in the rows.
    """
    job = replace(job, links=links_of(job.repo_id, targets))
    jobs = [_job_of(job, row, export_place(job.folder, row.format)) for row in targets]
    for one in (job, *jobs):
        check_job(one)
    if job.dry_run:
        return _dry_run(job, targets, jobs, progress)
    main = prepare(job, progress)
    for row, one in zip(targets, jobs, strict=True):
        make_export(job.folder, row.format, one.folder, progress)
    return _push_checked([main, *(prepare(one, progress) for one in jobs)], progress)


def push_exported(job: PushJob, exports: Sequence[Exported], progress: ProgressFn) -> tuple[PushedRepository, ...]:
    """Push an artifact and exports of it that are there already. Errors: as `push_formats`."""
    job = replace(job, links=links_of(job.repo_id, [row.target for row in exports])) if exports else job
    jobs = [job, *(_job_of(job, row.target, row.folder) for row in exports)]
    return _push_checked([prepare(one, progress) for one in jobs], progress)


def export_place(artifact: Path, format_name: str) -> Path:
    """Where `push --format` keeps an export: beside the artifact, "NAME-gguf"."""
    whole = artifact.resolve()
    return whole.with_name(f"{whole.name}-{format_name}")


def _job_of(job: PushJob, target: FormatTarget, folder: Path) -> PushJob:
    """The push of one export: everything as for the artifact, whose report and card it takes."""
    return replace(job, folder=folder, repo_id=target.repo_id, report=job.folder / JSON_FILE, like=job.folder)


def _push_checked(checked: Sequence[Checked], progress: ProgressFn) -> tuple[PushedRepository, ...]:
    """Look at every target, then push; the rest follows only where the artifact itself, the first, is there."""
    for one in checked:
        survey(one.job, one.files, one.format)
    rows: list[PushedRepository] = []
    for one in checked:
        row = PushedRepository(one.format, one.job.repo_id, one.job.folder)
        if rows and rows[0].error is not None:
            rows.append(replace(row, note=NOT_TRIED))
            continue
        try:
            rows.append(replace(row, result=send(one, progress)))
        except QwenQuantError as error:
            rows.append(replace(row, error=error))
    return tuple(rows)


def _dry_run(
    job: PushJob, targets: Sequence[FormatTarget], jobs: Sequence[PushJob], progress: ProgressFn
) -> tuple[PushedRepository, ...]:
    """What would be pushed where; an export that is not there yet is only checked to be possible."""
    main, checked = prepare(job, progress), []
    for target, one in zip(targets, jobs, strict=True):
        there = is_unchanged(job.folder, target.format, one.folder)
        if not there:
            _check_possible(job.folder, target.format)
        checked.append(prepare(one, progress) if there else None)
    rows = [PushedRepository("", job.repo_id, job.folder, send(main, progress))]
    for target, one, found in zip(targets, jobs, checked, strict=True):
        row = PushedRepository(target.format, target.repo_id, one.folder)
        if found is not None:
            rows.append(replace(row, result=send(found, progress)))
            continue
        survey(one, (), target.format)
        rows.append(replace(row, note=TO_EXPORT))
    return tuple(rows)


def _check_possible(artifact: Path, format_name: str) -> None:
    from qwen_quant.export.export import refuse_inexact
    from qwen_quant.export.formats import find_format, require
    from qwen_quant.export.source import ExportSource

    row = find_format(format_name)
    refuse_inexact(row.name, row.check(ExportSource(artifact)), allow_inexact=False)
    for package in row.packages:
        require(package, row.name, row.extra)


def is_unchanged(artifact: Path, format_name: str, folder: Path) -> bool:
    """Whether `folder` is the export of the artifact as it is now, exact and with nothing converted.

    Errors: InputError where something else is in the way: it is never replaced.
    """
    if not folder.exists():
        return False
    step = "move it away, or push it by itself: qwen-quant push"
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else {}
    if manifest.get("format") != format_name or not is_reencoded(manifest):
        raise InputError(f"{folder} is in the way", f"it is not an export of {artifact} to {format_name}", step)
    made = read_reencoded(folder)
    if made.source_files_sha256 == files_sha256(read_manifest(artifact)):
        if made.exact and made.rest is None:
            return True
        raise InputError(f"{folder} is in the way", "it was exported with --rest or --allow-inexact", step)
    if made.source_id != artifact.resolve().name:
        raise InputError(f"{folder} is in the way", f"it was made from {made.source_id}", step)
    return False


def make_export(artifact: Path, format_name: str, folder: Path, progress: ProgressFn) -> None:
    """Export, unless `folder` is that already; text written by hand into its card stays. Errors: as `export`."""
    if is_unchanged(artifact, format_name, folder):
        return
    from qwen_quant.export.export import ExportJob, export_artifact  # loads transformers

    card = folder / CARD_FILE
    text = card.read_bytes() if card.is_file() else None
    run = RunConfig(force=folder.exists())
    whole = artifact.resolve()
    export_artifact(ExportJob(whole, folder, format_name, run=run, source_id=whole.name, restart=True), progress)
    if text is not None:
        card.write_bytes(text)


def first_error(rows: Sequence[PushedRepository]) -> QwenQuantError | None:
    """What decides the exit code; None where every repository holds what it should."""
    return next((row.error for row in rows if row.error is not None), None)


def titles() -> str:
    """The formats and their repositories' suffixes, for help texts."""
    return ", ".join(f"{name} ({row.suffix.format(bits=4)})" for name, row in HUB_FORMATS.items())
