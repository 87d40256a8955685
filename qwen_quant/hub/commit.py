"""Contents first, then one commit, once: whatever happens to the reply.

A commit is not repeated blindly. Its description holds the push id, a hash of target and files, and after every failure
whose outcome is unknown the hub's history is asked for that id. On a branch `parentCommit` makes a second commit
impossible besides; for a pull request the id is what prevents a second one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.hub.failures import client_errors
from qwen_quant.hub.lfs_upload import upload_lfs
from qwen_quant.hub.session import COMMIT_TIMEOUT_SECONDS, Session, ask, post_json
from qwen_quant.hub.target import Changes, UploadFile
from qwen_quant.hub.transport import RetryPolicy, is_passing, pause, wait_seconds
from qwen_quant.hub.xet_upload import upload_xet
from qwen_quant.progress import ProgressFn

_LOG = logging.getLogger(__name__)
CARD_FILE = "README.md"
ID_LINE = "qwen-quant-push: "
_POLICY = RetryPolicy(attempts=6, first_wait_seconds=1.0)
_SAMPLE_BYTES = 512
_BATCH = 256
_PULL_REQUESTS_LOOKED_AT = 50


@dataclass(frozen=True)
class Committed:
    """A commit of ours on the hub; `pull_request` is its page where it is one."""

    oid: str
    pull_request: str | None = None


@dataclass(frozen=True)
class Message:
    """A commit's title and description, without the push id."""

    title: str
    text: str


def push_id(session: Session, files: Sequence[UploadFile]) -> str:
    """20 hex digits that name this content at this target (whichever mirror of the hub it is reached through)."""
    hashes = {file.name: file.sha256 for file in files}
    what = [session.repo_id, session.branch, session.create_pr, sorted(hashes.items())]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


def check_card(session: Session, files: Sequence[UploadFile]) -> None:
    """Ask the hub whether the card's metadata is valid (InputError with its words when it is not)."""
    from huggingface_hub.errors import BadRequestError

    for file in files:
        if file.name != CARD_FILE:
            continue
        value = {"content": file.path.read_text(encoding="utf-8"), "repoType": "model"}
        try:
            post_json(session, f"{session.endpoint}/api/validate-yaml", value)
        except BadRequestError as error:
            said = error.response.json().get("errors", [])
            words = "; ".join(str(row.get("message")) for row in said) or str(error)
            raise InputError(
                f"the hub refuses the metadata of {file.path}", words, "correct it, then qwen-quant card"
            ) from error


def upload_contents(session: Session, files: Sequence[UploadFile], progress: ProgressFn) -> dict[str, str]:
    """Bring large files to the hub's storage; name -> "lfs" or "regular" (which travel inside the commit).

    Errors: InputError for a file that the repository's .gitignore excludes: it would be left out without a word.
    """
    from huggingface_hub.utils._runtime import is_xet_available

    modes: dict[str, str] = {}
    for start in range(0, len(files), _BATCH):
        modes |= _modes(session, files[start : start + _BATCH])
    large = [file for file in files if modes[file.name] == "lfs"]
    if large and is_xet_available():
        try:
            upload_xet(session, large, progress)
            return modes
        except client_errors() as error:
            if _status(error) != 404:
                raise
            _LOG.warning("the hub has no Xet storage: uploading by LFS")
    if large:
        upload_lfs(session, large, progress)
    return modes


def _modes(session: Session, files: Sequence[UploadFile]) -> dict[str, str]:
    rows = [{"path": f.name, "sample": base64.b64encode(_sample(f)).decode(), "size": f.size} for f in files]
    params = {"create_pr": "1"} if session.create_pr else None
    reply = post_json(session, f"{session.api_url}/preupload/{session.quoted_branch}", {"files": rows}, params)
    found = {str(row["path"]): row for row in reply["files"]}
    ignored = [file.name for file in files if found[file.name].get("shouldIgnore")]
    if ignored:
        raise InputError(
            f"the .gitignore of '{session.repo_id}' excludes {', '.join(ignored[:3])}",
            "the hub would leave that out of the commit",
            "change .gitignore in the repository and run again",
        )
    # Empty files cannot be stored as LFS objects.
    return {file.name: str(found[file.name]["uploadMode"]) if file.size else "regular" for file in files}


def _sample(file: UploadFile) -> bytes:
    with open(file.path, "rb") as stream:
        return stream.read(_SAMPLE_BYTES)


