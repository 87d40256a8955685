"""What every source shares: one GET that may continue in the middle of a file, and patience with a busy server.

Requests go through the hub client's own HTTP session, so that proxies, certificates and HF_HUB_OFFLINE count here too.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from qwen_quant.errors import QwenQuantError
from qwen_quant.hub.failures import client_errors, redact

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from qwen_quant.hub.plan_files import Listing, RemoteFile

_LOG = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_SECONDS = 300.0
_NO_SUCH_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is repeated in a row without anything gained, and the first of the doubling waits."""

    attempts: int = 6
    first_wait_seconds: float = 0.5


@dataclass(frozen=True)
class Body:
    """Bytes of a file from offset `start` on, which is 0 where the server does not continue in the middle."""

    start: int
    chunks: Iterator[bytes]


class Source(Protocol):
    """A place that repositories come from."""

    name: str

    def listing(self, repo: str, revision: str | None) -> Listing:
        """The commit of `revision` and its files. Raises what the client raises."""

    def open(self, listing: Listing, file: RemoteFile, start: int, *, plain: bool) -> AbstractContextManager[Body]:
        """The bytes of `file` from `start` on; `plain` asks for ordinary HTTP where there is something better."""

    def failure(self, name: str, error: BaseException) -> QwenQuantError:
        """The client's exception as ours; `name` is org/name[@revision]."""

    def close(self) -> None:
        """Stop what is under way."""


class StoppedError(Exception):
    """Another thread failed or the user stopped the run; what was received is kept."""


class Broken(OSError):
    """The body ended early, or the server sent another part of the file than was asked for."""


@contextmanager
def http_body(url: str, headers: Mapping[str, str], start: int) -> Iterator[Body]:
    """GET `url` from byte `start` on; a server that ignores Range gives the whole file, and `Body.start` says so.

    Errors: the client's own; Broken for a reply that begins elsewhere.
    """
    from huggingface_hub import constants, get_session, hf_raise_for_status

    # A compressed reply could not be continued: its ranges would count compressed bytes.
    sent = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    session, timeout = get_session(), float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with session.stream("GET", url, headers=sent, timeout=timeout, follow_redirects=True) as reply:
        hf_raise_for_status(reply)
        yield Body(_first_byte(reply.status_code, reply.headers, start), reply.iter_bytes(CHUNK_BYTES))


def _first_byte(status: int, headers: Mapping[str, str], start: int) -> int:
    """Offset of the first byte of a reply to a request for `start` and the rest."""
    if status != 206 or not start:
        return 0
    match = _CONTENT_RANGE.match(headers.get("content-range", ""))
    if match is None or int(match[1]) != start or headers.get("content-encoding", "identity") != "identity":
        raise Broken(f"asked for byte {start} and got '{headers.get('content-range')}'")
    return start


def _no_such_host(error: BaseException | None) -> bool:
    """Whether the resolver said that there is no such host (and not that it should be asked again)."""
    while error is not None:
        if isinstance(error, socket.gaierror):
            return error.errno in _NO_SUCH_HOST
        error = error.__cause__ or error.__context__
    return False


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in RETRIED_STATUS
    if _no_such_host(error):
        return False
    if isinstance(error, Broken | ConnectionError | TimeoutError) and type(error).__name__ != "OfflineModeIsEnabled":
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"})


def wait_seconds(error: BaseException, failures: int, policy: RetryPolicy) -> float:
    """How long to wait after the `failures`-th failure in a row: what the server asks for, else twice as long each."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("retry-after", ""))
    if asked.isdigit():
        return min(float(asked), LONGEST_WAIT_SECONDS)
    # Many threads that failed together must not come back together.
    return policy.first_wait_seconds * 2 ** (failures - 1) * random.uniform(0.75, 1.25)


def patiently(call: Callable[[], T], policy: RetryPolicy, stop: threading.Event) -> T:
    """The result of `call`, repeated while it fails in passing; the last failure is raised."""
    failures = 0
    while True:
        try:
            return call()
        except client_errors() as error:
            failures += 1
            if failures >= policy.attempts or not is_passing(error):
                raise
            _LOG.warning("no answer yet (%s): trying again", redact(str(error)).partition("\n")[0])
            pause(wait_seconds(error, failures, policy), stop)


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait (StoppedError when the run is stopped meanwhile)."""
    if stop.wait(seconds):
        raise StoppedError
