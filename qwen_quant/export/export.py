"""One export from start to end: check, write, read back, compare, publish.

Order of a run: everything that can refuse comes before the first byte (format, source, exactness, library, disk, OUT).
Files are built in `.OUT.partial/`; a killed run continues there.  What was written is read back and every dequantized
weight is compared with the source; only then OUT appears, by one rename, with `qwen-quant.json` in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.background import in_background
from qwen_quant.checkpoint.manifest import (
    MANIFEST_FILE,
    SEALABLE,
    copy_companions,
    provenance,
    versions,
    write_manifest,
)
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import AuditError, InputError, UsageError
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Target, find_format, require
from qwen_quant.export.source import ExportSource, source_sha256
from qwen_quant.export.verify import Verification, judge, verify
from qwen_quant.preparation import check_output
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import RunConfig
from qwen_quant.results import to_json
from qwen_quant.resume import WorkFolder


@dataclass(frozen=True)
class ExportJob:
    """One `export` run.

    Attributes:
        artifact: a local Int4 folder.
        out: folder to write.
        format: name of the format.
        rest: dtype of what is not quantized, None to keep it (see `ExportOptions`).
        allow_inexact: write a format that cannot be exact, with the largest error in result and manifest.
        run: shard size, resume, force.
        split_bytes: largest file of a format that is one file otherwise (see `ExportOptions`).
        source_id, revision: where the artifact came from, for the record.
        restart: begin anew where an unfinished run of OUT was of another source or other options (else an InputError).
    """

    artifact: Path
    out: Path
    format: str
    rest: str | None = None
    allow_inexact: bool = False
    run: RunConfig = field(default_factory=RunConfig)
    source_id: str = ""
    revision: str | None = None
    split_bytes: int | None = None
    restart: bool = False

    @property
    def options(self) -> ExportOptions:
        """What decides the bytes beside the source."""
        return ExportOptions(self.rest, self.run.max_shard_size_bytes, self.split_bytes)


@dataclass(frozen=True)
class ExportResult:
    """What a finished export did and what was proved. Bytes, seconds and counts as named.

    Attributes:
        source_kind: "gptq", "gptq_v2", "awq" or "compressed-tensors".
        exact: every dequantized weight and every kept tensor is the source's.
        inexact: why not, where --allow-inexact was needed.
        proof: what reading back found; read_with: by which library.
        dropped: tensors of the source that OUT does not have, with the reason.
        source_sha256: `checkpoint.identity.weights_sha256` of the source, whose files are what its manifest records.
        source_bytes: of the source's tensors; output_bytes: of all files of OUT but the manifest.
        write_seconds, verify_seconds: of these two stages; seconds: of everything.
        left_behind: files of the source that are not in OUT.
    """

    out: Path
    format: str
    source_kind: str
    bits: int
    group_size: int
    sym: bool
    act_order: bool
    exact: bool
    inexact: tuple[Inexact, ...]
    proof: Verification
    read_with: str
    runtimes: tuple[str, ...]
    notes: tuple[str, ...]
    dropped: dict[str, str]
    source_sha256: str
    source_bytes: int
    output_bytes: int
    files: tuple[str, ...]
    left_behind: tuple[str, ...]
    write_seconds: float
    verify_seconds: float
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class FormatOffer:
    """One row of --list: what a format would make of this artifact.

    Attributes:
        exact: whether it holds the artifact exactly.
        possible: whether it can be written at all (with --allow-inexact).
        reasons: why it is not exact.
        weight_bytes: size of its weights, None where it cannot be written.
    """

    name: str
    summary: str
    runtimes: tuple[str, ...]
    exact: bool
    possible: bool
    reasons: tuple[Inexact, ...]
    weight_bytes: int | None
    extra: str


@dataclass(frozen=True)
class _Ready:
    """A job with everything that was read and checked before the first byte."""

    job: ExportJob
    format: Format
    source: ExportSource
    plan: ExportPlan
    reasons: list[Inexact]
    work: WorkFolder


def offers(source: ExportSource, formats: tuple[Format, ...], rest: str | None = None) -> tuple[FormatOffer, ...]:
    """What every format would make of `source`, with sizes as by default; `rest` counts where a format takes it."""
    found = []
    _ = source.facts  # what is wrong with the source itself is no matter of a format
    for row in formats:
        try:
            reasons = row.check(source)
        except InputError as error:
            reasons = [Inexact(error.what, error.why, f"another format ({error.next_step})")]
        possible = all(reason.max_error is not None for reason in reasons)
        options = ExportOptions(rest if rest in row.rests else None)
        size = row.plan(source, options).weight_bytes if possible else None
        offer = FormatOffer(row.name, row.summary, row.runtimes, not reasons, possible, tuple(reasons), size, row.extra)
        found.append(offer)
    return tuple(found)


def refuse_inexact(format_name: str, reasons: list[Inexact], *, allow_inexact: bool) -> None:
    """Go on only with a format that is exact, or that can be written and was allowed (InputError otherwise)."""
    if not reasons:
        return
    never = next((reason for reason in reasons if reason.max_error is None), None)
    if never is None and allow_inexact:
        return
    reason = never or reasons[0]
    count = f" in {reason.linears} linears" if reason.linears else ""
    step = f"use {reason.nearest}"
    if never is None:
        largest = sum(reason.max_error or 0.0 for reason in reasons)
        change = f"no weight changes by more than {largest:.3g}" if largest else "the weights stay exact"
        step += f"; or add --allow-inexact: {change}"
    raise InputError(
        f"--format {format_name} cannot hold this artifact exactly", f"{reason.what}{count}: {reason.why}", step
    )


def _prepare(job: ExportJob) -> _Ready:
    """Read and check everything; nothing is written."""
    chosen = find_format(job.format)
    if job.rest is not None and job.rest not in chosen.rests:
        known = ", ".join(chosen.rests) or "none: what is not quantized stays as it is"
        raise UsageError(
            f"--rest {job.rest} does not go with --format {chosen.name}", f"known: {known}", "leave it out"
        )
    check_output(job.out, force=job.run.force, source=job.artifact)
    if job.out.resolve().is_relative_to(job.artifact.resolve()):
        why = "the artifact would not be what its manifest describes any more"
        raise InputError(f"OUT {job.out} lies inside ARTIFACT", why, "give an OUT beside it")
    source = ExportSource(job.artifact)
    reasons = chosen.check(source)
    refuse_inexact(chosen.name, reasons, allow_inexact=job.allow_inexact)
    for package in chosen.packages:
        require(package, chosen.name, chosen.extra)
    plan = chosen.plan(source, job.options)
    return _Ready(job, chosen, source, plan, reasons, WorkFolder(job.out.absolute()))


def _identity(ready: _Ready) -> dict[str, Any]:
    """What an unfinished run must agree with to be continued; sizes and times stand for the source's content."""
    beside = (MANIFEST_FILE, *SEALABLE)  # they do not go into the output, or only by what stays the same in them
    files = sorted(path for path in ready.job.artifact.iterdir() if path.is_file() and path.name not in beside)
    files = [path for path in files if not path.name.startswith(".")]
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    options, folder = to_json(ready.job.options), str(ready.job.artifact.resolve())
    return {"export": ready.format.name, "source": folder, "files": stamps, "options": options, "versions": versions()}