def commit_once(
    session: Session, changes: Changes, modes: dict[str, str], *, parent: str | None, message: Message, ident: str
) -> Committed:
    """Make the commit (or pull request), or find it when a lost reply hid it.

    Args:
        changes: what to add and delete. modes: from `upload_contents`.
        parent: the commit that was looked at; another head is refused with 412.
        message, ident: of the commit; `ident` is its push id.

    Raises what the client raises, when it is certain that there is no such commit.
    """
    body = b"".join(json.dumps(line).encode() + b"\n" for line in _lines(changes, modes, parent, message, ident))
    failures = 0
    while True:
        try:
            return _post(session, body)
        except client_errors() as error:
            failures += 1
            if not is_passing(error) and _status(error) != 412:
                raise
            pause(wait_seconds(error, failures, _POLICY), threading.Event())
            found = find_own(session, ident, since=parent)
            if found is not None:
                return found
            if failures >= _POLICY.attempts or _status(error) == 412:
                raise


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _lines(
    changes: Changes, modes: dict[str, str], parent: str | None, message: Message, ident: str
) -> Iterator[dict[str, Any]]:
    """The commit as the hub reads it: a header, then one line an operation. Small files travel inside, in base64."""
    header = {"summary": message.title, "description": f"{message.text}\n\n{ID_LINE}{ident}"}
    yield {"key": "header", "value": {**header, **({"parentCommit": parent} if parent else {})}}
    for file in changes.upload:
        if modes[file.name] == "lfs":
            value = {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.size}
            yield {"key": "lfsFile", "value": value}
        else:
            yield {"key": "file", "value": {"path": file.name, "encoding": "base64", "content": _content(file)}}
    for name in changes.delete:
        yield {"key": "deletedFile", "value": {"path": name}}


def _content(file: UploadFile) -> str:
    """The file in base64 (InputError when it is not what was checked before)."""
    data = file.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise InputError(
            f"{file.path} changed while it was uploaded", "nothing was committed", "leave it alone and run again"
        )
    return base64.b64encode(data).decode()


def _post(session: Session, body: bytes) -> Committed:
    from huggingface_hub import get_session, hf_raise_for_status

    reply = get_session().post(
        f"{session.api_url}/commit/{session.quoted_branch}",
        content=body,
        headers={"Content-Type": "application/x-ndjson", **session.headers},
        params={"create_pr": "1"} if session.create_pr else {},
        timeout=COMMIT_TIMEOUT_SECONDS,
    )
    hf_raise_for_status(reply, endpoint_name="commit")
    value = reply.json()
    return Committed(str(value["commitOid"]), str(value["pullRequestUrl"]) if session.create_pr else None)


def find_own(session: Session, ident: str, *, since: str | None) -> Committed | None:
    """The commit with this push id: on the branch after `since`, or in an open pull request."""
    from huggingface_hub import HfApi

    api = HfApi()
    if session.create_pr:
        return _own_pull_request(session, ident)
    for commit in ask(lambda: list(api.list_repo_commits(session.repo_id, revision=session.branch))):
        if commit.commit_id == since:
            return None
        if f"{ID_LINE}{ident}" in commit.message:
            return Committed(commit.commit_id)
    return None


def _own_pull_request(session: Session, ident: str) -> Committed | None:
    from huggingface_hub import HfApi

    api = HfApi()
    refs = ask(lambda: api.list_repo_refs(session.repo_id, include_pull_requests=True)).pull_requests or []
    numbers = sorted((int(ref.ref.rpartition("/")[2]) for ref in refs), reverse=True)
    for number in numbers[:_PULL_REQUESTS_LOOKED_AT]:
        oid = _own_head(session, ident, number)
        if oid and ask(partial(api.get_discussion_details, session.repo_id, number)).status in ("open", "draft"):
            return Committed(oid, f"{session.endpoint}/{session.repo_id}/discussions/{number}")
    return None


def _own_head(session: Session, ident: str, number: int) -> str | None:
    """The commit of pull request `number` that has this push id."""
    from huggingface_hub import HfApi

    commits = ask(lambda: list(HfApi().list_repo_commits(session.repo_id, revision=f"refs/pr/{number}")))
    return next((commit.commit_id for commit in commits if f"{ID_LINE}{ident}" in commit.message), None)
