"""Every exception of the hub client as one of ours: what failed, why, what to do next, and no secret in any of it.

The order of `_RULES` decides: an exception takes the first row that fits it. The names of near misses (repositories,
revisions) are asked of the hub itself; when it does not answer, the message simply has none.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from qwen_quant.errors import InputError, NetworkError, QwenQuantError

_HIDDEN = "<hidden>"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]+|(?<=[Bb]earer )\S+|\bms-[0-9a-f-]{16,}")
_URL_SECRETS = re.compile(r"(https?://)(?:[^/\s@]+@)?([^\s?]+)\?\S+|(https?://)[^/\s@]+@")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
_NEAREST = 5
_LISTED_MODELS = 200


class Failed(NamedTuple):
    """What was attempted and how it ended, as the rules read it."""

    action: str
    repo: str
    error: BaseException

    @property
    def name(self) -> str:
        """The repository without "@revision"."""
        return self.repo.partition("@")[0]

    @property
    def status(self) -> int:
        """HTTP status of the reply, 0 when there was none."""
        return int(getattr(getattr(self.error, "response", None), "status_code", 0) or 0)

    @property
    def sent_token(self) -> bool:
        """Whether the failed request carried a token."""
        response = getattr(self.error, "response", None)
        return response is not None and "authorization" in response.request.headers

    def is_a(self, *names: str) -> bool:
        """Whether the exception's class, or one it derives from, has one of these names."""
        return any(cls.__name__ in names for cls in type(self.error).__mro__)


def client_errors() -> tuple[type[Exception], ...]:
    """What a call of the hub client may raise for reasons outside this program: give these to `except`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Its first base is the base of every error of the HTTP library that this huggingface_hub uses (httpx2 at 2.4).
    library: type[Exception] = HfHubHTTPError.__mro__[1]
    return (library, HFValidationError, OSError)


def redact(text: str) -> str:
    """`text` without tokens, passwords in URLs and query strings (signed links carry their signature there)."""
    for variable in _TOKEN_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= 4:
            text = text.replace(secret, _HIDDEN)
    return _URL_SECRETS.sub(lambda match: (match[1] or match[3]) + (match[2] or ""), _TOKEN.sub(_HIDDEN, text))


def hub_failure(action: str, repo: str, error: BaseException) -> QwenQuantError:
    """The client's exception as ours.

    Args:
        action: a verb with its preposition, as in "cannot fetch 'org/name'" or "cannot push to 'org/name'".
        repo: the hub id, with "@revision" where one was asked for.
        error: what the client raised; one of ours is returned as it is.
    """
    if isinstance(error, QwenQuantError):
        return error
    failed = Failed(action, repo, error)
    return next(rule(failed) for fits, rule in _RULES if fits(failed))


def nearest_names(repo: str) -> list[str]:
    """Hub ids close to `repo`, best first, from the hub's search (empty when it does not answer)."""
    from huggingface_hub import HfApi

    owner, _, name = repo.rpartition("/")
    found: list[str] = []
    for query in ({"author": owner}, {"search": name}):
        try:
            found += [str(model.id) for model in HfApi().list_models(**query, limit=_LISTED_MODELS)]  # type: ignore[arg-type]
        except client_errors() + (ValueError,):
            continue
    return _closest(repo, found)


def nearest_revisions(repo: str, revision: str) -> list[str]:
    """Branches and tags of `repo`, those close to `revision` first (empty when the hub does not answer)."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo)
    except client_errors() + (ValueError,):
        return []
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    close = _closest(revision, names)
    return [*close, *(name for name in names if name not in close)][:_NEAREST]


def _closest(word: str, names: list[str]) -> list[str]:
    """The names that resemble `word`, whatever their case, best first."""
    by_key = {name.lower(): name for name in names}
    return [by_key[key] for key in difflib.get_close_matches(word.lower(), list(by_key), n=_NEAREST, cutoff=0.6)]


def _network(failed: Failed, why: str, step: str) -> NetworkError:
    return NetworkError(redact(f"cannot {failed.action} '{failed.repo}'"), redact(why), redact(step))


def _first_line(error: BaseException) -> str:
    """What the server said, else the exception's own first line."""
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def _disk_full(failed: Failed) -> QwenQuantError:
    place = getattr(failed.error, "filename", None)
    return InputError(
        f"cannot {failed.action} '{failed.repo}'",
        f"disk full{f' at {place}' if place else ''}",
        "free some space and run the same command again: what is complete is kept",
    )


def _bad_name(failed: Failed) -> QwenQuantError:
    return InputError(f"'{failed.name}' is not a hub id", redact(_first_line(failed.error)), "give org/name[@revision]")


def _offline(failed: Failed) -> QwenQuantError:
    return _network(
        failed,
        "it is not in the local cache, and HF_HUB_OFFLINE allows no request",
        "unset HF_HUB_OFFLINE, or give the folder of a local copy",
    )