def _write(ready: _Ready, progress: ProgressFn) -> list[str]:
    """Companions, weights and configs into the work folder; returns the files that stay behind."""
    identity = _identity(ready)
    resume = ready.job.run.resume and not (ready.job.restart and ready.work.holds_other(identity))
    state = ready.work.open(identity, resume=resume)
    _, left = copy_companions(ready.job.artifact, ready.work.artifact)
    target = Target(ready.work.artifact, state, ready.work.commit)
    ready.format.write(ready.source, ready.job.options, target, progress)
    return [name for name in left if not (ready.work.artifact / name).exists() and name != MANIFEST_FILE]


def _proved(ready: _Ready, progress: ProgressFn) -> Verification:
    """Read back and compare. After an AuditError the same command writes everything again."""
    try:
        pieces = ready.format.read_back(ready.work.artifact, ready.source)
        proof = verify(ready.source, pieces, ready.plan, progress, rest=ready.job.rest)
        judge(proof, ready.reasons, ready.job.rest)
    except AuditError:
        ready.work.commit({})
        raise
    return proof


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _manifest(ready: _Ready, result: ExportResult) -> dict[str, Any]:
    """The provenance: which artifact, what was compared, what differs."""
    values = to_json(result)
    source = {"id": ready.job.source_id, "revision": ready.job.revision, "weights_sha256": result.source_sha256}
    kept = ("exact", "inexact", "proof", "read_with", "dropped", "notes", "runtimes")
    measured = ("seconds", "write_seconds", "verify_seconds", "peak_memory_bytes")
    grid = ("source_kind", "bits", "group_size", "sym", "act_order")
    return {
        "schema": "qwen-quant/1",
        "method": "export",
        "format": ready.format.name,
        "source": {**source, **provenance(ready.job.artifact)},
        "quantization": {key: values[key] for key in grid},
        "rest": ready.job.rest,
        "max_shard_size_bytes": ready.job.run.max_shard_size_bytes,
        "split_bytes": ready.job.split_bytes,
        **{key: values[key] for key in kept},
        "versions": versions(),
        "companions": {"left_behind": values["left_behind"]},
        "measured": {key: values[key] for key in measured},
    }


