"""Xet storage on a folder: hf_xet talks to `local://FOLDER`, which the token routes name. Its bytes skip HTTP."""

from __future__ import annotations

import time
from pathlib import Path

from tests.loophub import access
from tests.loophub.service import API, Route, Service, readable, writable
from tests.loophub.state import Entry, large_entry
from tests.loophub.wire import Exchange, Reply, json_reply

TOKEN_SECONDS = 3600


def materialized(service: Service, sha256: str) -> Path | None:
    """Where the bytes of a large file lie."""
    path = service.state.object_path(sha256)
    return path if path.is_file() else None


def stored_entry(service: Service, sha256: str) -> Entry | None:
    """The tree entry of an uploaded large file, or None when nobody uploaded it."""
    path = service.state.object_path(sha256)
    return large_entry(sha256, path.stat().st_size) if path.is_file() else None


def add_object(service: Service, source: bytes | Path) -> Entry:
    """Keep a large file that a test gives; its tree entry."""
    return service.state.store_object(source)


def download_headers(service: Service, repo_id: str, commit: str, xet_hash: str) -> dict[str, str]:
    """What tells the client that a file can be had through Xet, and where the token for it is."""
    route = f"{service.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
    return {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}


def read_token(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    readable(service, exchange, names["repo"])
    return _token(service)


def write_token(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
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
