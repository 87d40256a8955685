"""What every request of a push shares: the target, the token's headers, patience, and a client that tells no secret."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from qwen_quant import __version__
from qwen_quant.errors import NetworkError
from qwen_quant.hub.transport import RetryPolicy, patiently

MAIN_BRANCH = "main"
TIMEOUT_SECONDS = 60.0
COMMIT_TIMEOUT_SECONDS = 600.0
POLICY = RetryPolicy()

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A push's target and how to speak to it. The headers hold the token, so they are in no repr.

    Attributes:
        endpoint: of the hub, without a closing slash.
        repo_id: ORG/NAME. branch: where the commit goes, or what a pull request is against.
        create_pr: open a pull request instead of committing.
    """

    endpoint: str
    repo_id: str
    branch: str
    create_pr: bool
    headers: dict[str, str] = field(repr=False, compare=False)

    @property
    def api_url(self) -> str:
        """The repository's own part of the API."""
        return f"{self.endpoint}/api/models/{self.repo_id}"

    @property
    def quoted_branch(self) -> str:
        """The branch as a part of a path."""
        return quote(self.branch, safe="")


def open_session(repo_id: str, branch: str | None, *, create_pr: bool, need_token: bool = True) -> Session:
    """The session of a push to `branch` (main when None).

    Errors: NetworkError without a token, or where HF_HUB_OFFLINE forbids every request.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    _silence_client()
    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"cannot push to '{repo_id}'", "HF_HUB_OFFLINE allows no request", "unset HF_HUB_OFFLINE")
    if need_token and get_token() is None:
        raise NetworkError(f"cannot push to '{repo_id}'", "there is no token", "log in (hf auth login) or set HF_TOKEN")
    headers = build_hf_headers(library_name="qwen-quant", library_version=__version__)
    return Session(str(constants.ENDPOINT).rstrip("/"), repo_id, branch or MAIN_BRANCH, create_pr, headers)


def _silence_client() -> None:
    """Keep the client's own log quiet: its debug lines hold the token, its warnings hold signed URLs."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as client_logging

    if constants.HF_DEBUG:
        _LOG.warning("HF_DEBUG is ignored by push: it would print the token")
        constants.HF_DEBUG = False
    client_logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()


def ask(call: Callable[[], T]) -> T:
    """The result of a request that may be repeated, with patience for a busy server."""
    return patiently(call, POLICY, threading.Event())


def post_json(session: Session, url: str, value: dict[str, Any], params: dict[str, str] | None = None) -> Any:
    """The JSON reply to a POST that may be repeated. Raises what the client raises."""
    from huggingface_hub import get_session, hf_raise_for_status

    def once() -> Any:
        reply = get_session().post(url, json=value, headers=session.headers, params=params, timeout=TIMEOUT_SECONDS)
        hf_raise_for_status(reply)
        return reply.json()

    return ask(once)