def _gated(failed: Failed) -> QwenQuantError:
    page = f"{_endpoint()}/{failed.name}"
    login = "" if failed.sent_token else ", then log in (hf auth login) or set HF_TOKEN"
    return _network(failed, "its owner asks every reader to accept terms first", f"accept them at {page}{login}")


def _bad_token(failed: Failed) -> QwenQuantError:
    return _network(
        failed,
        "the hub does not accept this token: it is wrong, revoked or expired",
        f"make a new one at {_endpoint()}/settings/tokens and set HF_TOKEN, or hf auth login",
    )


def _no_repository(failed: Failed) -> QwenQuantError:
    near = nearest_names(failed.name)
    check = f"did you mean {', '.join(near)}?" if near else "check the name"
    if failed.sent_token:
        why = "there is no such repository, or this token may not see it"
    else:
        why = "there is no such repository, or it is private and no token was sent"
        check += "; for a private one log in (hf auth login) or set HF_TOKEN"
    return _network(failed, why, check)


def _no_revision(failed: Failed) -> QwenQuantError:
    revision = failed.repo.partition("@")[2]
    near = nearest_revisions(failed.name, revision)
    listed = f"it has {', '.join(near)}" if near else "check the branch, tag or commit after the '@'"
    return _network(failed, f"it has no branch, tag or commit '{revision or 'main'}'", listed)


def _no_file(failed: Failed) -> QwenQuantError:
    return _network(failed, _first_line(failed.error), "the repository changed, or does not hold that file: run again")


def _disabled(failed: Failed) -> QwenQuantError:
    return _network(failed, "the hub has disabled it", f"see {_endpoint()}/{failed.name}")


def _no_permission(failed: Failed) -> QwenQuantError:
    return _network(
        failed,
        f"the hub refuses: {_first_line(failed.error)}",
        f"use a token whose permissions cover this repository: {_endpoint()}/settings/tokens",
    )


def _changed(failed: Failed) -> QwenQuantError:
    return _network(
        failed,
        "somebody committed to the target since this run looked at it, and nothing was overwritten",
        f"look at {_endpoint()}/{failed.name}/commits and run the same command again",
    )


def _rate_limited(failed: Failed) -> QwenQuantError:
    headers: Any = getattr(getattr(failed.error, "response", None), "headers", {})
    wait = str(headers.get("retry-after", ""))
    step = f"wait {wait} s and run again" if wait.isdigit() else "wait a few minutes and run again"
    return _network(failed, "too many requests (HTTP 429)", f"{step}; a token (HF_TOKEN) has a higher limit")


def _server_trouble(failed: Failed) -> QwenQuantError:
    return _network(failed, f"the hub answers HTTP {failed.status}", "run the same command again: it continues")


def _refused(failed: Failed) -> QwenQuantError:
    return _network(failed, f"HTTP {failed.status}: {_first_line(failed.error)}", "check the repository and run again")


def _local_trouble(failed: Failed) -> QwenQuantError:
    error = failed.error
    why = f"{getattr(error, 'filename', '')}: {getattr(error, 'strerror', '') or error}"
    return InputError(f"cannot {failed.action} '{failed.repo}'", redact(why), "check that file or folder and run again")


def _connection(failed: Failed) -> QwenQuantError:
    step = "check the connection (HF_ENDPOINT, proxies) and run the same command again, or give a local folder"
    return _network(failed, _first_line(failed.error), step)


def _is_disk_full(failed: Failed) -> bool:
    code = getattr(failed.error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(failed.error)


def _is_local(failed: Failed) -> bool:
    error = failed.error
    network = (ConnectionError, TimeoutError)
    return (
        isinstance(error, OSError) and not isinstance(error, network) and getattr(error, "filename", None) is not None
    )


_RULES: tuple[tuple[Callable[[Failed], bool], Callable[[Failed], QwenQuantError]], ...] = (
    (_is_disk_full, _disk_full),
    (lambda f: f.is_a("HFValidationError"), _bad_name),
    (lambda f: f.is_a("OfflineModeIsEnabled", "LocalEntryNotFoundError"), _offline),
    (lambda f: f.is_a("GatedRepoError"), _gated),
    # The hub answers 401 for a missing repository too, but only to a request without a token.
    (lambda f: f.status == 401 and f.sent_token, _bad_token),
    (lambda f: f.is_a("RepositoryNotFoundError") or f.status == 401, _no_repository),
    (lambda f: f.is_a("RevisionNotFoundError"), _no_revision),
    (lambda f: f.is_a("EntryNotFoundError"), _no_file),
    (lambda f: f.is_a("DisabledRepoError"), _disabled),
    (lambda f: f.status == 403, _no_permission),
    (lambda f: f.status == 412, _changed),
    (lambda f: f.status == 429, _rate_limited),
    (lambda f: f.status >= 500, _server_trouble),
    (lambda f: f.status >= 400, _refused),
    (_is_local, _local_trouble),
    (lambda f: True, _connection),
)
