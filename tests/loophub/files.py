"""Downloads: the metadata of a file on the Hub's own origin, the bytes of a large one on the storage origin."""

from __future__ import annotations

from urllib.parse import quote

from tests.loophub import xet
from tests.loophub.service import REPO, Route, Service, readable, revision_of
from tests.loophub.state import Entry
from tests.loophub.wire import Exchange, Reply, error_reply, file_reply

REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


def resolve(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """A small file: a redirect within the Hub. A large one: a redirect to storage, with its sha256 and size."""
    repo = readable(service, exchange, names["repo"])
    commit = revision_of(service, repo, names["revision"])
    headers = {"X-Repo-Commit": commit.oid}
    entry = commit.files.get(names["path"])
    if entry is None:
        refused = error_reply(404, "Entry not found", "EntryNotFound")
        return Reply(404, refused.body, refused.headers | headers)
    if entry.sha256 is None:
        cached = f"/api/resolve-cache/models/{repo.repo_id}/{commit.oid}/{quote(names['path'])}"
        headers |= {"Location": cached, "X-Linked-Etag": f'"{entry.blob_id}"', "X-Linked-Size": str(entry.size)}
        return Reply(307, b"", headers)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    headers["Location"] = service.signed(f"/storage/{entry.sha256}")
    if service.mode == "xet" and entry.xet_hash:
        headers |= xet.download_headers(service, repo.repo_id, commit.oid, entry.xet_hash)
    return Reply(302, b"", headers)


def cached(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """A small file of one commit."""
    repo = readable(service, exchange, names["repo"])
    commit = revision_of(service, repo, names["revision"])
    entry = commit.files.get(names["path"])
    if entry is None:
        return error_reply(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.blob_id}"'}
    return file_reply(exchange, service.state.content_path(entry), headers)


def stored(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """A large file's bytes. Storage knows its own signatures only: the Hub's token must not come here."""
    if exchange.token is not None:
        return error_reply(400, "Only one auth mechanism allowed: the Authorization header reached the storage")
    if not exchange.option("X-Amz-Signature"):
        return error_reply(403, "Access denied: not a signed URL")
    path = xet.materialized(service, names["sha256"])
    if path is None:
        return error_reply(404, "NoSuchKey")
    return file_reply(exchange, path, {"ETag": f'"{names["sha256"]}"'})


def entry_bytes(service: Service, entry: Entry) -> bytes:
    """A file's content, large or small."""
    path = xet.materialized(service, entry.sha256) if entry.sha256 else service.state.content_path(entry)
    assert path is not None
    return path.read_bytes()


ROUTES = (
    Route("GET|HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    Route("GET|HEAD", rf"/api/resolve-cache/models/{REPO}/(?P<revision>[0-9a-f]+)/(?P<path>.+)", cached),
)
STORAGE_ROUTES = (Route("GET|HEAD", r"/storage/(?P<sha256>[0-9a-f]{64})", stored),)
