"""The `push` stage: an artifact or export with its evidence becomes one commit (or pull request), or nothing does.

Checks come first and touch no network. Then large files go to the hub's storage, one commit names everything, every
remote hash is compared with the local one, and the tag comes last. A push that was interrupted anywhere is continued by
running it again: stored objects are not sent again, and a commit that is there already is found and not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_quant import __version__
from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub.commit import Committed, Message, check_card, commit_once, find_own, push_id, upload_contents
from qwen_quant.hub.consumers import Finding
from qwen_quant.hub.failures import client_errors, hub_failure
from qwen_quant.hub.push_prepare import Checked, PushJob, prepare
from qwen_quant.hub.push_state import PendingPush, clear_pending, read_pending, write_pending
from qwen_quant.hub.reencoded import is_reencoded, read_reencoded
from qwen_quant.hub.session import Session, ask, open_session
from qwen_quant.hub.target import (
    TargetState,
    UploadFile,
    changes,
    differing,
    files_at,
    look,
    make_ready,
    refuse_public,
)
from qwen_quant.progress import ProgressFn
from qwen_quant.verify import VerifyResult


@dataclass(frozen=True)
class PushedFile:
    """One file of the artifact on the hub: "sent" in this push, or "there" before it."""

    name: str
    size: int
    sha256: str
    state: Literal["sent", "there"]


@dataclass(frozen=True)
class PushResult:
    """What a push did, or with dry_run would do.

    Attributes:
        endpoint, repo_id, branch: the target. created: whether the repository was (would be) made.
        commit: the commit that holds these files, None in a dry run. pull_request: its page, None for a commit.
        outcome: "committed", "opened a pull request", "found" (an earlier, interrupted push had made the commit),
            "unchanged" (everything was there) or "dry run".
        files: everything that the commit holds of the artifact. deleted: files of an earlier push, removed by this one.
        sent_bytes: of the files sent. tag: None without one.
        signed: whether there is a signature. override_reason: why failed gates were overridden ("" when not).
        findings: broken consumer rules of severity "warning". warnings: what else to know.
    """

    endpoint: str
    repo_id: str
    branch: str
    created: bool
    commit: str | None
    pull_request: str | None
    outcome: str
    files: tuple[PushedFile, ...]
    deleted: tuple[str, ...]
    sent_bytes: int
    tag: str | None
    signed: bool
    override_reason: str
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    weights_sha256: str
    seconds: float


@dataclass(frozen=True)
class _Published:
    """What became of the commit."""

    committed: Committed
    outcome: str
    sent: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


def push(job: PushJob, progress: ProgressFn) -> PushResult:
    """Check, upload, commit once, verify, tag.

    Errors: UsageError for options that do not fit together; InputError for an artifact that must not be pushed as it
    is; GateError (exit 4) when a gate failed; NetworkError for what the hub refuses. Nothing is on the hub's branch
    then, except where the error says that a commit is there and differs.
    """
    return send(prepare(job, progress), progress)


def survey(job: PushJob, files: Sequence[UploadFile], format_name: str) -> None:
    """Ask the hub whether this push could be made, without changing anything there. Errors: as `push`."""
    session = open_session(job.repo_id, job.revision, create_pr=job.create_pr, need_token=not job.dry_run)
    try:
        _planned(job, files, format_name, (session, look(session)))
    except client_errors() as error:
        raise hub_failure("push to", job.repo_id, error) from error


def send(checked: Checked, progress: ProgressFn) -> PushResult:
    """Upload, commit once, verify, tag; in a dry run only look. Errors: NetworkError and InputError as `push`."""
    started, job = time.monotonic(), checked.job
    session = open_session(job.repo_id, job.revision, create_pr=job.create_pr, need_token=not job.dry_run)
    try:
        state = look(session)
        if job.dry_run:
            found = _planned(job, checked.files, checked.format, (session, state))
        else:
            found = _publish(session, checked, make_ready(session, state, private=job.private), progress)
            _finish(job, session, checked.files, found, progress)
    except client_errors() as error:
        raise hub_failure("push to", job.repo_id, error) from error
    return _result(session, checked, found, (not state.exists, time.monotonic() - started))


def _check_tag(job: PushJob, state: TargetState, commit: str | None) -> None:
    """A published tag is never moved: one of this name may only be at `commit` (None: a commit still to be made)."""
    there = dict(state.tags).get(job.tag or "")
    if there is not None and there != commit:
        raise InputError(
            f"'{job.repo_id}' has the tag '{job.tag}' already",
            f"it names commit {there[:12]}, and a published tag is not moved",
            "give another --tag, or delete that one on the hub",
        )


def _tagged_or_head(job: PushJob, session: Session, files: Sequence[UploadFile], state: TargetState) -> str:
    """The commit of a push that has nothing to do: the head, or an earlier one with these files that has the tag."""
    tagged = dict(state.tags).get(job.tag or "")
    if tagged is not None and tagged != state.head and not differing(files, files_at(session, tagged)):
        return tagged
    _check_tag(job, state, state.head)
    return str(state.head)


def _planned(
    job: PushJob, files: Sequence[UploadFile], format_name: str, target: tuple[Session, TargetState]
) -> _Published:
    """What a push would do."""
    session, state = target
    found = changes(session, files, state, format_name)
    if state.exists and job.private and not state.private:
        refuse_public(job.repo_id)
    if found.upload or found.delete:
        _check_tag(job, state, None)
    elif state.head:
        _tagged_or_head(job, session, files, state)
    return _Published(Committed(""), "dry run", tuple(file.name for file in found.upload), found.delete)


def _publish(session: Session, checked: Checked, state: TargetState, progress: ProgressFn) -> _Published:
    """The commit of an earlier run where there is one, else contents and a new one."""
    job = checked.job
    ident = push_id(session, checked.files)
    pending = read_pending(job.folder, ident)
    if pending is not None or session.create_pr:
        earlier = find_own(session, ident, since=pending.parent if pending else None)
        if earlier is not None:
            _check_tag(job, state, earlier.oid)
            return _Published(earlier, "found")
    found = changes(session, checked.files, state, checked.format)
    if not found.upload and not found.delete and state.head:
        return _Published(Committed(_tagged_or_head(job, session, checked.files, state)), "unchanged")
    _check_tag(job, state, None)
    check_card(session, found.upload)
    modes = upload_contents(session, found.upload, progress)
    write_pending(job.folder, PendingPush(ident, state.head))
    progress("committing", 0, 1)
    message = _message(job, checked.verified)
    committed = commit_once(session, found, modes, parent=state.head, message=message, ident=ident)
    outcome = "opened a pull request" if session.create_pr else "committed"
    return _Published(committed, outcome, tuple(file.name for file in found.upload), found.delete)


def _finish(
    job: PushJob, session: Session, files: Sequence[UploadFile], found: _Published, progress: ProgressFn
) -> None:
    """Compare every remote hash, then set the tag, then forget the state."""
    from huggingface_hub import HfApi

    progress("verifying", 0, 1)
    commit = found.committed.oid
    differ = differing(files, files_at(session, commit))
    if differ:
        clear_pending(job.folder)
        raise NetworkError(
            f"commit {commit[:12]} of '{job.repo_id}' is not the artifact",
            f"on the hub {', '.join(differ[:3])} differ from the local files or are missing",
            "run the same command again: it sends them anew; until then do not use that commit",
        )
    if job.tag:
        tag = job.tag
        ask(lambda: HfApi().create_tag(job.repo_id, tag=tag, revision=commit, exist_ok=True))
        _check_tag(job, look(session), commit)
    clear_pending(job.folder)
    progress("verifying", 1, 1)


def _message(job: PushJob, verified: VerifyResult) -> Message:
    """Title and text of the commit: what it is, from what, by what."""
    manifest = read_manifest(job.folder)
    settings = manifest.get("settings") or manifest.get("quantization") or {}
    bits = f" {settings['bits']} bit" if "bits" in settings else ""
    method, source, revision = verified.method, verified.source_id, verified.source_revision
    if is_reencoded(manifest):
        made = read_reencoded(job.folder)
        method, source, revision = made.format or made.method, made.base_id, made.base_revision
    source += f"@{revision[:12]}" if revision else ""
    text = f"qwen-quant {__version__}; weights sha256 {verified.weights_sha256}"
    return Message(f"{method}{bits} of {source}", text)


def _result(session: Session, checked: Checked, found: _Published, rest: tuple[bool, float]) -> PushResult:
    job, sent = checked.job, set(found.sent)
    files = tuple(
        PushedFile(file.name, file.size, file.sha256, "sent" if file.name in sent else "there")
        for file in checked.files
    )
    return PushResult(
        endpoint=session.endpoint,
        repo_id=job.repo_id,
        branch=session.branch,
        created=rest[0],
        commit=found.committed.oid or None,
        pull_request=found.committed.pull_request,
        outcome=found.outcome,
        files=files,
        deleted=found.deleted,
        sent_bytes=sum(file.size for file in files if file.state == "sent"),
        tag=job.tag,
        signed=any(file.name == "model.sig" for file in files),
        override_reason=checked.override_reason,
        findings=checked.findings,
        warnings=checked.warnings,
        weights_sha256=checked.verified.weights_sha256,
        seconds=rest[1],
    )