def export_artifact(job: ExportJob, progress: ProgressFn) -> ExportResult:
    """Run (or resume) an export to its end.

    Errors: UsageError for an unknown format or --rest; InputError for anything wrong with the source, the machine or
    the output, and for a format that cannot hold the source exactly; AuditError when what was written is not the
    source's numbers. Nothing appears at OUT then.
    """
    started = time.perf_counter()
    ready = _prepare(job)
    ready.work.check_disk(ready.plan.weight_bytes)
    sha256 = in_background(lambda: source_sha256(job.artifact))  # it reads what writing reads
    left = _write(ready, progress)
    written = time.perf_counter()
    proof = _proved(ready, progress)
    verified = time.perf_counter()
    progress("hashing the source", 0, 1)
    result = _result(ready, proof, left, sha256, (started, written, verified))
    progress("hashing the output", 0, 1)
    write_manifest(ready.work.artifact, _manifest(ready, result))
    ready.work.publish(force=job.run.force)
    return result


def _result(
    ready: _Ready, proof: Verification, left: list[str], sha256: Callable[[], str], times: tuple[float, float, float]
) -> ExportResult:
    """Everything about the finished run; `times` are when it started, had written and had verified."""
    facts, files = ready.source.facts, _output_files(ready.work.artifact)
    started, written, verified = times
    return ExportResult(
        out=ready.job.out,
        format=ready.format.name,
        source_kind=ready.source.layout.kind,
        bits=facts.bits,
        group_size=facts.group_size,
        sym=facts.sym,
        act_order=bool(facts.act_order),
        exact=proof.exact,
        inexact=tuple(ready.reasons),
        proof=proof,
        read_with=ready.format.read_with(),
        runtimes=ready.format.runtimes,
        notes=ready.plan.notes,
        dropped=dict(ready.plan.dropped),
        source_sha256=sha256(),
        source_bytes=ready.source.nbytes,
        output_bytes=sum(path.stat().st_size for path in files),
        files=tuple(str(path.relative_to(ready.work.artifact)) for path in files),
        left_behind=tuple(left),
        write_seconds=written - started,
        verify_seconds=verified - written,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_rss_bytes(),
    )
