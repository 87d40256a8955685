"""Xet storage on a folder: hf_xet talks to `local://FOLDER`, which the token routes name. Its bytes skip HTTP.

A commit names a large file by its sha256 only. What hf_xet has uploaded for it, as the storage's server would know, is
in the shards under FOLDER/xet/xorbs/shards. The part of a shard that is read here, after a header of 48 bytes, all
little-endian: per file its hash (32 bytes), flags (u32), segments (u32) and 8 unused bytes; 48 bytes per segment (hash
of the xorb, flags, bytes, first and last chunk); with flag bit 31, 48 bytes more per segment; with bit 30 a record of
48 bytes that starts with the file's sha256. A hash is written as four u64. 32 bytes of 0xFF end the files.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.loophub import access
from tests.loophub.service import API, Route, Service, readable, writable
from tests.loophub.state import Entry, file_sha256, large_entry
from tests.loophub.wire import Exchange, Reply, json_reply

TOKEN_SECONDS = 3600
HEADER_BYTES, RECORD_BYTES = 48, 48
HAS_SHA256, HAS_VERIFICATION = 1 << 30, 1 << 31
SHARD_INDEX = "global_dedup_lookup.redb"
END_OF_FILES = b"\xff" * 32
LOCK_WAIT_SECONDS = 20
_one_at_a_time = threading.Lock()


def materialized(service: Service, sha256: str) -> Path | None:
    """Where the bytes of a large file lie, put together from Xet storage when they came that way."""
    path = service.state.object_path(sha256)
    if path.is_file():
        return path
    entry = stored_entry(service, sha256)
    if entry is None or entry.xet_hash is None:
        return None
    partial = service.state.root / "uploads" / uuid.uuid4().hex
    with _one_at_a_time:
        _download(_view(service), entry.xet_hash, entry.size, partial)
    if file_sha256(partial) != sha256:
        raise ValueError(f"Xet storage holds other bytes under sha256 {sha256}")
    os.replace(partial, path)
    return path


def stored_entry(service: Service, sha256: str) -> Entry | None:
    """The tree entry of an uploaded large file, or None when nobody uploaded it."""
    path = service.state.object_path(sha256)
    found = _in_shards(service, sha256) if service.mode == "xet" else None
    if found is not None:
        return large_entry(sha256, found[1], found[0])
    return large_entry(sha256, path.stat().st_size) if path.is_file() else None


def add_object(service: Service, source: bytes | Path) -> Entry:
    """Keep a large file that a test gives, in Xet storage too where the Hub has it; its tree entry."""
    entry = service.state.store_object(source)
    if service.mode == "xet" and entry.sha256 is not None:
        service.cas_folder.mkdir(exist_ok=True)
        path = service.state.object_path(entry.sha256)
        xet_hash = _unlocked(lambda: _upload(service.cas_folder, path, str(entry.sha256)))
        entry = replace(entry, xet_hash=xet_hash)
    return entry


def damage(service: Service, entry: Entry) -> None:
    """Change one byte of what is stored for a file: in its xorbs, or in its object."""
    folder = service.cas_folder / "xet/xorbs/xorbs"
    paths = [path for path in folder.glob("default.*") if path.suffix != ".tagset"] if entry.xet_hash else []
    for path in paths or [service.state.content_path(entry)]:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0x10
        path.chmod(0o644)
        path.write_bytes(content)


def shard_files(data: bytes) -> Iterator[tuple[str, int, str]]:
    """(sha256, bytes, Xet hash) of every file that a shard describes."""
    place = HEADER_BYTES
    while data[place : place + 32] != END_OF_FILES:
        xet_hash = _hex(data[place : place + 32])
        flags, segments = struct.unpack_from("<II", data, place + 32)
        place += RECORD_BYTES
        size = sum(struct.unpack_from("<I", data, place + n * RECORD_BYTES + 36)[0] for n in range(segments))
        place += segments * RECORD_BYTES * (2 if flags & HAS_VERIFICATION else 1)
        if flags & HAS_SHA256:
            yield _hex(data[place : place + 32]), size, xet_hash
            place += RECORD_BYTES


def _hex(value: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", value))


def _in_shards(service: Service, sha256: str) -> tuple[str, int] | None:
    """(Xet hash, bytes) of a file that hf_xet has uploaded."""
    for path in (service.cas_folder / "xet/xorbs/shards").glob("*.mdb"):
        for found, size, xet_hash in shard_files(path.read_bytes()):
            if found == sha256:
                return xet_hash, size
    return None


def _view(service: Service) -> Path:
    """The same storage under another name: hf_xet locks its index of shards, which the client may hold."""
    view = service.state.root / "cas-view/xet/xorbs"
    view.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(service.cas_folder / "xet/xorbs" / SHARD_INDEX, view / SHARD_INDEX)
    for name in ("xorbs", "shards"):
        if not (view / name).is_symlink():
            (view / name).symlink_to(service.cas_folder / "xet/xorbs" / name)
    return view.parent.parent


def _connection(folder: Path) -> dict[str, Any]:
    return {"endpoint": f"local://{folder}", "token": "loopback", "token_expiry_unix_secs": 1 << 40}


def _upload(folder: Path, path: Path, sha256: str) -> str:
    import hf_xet

    with hf_xet.XetSession().new_upload_commit(**_connection(folder)) as commit:
        handle = commit.start_upload_file(str(path), sha256=sha256)
    return str(handle.result().xet_info.hash)


def _download(folder: Path, xet_hash: str, size: int, target: Path) -> None:
    import hf_xet

    with hf_xet.XetSession().new_file_download_group(**_connection(folder)) as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))


def _unlocked(work: Callable[[], str]) -> str:
    """Do it once the client has let go of the storage's lock."""
    until = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return work()
        except RuntimeError as problem:
            if "Cannot acquire lock" not in str(problem) or time.monotonic() > until:
                raise
            time.sleep(0.1)


def download_headers(service: Service, repo_id: str, commit: str, xet_hash: str) -> dict[str, str]:
    """What tells the client that a file can be had through Xet, and where the token for it is."""
    route = f"{service.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
    return {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}


def read_token(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Where to read from, for somebody who may read the repository."""
    readable(service, exchange, names["repo"])
    return _token(service)


def write_token(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Where to write to, for somebody who may change the repository (or, with create_pr, is anybody)."""
    access.require_person(exchange.token)
    if not exchange.option("create_pr"):
        writable(service, exchange, names["repo"])
    return _token(service)


def _token(service: Service) -> Reply:
    service.cas_folder.mkdir(exist_ok=True)
    url, expires = f"local://{service.cas_folder}", int(time.time()) + TOKEN_SECONDS
    headers = {"X_Xet_Cas_Url": url, "X_Xet_Access_Token": "loopback", "X_Xet_Token_Expiration": str(expires)}
    return json_reply({"casUrl": url, "exp": expires, "accessToken": "loopback"}, 200, **headers)


ROUTES = (
    Route("GET", rf"{API}/xet-read-token/(?P<revision>.+)", read_token),
    Route("GET", rf"{API}/xet-write-token/(?P<revision>.+)", write_token),
)
