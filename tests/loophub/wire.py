"""HTTP mechanics: one request as an `Exchange`, its answer as a `Reply`, and the faults between them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loophub.faults import BEFORE_THE_WORK, Fault, FaultClock

BLOCK_BYTES = 1 << 20


class ConnectionCutError(Exception):
    """The peer, or a fault, ended the connection."""


@dataclass(frozen=True)
class FileBody:
    """Bytes `start` to `start + length` of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Reply:
    """What is sent back: a status, headers, and a body in memory or in a file."""

    status: int = 200
    body: bytes | FileBody = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """`value` as a JSON body; underscores in header names become hyphens."""
    named = {"Content-Type": "application/json; charset=utf-8"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return Reply(status, json.dumps(value).encode(), named)


def error_reply(status: int, message: str, code: str = "", **more: Any) -> Reply:
    """An error as the Hub words it: in the body and in X-Error-Message, with X-Error-Code where it has one."""
    headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
    return json_reply({"error": message} | more, status, **headers)


@dataclass
class Exchange:
    """One request being answered. The body is read by the route that wants it."""

    method: str
    path: str  # unquoted, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    read: Callable[[int], bytes]
    length: int  # bytes of the request's body
    fault: Fault | None = None
    received: int = 0

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" and token else None

    def option(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def blocks(self) -> Iterator[bytes]:
        """The request's body in blocks, with the faults of an upload: cut after a half, a flipped byte, slow."""
        stop = self.length // 2 if self.fault and self.fault.kind == "cut" else self.length
        while self.received < stop:
            block = self.read(min(BLOCK_BYTES if self.fault is None else 1 << 16, stop - self.received))
            if not block:
                raise ConnectionCutError("the client went away")
            if self.fault and self.fault.kind == "slow":
                time.sleep(len(block) / self.fault.bytes_per_second)
            if self.fault and self.fault.kind == "flip" and self.method == "PUT" and self.received == 0:
                block = flip(block)
            self.received += len(block)
            yield block
        if stop < self.length:
            raise ConnectionCutError("cut by a fault")

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")


def flip(block: bytes) -> bytes:
    """The block with one bit of its middle byte inverted."""
    changed = bytearray(block)
    if changed:
        changed[len(changed) // 2] ^= 0x10
    return bytes(changed)


@dataclass(frozen=True)
class Served:
    """One line of the server's log."""

    method: str
    path: str  # with the query, as sent
    status: int  # 0: no reply was sent
    fault: str
    received_bytes: int
    sent_bytes: int
    authorized: bool


Answer = Callable[[Exchange], Reply]


@dataclass
class Listener:
    """One port. `answer` turns an exchange into a reply; every request is logged and may meet a fault."""

    answer: Answer
    clock: FaultClock
    log: list[Served]
    port: int = 0
    _server: _Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"listener": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.open_sockets: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open_sockets.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """End kept-alive connections too: a stopped server answers nobody."""
        for request in list(self.open_sockets):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    listener: Listener

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent: `Hub.log` has it."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        exchange = Exchange(
            self.command,
            unquote(parts.path),
            parse_qs(parts.query, keep_blank_values=True),
            {name.lower(): value for name, value in self.headers.items()},
            self.rfile.read,
            int(self.headers.get("Content-Length") or 0),
            self.listener.clock.due(f"{self.command} {self.path}"),
        )
        status, sent = 0, 0
        try:
            reply = self._reply(exchange)
            status = reply.status
            sent = self._send(exchange, reply)
        except (ConnectionCutError, OSError):
            self._drop()
        finally:
            kind = exchange.fault.kind if exchange.fault else ""
            self.listener.log.append(
                Served(self.command, self.path, status, kind, exchange.received, sent, exchange.token is not None)
            )

    def _reply(self, exchange: Exchange) -> Reply:
        fault = exchange.fault
        if fault is not None and fault.kind == "close":
            raise ConnectionCutError("closed by a fault")
        if fault is not None and fault.kind in BEFORE_THE_WORK:
            reply = refusal(fault)
        else:
            reply = self.listener.answer(exchange)
        while exchange.received < exchange.length and (
            block := exchange.read(min(BLOCK_BYTES, exchange.length - exchange.received))
        ):
            exchange.received += len(block)  # an unread body would be taken for the next request
        if fault is not None and fault.kind == "close-after":
            raise ConnectionCutError("the reply is lost")
        return reply

    def _send(self, exchange: Exchange, reply: Reply) -> int:
        """Write the reply with the fault of its body; returns how many bytes of body went out."""
        body = reply.body
        length = body.length if isinstance(body, FileBody) else len(body)
        self.send_response(reply.status)
        headers = {"Content-Length": str(length), "X-Request-Id": hashlib.sha1(self.path.encode()).hexdigest()[:16]}
        for name, value in (headers | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return 0
        fault = exchange.fault
        stop = length // 2 if fault and fault.kind == "cut" else length
        sent = 0
        for block in _body_blocks(body, stop, 1 << 16 if fault else BLOCK_BYTES):
            if fault and fault.kind == "flip" and exchange.method == "GET" and sent == 0:
                block = flip(block)
            if fault and fault.kind == "slow":
                time.sleep(len(block) / fault.bytes_per_second)
            self.wfile.write(block)
            sent += len(block)
        if stop < length:
            self._drop()
        return sent

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _body_blocks(body: bytes | FileBody, stop: int, block_bytes: int) -> Iterator[bytes]:
    if isinstance(body, bytes):
        for start in range(0, stop, block_bytes):
            yield body[start : min(start + block_bytes, stop)]
        return
    with body.path.open("rb") as file:
        file.seek(body.start)
        while stop > 0 and (block := file.read(min(block_bytes, stop))):
            stop -= len(block)
            yield block


def refusal(fault: Fault) -> Reply:
    """What a fault says instead of doing the work."""
    if fault.kind == "429":
        wait = fault.retry_after_seconds
        limits = {
            "Retry_After": str(wait),
            "RateLimit": f'"api";r=0;t={wait}',
            "RateLimit_Policy": '"fixed window";"api";q=500;w=300',
        }
        return json_reply({"error": "We had to rate limit you, you hit the quota."}, 429, **limits)
    if fault.kind == "412":
        return error_reply(412, "A commit has happened since. Please refresh and try again.")
    if fault.kind == "401":
        return error_reply(401, 'User Access Token "loopback" is expired')
    return error_reply(
        int(fault.kind),
        {"503": "Service Unavailable"}.get(
            fault.kind, "Internal Error - We're working hard to fix this as soon as possible!"
        ),
    )


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte asked for, or None for the whole. A range outside raises ValueError (a 416)."""
    matched = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if not matched or matched.group(0) == "bytes=-":
        return None
    first, last = matched.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        raise ValueError(f"bytes */{size}")
    return start, end


def file_reply(exchange: Exchange, path: Path, headers: dict[str, str]) -> Reply:
    """A file, or the part of it that a Range header asks for (206, 416)."""
    size = path.stat().st_size
    try:
        wanted = byte_range(exchange.headers.get("range"), size)
    except ValueError as problem:
        return Reply(416, b"", {"Content-Range": str(problem)})
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
    if wanted is None:
        return Reply(200, FileBody(path, 0, size), headers)
    start, end = wanted
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Reply(206, FileBody(path, start, end - start + 1), headers)
