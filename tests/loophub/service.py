"""What every route gets: the state, the mode, the two addresses, and the switch from a path to a function."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.loophub import access
from tests.loophub.access import RefusedError
from tests.loophub.state import Commit, Repository, State
from tests.loophub.wire import Exchange, Reply, error_reply

Mode = Literal["lfs", "xet"]
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"


@dataclass
class Service:
    """A running Hub, as the routes see it."""

    state: State
    mode: Mode
    part_bytes: int  # larger files are sent in parts of this many bytes
    endpoint: str = ""
    storage: str = ""  # the other origin: where large files are put and got, as S3 and the CDN are on the Hub

    @property
    def cas_folder(self) -> Path:
        """Where hf_xet keeps what it uploads."""
        return self.state.root / "cas"

    def signed(self, path: str) -> str:
        """A URL on the storage origin."""
        return f"{self.storage}{path}?X-Amz-Signature={uuid.uuid4().hex}"


Function = Callable[[Service, Exchange, dict[str, str]], Reply]


@dataclass(frozen=True)
class Route:
    """Requests of `method` (several joined by |) whose whole path matches `pattern` are answered by `function`."""

    method: str
    pattern: str
    function: Function


def dispatch(service: Service, routes: tuple[Route, ...], exchange: Exchange) -> Reply:
    """The first route that fits. A refusal raised inside it is its reply; nothing fitting is a 404."""
    for route in routes:
        matched = re.fullmatch(route.pattern, exchange.path)
        if matched and exchange.method in route.method.split("|"):
            try:
                return route.function(service, exchange, matched.groupdict())
            except RefusedError as refused:
                return _as_over_tls(exchange, refused.reply)
    return error_reply(404, f"loophub has no route for {exchange.method} {exchange.path}")


def _as_over_tls(exchange: Exchange, reply: Reply) -> Reply:
    """The client takes any 401 of a repository but "Invalid credentials" for an absent one, by a pattern that wants
    https://. Here, where there is no TLS, the code that means the same makes it do the same.
    """
    message = reply.headers.get("X-Error-Message", "")
    of_repository = exchange.path.startswith("/api/models/") or "/resolve/" in exchange.path
    if (
        reply.status != 401
        or not of_repository
        or "X-Error-Code" in reply.headers
        or message.startswith("Invalid cred")
    ):
        return reply
    return replace(reply, headers=reply.headers | {"X-Error-Code": "RepoNotFound"})


def revision_of(service: Service, repo: Repository, revision: str) -> Commit:
    """The commit a revision names. Raises RefusedError (404, RevisionNotFound)."""
    commit = service.state.resolve(repo, revision)
    if commit is None:
        raise RefusedError(error_reply(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
    return commit


def seen(service: Service, exchange: Exchange, repo_id: str) -> Repository:
    """A repository whose existence the request may know of."""
    return access.see(service.state.repository(repo_id), exchange.token)


def readable(service: Service, exchange: Exchange, repo_id: str) -> Repository:
    """A repository whose files the request may read."""
    return access.read(service.state.repository(repo_id), exchange.token)


def writable(service: Service, exchange: Exchange, repo_id: str) -> Repository:
    """A repository that the request may change."""
    return access.write(service.state.repository(repo_id), exchange.token)
