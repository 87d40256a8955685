"""ModelScope as a source: its listing has a sha256 for every file, so everything after the listing is shared.

Two requests are all that is needed, both below /api/v1/models/{id} (read from modelscope-hub 0.5):
GET repo/files?Revision=&Recursive=True and GET repo?Revision=&FilePath=. Settings are those of ModelScope's own client:
MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_CACHE. A token goes to the endpoint only, never along a redirect
to another host.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from qwen_quant.errors import InputError, NetworkError, QwenQuantError
from qwen_quant.hub.failures import hub_failure, redact
from qwen_quant.hub.plan_files import Listing, RemoteFile
from qwen_quant.hub.transport import Body, http_body

DEFAULT_ENDPOINT = "https://modelscope.cn"
DEFAULT_REVISION = "master"
# The server cuts a longer listing off without saying so.
LISTING_LIMIT = 3000
_HEX = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 60.0


def endpoint() -> str:
    """The ModelScope site in use, without a trailing slash."""
    given = os.environ.get("MODELSCOPE_ENDPOINT", "").strip() or DEFAULT_ENDPOINT
    return given.rstrip("/") if "//" in given else f"https://{given.rstrip('/')}"


def default_folder(repo: str) -> Path:
    """Where a model goes without --local-dir: beside what ModelScope's client keeps, in a folder of its own."""
    cache = os.environ.get("MODELSCOPE_CACHE", "").strip() or "~/.cache/modelscope"
    return Path(cache).expanduser() / "qwen-quant" / repo.replace("/", "--")


class ModelScope:
    """The ModelScope hub."""

    name = "modelscope"

    def listing(self, repo: str, revision: str | None) -> Listing:
        """The files of a revision, and the commit it stands at.

        Where the server names no commit, a sha1 over the listed contents stands for it: the same files, the same id.

        Errors: the client's own; InputError for a listing that the server cut off; NetworkError for a strange reply.
        """
        from huggingface_hub import get_session, hf_raise_for_status

        query = urlencode({"Revision": revision or DEFAULT_REVISION, "Recursive": "True"})
        url = f"{endpoint()}/api/v1/models/{quote(repo)}/repo/files?{query}"
        reply = get_session().get(url, headers=_headers(), timeout=_TIMEOUT_SECONDS, follow_redirects=True)
        hf_raise_for_status(reply)
        data = _data(repo, reply)
        entries = data.get("Files") or []
        if len(entries) >= LISTING_LIMIT:
            raise InputError(f"'{repo}' has too many files", f"ModelScope lists {LISTING_LIMIT} at most")
        files = tuple(_remote(entry) for entry in entries if entry.get("Type") != "tree")
        return Listing(self.name, repo, revision, _commit(data, files), files)

    @contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int, *, plain: bool) -> Iterator[Body]:
        """The file's bytes from `start` on. A branch that moved meanwhile shows as a wrong sha256."""
        query = urlencode({"Revision": listing.revision or DEFAULT_REVISION, "FilePath": file.path})
        with http_body(f"{endpoint()}/api/v1/models/{quote(listing.repo)}/repo?{query}", _headers(), start) as body:
            yield body

    def failure(self, name: str, error: BaseException) -> QwenQuantError:
        """The client's exception as ours, in ModelScope's terms."""
        status = getattr(getattr(error, "response", None), "status_code", 0)
        said = _said(error)
        page = f"{endpoint()}/models/{name.partition('@')[0]}"
        what = f"cannot fetch '{name}' from ModelScope"
        if status in (401, 403):
            return NetworkError(
                what, f"it refuses (HTTP {status})", f"set MODELSCOPE_API_TOKEN to a token that may read {page}"
            )
        if status == 404:
            return NetworkError(what, said or "no such model or revision", f"check name and revision: {page}")
        return hub_failure("fetch", name, error)

    def close(self) -> None:
        """Nothing is kept open."""


def _headers() -> dict[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def _said(error: BaseException) -> str:
    """The first line of the message in a refusal's body, which is JSON; empty when there is none."""
    response: Any = getattr(error, "response", None)
    try:
        value = response.json() if response is not None else None
    except (ValueError, RuntimeError):  # RuntimeError: the body of a stream was not read.
        return ""
    lines = redact(str(value.get("Message") or "")).splitlines() if isinstance(value, dict) else []
    return lines[0] if lines else ""


def _data(repo: str, reply: Any) -> dict[str, Any]:
    """The payload of a reply; ModelScope may answer HTTP 200 and say in the body that it failed."""
    try:
        value = reply.json()
    except ValueError as error:
        raise NetworkError(
            f"cannot list '{repo}' at {endpoint()}", "the reply is no JSON", "check MODELSCOPE_ENDPOINT"
        ) from error
    data = value.get("Data") if isinstance(value, dict) else None
    if isinstance(data, list):
        data = {"Files": data}
    if not isinstance(data, dict) or value.get("Success") is False:
        why = redact(str(value.get("Message", "")) if isinstance(value, dict) else "an unknown form of reply")
        raise NetworkError(f"cannot list '{repo}' at {endpoint()}", why, "check name and revision")
    return data


def _remote(entry: dict[str, Any]) -> RemoteFile:
    """One entry of the listing (keys as the server writes them)."""
    path = str(entry.get("Path") or entry.get("Name") or "")
    return RemoteFile(path, int(entry.get("Size") or 0), str(entry.get("Sha256") or "").lower() or None)


def _commit(data: dict[str, Any], files: tuple[RemoteFile, ...]) -> str:
    named = str((data.get("LatestCommitter") or {}).get("Id") or "").lower()
    if _HEX.fullmatch(named):
        return named
    lines = "".join(f"{file.content_id}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha1(lines.encode(), usedforsecurity=False).hexdigest()
