"""LFS uploads: the batch that says where to put what, whole or in parts, and the check afterwards.

Parts are written to their place in one file, so that a 3 GiB upload costs one copy:

    ROOT/uploads/SHA256.bytes        the file, as far as it has come
    ROOT/uploads/SHA256.parts/N      the etag of part N, once it is whole
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from math import ceil
from typing import Any

from tests.loophub.service import REPO, Route, Service, seen, writable
from tests.loophub.state import file_sha256
from tests.loophub.wire import Exchange, Reply, error_reply, json_reply


def batch(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """For every object: nothing when it is stored already, else where to put it and where to have it checked."""
    repo = writable(service, exchange, names["repo"])
    asked = exchange.json()
    objects = [_actions(service, repo.repo_id, item, asked.get("transfers", [])) for item in asked["objects"]]
    parts = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    return json_reply({"transfer": "multipart" if parts else "basic", "objects": objects})


def _actions(service: Service, repo_id: str, item: dict[str, Any], transfers: list[str]) -> dict[str, Any]:
    sha256, size = item["oid"], item["size"]
    value: dict[str, Any] = {"oid": sha256, "size": size}
    if service.state.object_path(sha256).is_file():
        return value
    value["authenticated"] = True
    verify = {"href": f"{service.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
    if size <= service.part_bytes or "multipart" not in transfers:
        upload: dict[str, Any] = {"href": service.signed(f"/storage/{sha256}")}
    else:
        header = {"chunk_size": str(service.part_bytes)}
        for number in range(1, ceil(size / service.part_bytes) + 1):
            header[f"{number:05d}"] = service.signed(f"/storage/{sha256}/parts/{size}/{number}")
        upload = {"href": f"{service.endpoint}/api/complete_multipart?oid={sha256}&size={size}", "header": header}
    value["actions"] = {"upload": upload, "verify": verify}
    return value


def put_whole(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """A file in one request. Bytes that are not those of its name are refused, as S3 does with a checksum."""
    if exchange.token is not None:
        return error_reply(400, "Only one auth mechanism allowed: the Authorization header reached the storage")
    sha256, digest = names["sha256"], hashlib.sha256()
    partial = service.state.root / "uploads" / uuid.uuid4().hex
    try:
        with partial.open("wb") as file:
            for block in exchange.blocks():
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            return error_reply(400, "BadDigest: the content does not match its sha256")
        os.replace(partial, service.state.object_path(sha256))
    finally:
        partial.unlink(missing_ok=True)
    return Reply(200, b"", {"ETag": f'"{sha256[:32]}"'})


def put_part(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """One part, to its place."""
    if exchange.token is not None:
        return error_reply(400, "Only one auth mechanism allowed: the Authorization header reached the storage")
    sha256, number, size = names["sha256"], int(names["number"]), int(names["size"])
    start = (number - 1) * service.part_bytes
    expected = min(service.part_bytes, size - start)
    content, etags = _places(service, sha256)
    etags.mkdir(exist_ok=True)
    with service.state.lock:
        content.touch()
    digest, place = hashlib.sha256(), start
    with content.open("r+b") as file:
        file.seek(start)
        for block in exchange.blocks():
            if place + len(block) > start + expected:
                return error_reply(400, "EntityTooLarge")
            digest.update(block)
            file.write(block)
            place += len(block)
    if place - start != expected:
        return error_reply(400, "IncompleteBody")
    etag = digest.hexdigest()[:32]
    (etags / str(number)).write_text(etag)
    return Reply(200, b"", {"ETag": f'"{etag}"'})


def complete(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """All parts are there: the file under its name, after checking that it is what it is called."""
    sha256, size = exchange.option("oid"), int(exchange.option("size"))
    asked = exchange.json()
    content, etags = _places(service, sha256)
    if service.state.object_path(sha256).is_file():
        return json_reply({"success": True})
    expected = ceil(size / service.part_bytes)
    if asked.get("oid") != sha256 or [part["partNumber"] for part in asked["parts"]] != list(range(1, expected + 1)):
        return error_reply(400, "InvalidPartOrder")
    for part in asked["parts"]:
        kept = etags / str(part["partNumber"])
        if not kept.is_file() or kept.read_text() != part["etag"].strip('"'):
            return error_reply(400, f"InvalidPart: {part['partNumber']}")
    with service.state.lock:
        if content.stat().st_size != size or file_sha256(content) != sha256:
            shutil.rmtree(etags)
            return error_reply(400, "BadDigest: the parts together do not match their sha256")
        os.replace(content, service.state.object_path(sha256))
        shutil.rmtree(etags)
    return json_reply({"success": True})


def verify(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Whether the object arrived."""
    seen(service, exchange, names["repo"])
    asked = exchange.json()
    path = service.state.object_path(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        return error_reply(404, "The object was not found in storage")
    return json_reply({})


def _places(service: Service, sha256: str) -> tuple[Any, Any]:
    uploads = service.state.root / "uploads"
    return uploads / f"{sha256}.bytes", uploads / f"{sha256}.parts"


ROUTES = (
    Route("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    Route("POST", rf"/{REPO}\.git/info/lfs/objects/verify", verify),
    Route("POST", r"/api/complete_multipart", complete),
)
STORAGE_ROUTES = (
    Route("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", put_whole),
    Route("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})/parts/(?P<size>\d+)/(?P<number>\d+)", put_part),
)
