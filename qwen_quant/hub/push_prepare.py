"""A push up to the network: what is to be sent where, and every check of it; card and signature are written last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.errors import InputError, UsageError
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.hub.card import add_evidence, card_problems, make_card
from qwen_quant.hub.card_state import CardRequest
from qwen_quant.hub.consumers import Finding, check_consumers, refuse_errors
from qwen_quant.hub.download import HUB_ID
from qwen_quant.hub.export_rules import check_reencoded
from qwen_quant.hub.export_table import HUB_FORMATS, SAFETENSORS
from qwen_quant.hub.push_checks import (
    check_artifact,
    check_exact,
    check_report,
    check_signature,
    check_smoke,
    upload_files,
)
from qwen_quant.hub.reencoded import CONVERT, Reencoded, is_reencoded, read_reencoded
from qwen_quant.hub.target import UploadFile
from qwen_quant.progress import ProgressFn
from qwen_quant.results import ValidationResult
from qwen_quant.signing import sign_folder
from qwen_quant.verify import VerifyResult

_REF_NAME = re.compile(r"(?!.*(\.\.|//|@\{|/\.|\.lock$))[A-Za-z0-9][\w./-]*(?<![./])")


@dataclass(frozen=True)
class PushJob:
    """One push.

    Attributes:
        folder: the artifact with its evidence. repo_id: "ORG/NAME".
        private: make the repository private where it does not exist.
        revision: branch, made where it is missing; None is main. create_pr: a pull request instead of a commit.
        tag: set on the commit once everything is verified. dry_run: check and compare, change nothing anywhere.
        override_gates: why failed gates are accepted; it is written into the card.
        card_language: "en", "zh", "both", or None for the one that the card has (else "en").
        sign_key: PEM private key for an OpenSSF signature; None signs nothing.
        links: (format, repository) of the same weights elsewhere, for the card; None: as the card has them.
        report: a report.json to put into the folder (an export's is its artifact's); None: the one that is there.
        like: the artifact that an export was made from, whose card knows the source.
    """

    folder: Path
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    dry_run: bool = False
    override_gates: str = ""
    card_language: str | None = None
    sign_key: Path | None = None
    links: tuple[tuple[str, str], ...] | None = None
    report: Path | None = None
    like: Path | None = None


@dataclass(frozen=True)
class Checked:
    """A job whose folder has passed every check that needs no network.

    Attributes:
        report: None for a 16-bit conversion, whose proof needs none.
        format: of an export, "" otherwise. override_reason: why failed gates, or numbers that are not exact, may go.
    """

    job: PushJob
    verified: VerifyResult
    report: ValidationResult | None
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    files: tuple[UploadFile, ...]
    format: str = ""
    override_reason: str = ""


def prepare(job: PushJob, progress: ProgressFn) -> Checked:
    """Everything that needs no network; writes card and signature unless it is a dry run. Errors: as `push`."""
    check_job(job)
    return _check(job, progress)


def check_job(job: PushJob) -> None:
    """Refuse options that do not fit together (UsageError)."""
    match = HUB_ID.fullmatch(job.repo_id)
    if match is None or match["revision"]:
        raise UsageError(f"'{job.repo_id}' is not a repository", next_step="give ORG/NAME; a branch goes to --revision")
    if job.create_pr and (job.revision or job.tag):
        raise UsageError(
            "--create-pr goes with neither --revision nor --tag",
            "a pull request is against main, and its commit becomes another one when it is merged",
            "tag after merging",
        )
    for option, name in (("--revision", job.revision), ("--tag", job.tag)):
        if name is not None and not _REF_NAME.fullmatch(name):
            raise UsageError(
                f"{option} is {name!r}", "that is no name of a branch or tag", "use letters, digits, . _ -"
            )


def _check(job: PushJob, progress: ProgressFn) -> Checked:
    """Everything that is checked before the network; writes card and signature unless it is a dry run."""
    folder = job.folder
    verified = check_artifact(folder, progress, will_sign=job.sign_key is not None)
    made = read_reencoded(folder) if is_reencoded(read_manifest(folder)) else None
    report: ValidationResult | None
    if made is None:
        report, findings = check_report(folder, [verified.weights_sha256], job.override_gates), check_consumers(folder)
    else:
        report, findings = _check_reencoded(job, made), check_reencoded(folder, made)
    refuse_errors(folder, findings)
    warnings = _smoke(folder, made, report, progress)
    reason = job.override_gates if made is not None and not made.exact else ""
    reason = reason or (report.override_reason if report else "")
    if reason:
        warnings = (f"gates overridden: {reason}", *warnings)
    if job.dry_run:
        warnings += tuple(f"card: {problem} (a push writes it again)" for problem in card_problems(folder))
    else:
        _seal(job, reason)
    own = HUB_FORMATS[made.format].own if made is not None and made.format else SAFETENSORS
    files = upload_files(folder, own, sealed=not job.dry_run)
    return Checked(job, verified, report, findings, warnings, files, made.format if made else "", reason)


def _check_reencoded(job: PushJob, made: Reencoded) -> ValidationResult | None:
    """The report that counts for an export or a conversion; None for 16-bit weights whose proof is equal logits."""
    check_exact(job.folder, made, job.override_gates)
    if not made.quantized and job.report is None and not (job.folder / JSON_FILE).is_file():
        return None
    return check_report(job.folder, made.measured_sha256, job.override_gates, job.report)


def _smoke(
    folder: Path, made: Reencoded | None, report: ValidationResult | None, progress: ProgressFn
) -> tuple[str, ...]:
    """The generation test: what validate ran on these weights, or those that an export has; else it is run here."""
    if report is not None and (made is None or made.method == CONVERT):
        return check_smoke(folder, report, progress)
    if report is None or report.smoke:
        return ()
    return ("nothing was generated with these weights: the report holds no smoke prompts",)


def _seal(job: PushJob, override_reason: str) -> None:
    """Evidence, card and signature, the last changes before everything is sent."""
    folder = job.folder
    if job.report is not None:
        add_evidence(folder, report=job.report)
    request = CardRequest(
        job.card_language, job.repo_id, override_reason=override_reason, links=job.links, like=job.like
    )
    make_card(folder, request)
    problems = card_problems(folder)
    if problems:
        raise InputError(f"the card of {folder} is not complete", problems[0], _card_step(problems[0], folder))
    if job.sign_key is not None:
        sign_folder(folder, job.sign_key)
    check_signature(folder)


def _card_step(problem: str, folder: Path) -> str:
    """The command that mends it, unless the problem names one itself."""
    return "do what it says and push again" if "qwen-quant" in problem else f"qwen-quant card {folder}"
