"""Repositories: who am I, create, list, info, tree, refs, history."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs

from tests.loophub import access
from tests.loophub.service import API, Route, Service, readable, revision_of, seen
from tests.loophub.state import GITATTRIBUTES, Commit, Entry, Repository, pointer
from tests.loophub.wire import Exchange, Reply, error_reply, json_reply

TREE_PAGE, HISTORY_PAGE = 1000, 50


def whoami(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    person = access.require_person(exchange.token)
    token = {"accessToken": {"displayName": "loopback", "role": person.role}, "type": "access_token"}
    return json_reply({"type": "user", "id": person.name, "name": person.name, "fullname": person.name, "orgs": [],
                       "auth": token})  # fmt: skip


def create(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Make a repository with its first commit, which holds .gitattributes as on the Hub."""
    person = access.require_person(exchange.token)
    asked = exchange.json()
    repo_id = f"{asked.get('organization') or person.name}/{asked['name']}"
    if person.role != "write" or not access.may_write(person, repo_id):
        namespace = repo_id.split("/")[0]
        return error_reply(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{service.endpoint}/{repo_id}"
    with service.state.lock:
        if service.state.repository(repo_id) is not None:
            return error_reply(409, "You already created this model repo", url=url)
        repo = Repository(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        files = {".gitattributes": service.state.store_blob(GITATTRIBUTES)}
        service.state.add_commit(repo, "main", "initial commit", "", files)
    return json_reply({"url": url, "name": repo_id, "id": hashlib.sha1(repo_id.encode()).hexdigest()[:24]})


def delete(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    asked = exchange.json()
    person = access.require_person(exchange.token)
    repo_id = f"{asked.get('organization') or person.name}/{asked['name']}"
    access.write(service.state.repository(repo_id), exchange.token)
    with service.state.lock:
        service.state.delete(repo_id)
    return Reply()


def listing(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Models by `author` and `search` (a part of the name, any case)."""
    person = access.person_of(exchange.token)
    author, search = exchange.option("author"), exchange.option("search").lower()
    found = [
        described(service, repo, service.state.resolve(repo, "main"))
        for repo in service.state.repositories()
        if (not repo.private or (person is not None and person.member))
        and repo.repo_id.startswith(f"{author}/" if author else "")
        and search in repo.repo_id.lower()
    ]
    return json_reply(found[: int(exchange.option("limit") or 1000)])


def info(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """A model at a revision, with sizes and hashes when `blobs` is asked. A gated one's metadata is public."""
    repo = seen(service, exchange, names["repo"])
    commit = revision_of(service, repo, names.get("revision") or "main")
    value = described(service, repo, commit)
    value["sha"] = commit.oid
    blobs = exchange.option("blobs").lower() in ("true", "1")
    value["siblings"] = [_sibling(path, entry, blobs) for path, entry in commit.files.items()]
    return json_reply(value)


def described(service: Service, repo: Repository, commit: Commit | None) -> dict[str, Any]:
    """A model as listings show it."""
    return {
        "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.repo_id.split("/")[0],
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": commit.date if commit else "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "usedStorage": sum(entry.size for entry in commit.files.values()) if commit else 0,
    }


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"rfilename": path}
    if blobs:
        value |= {"blobId": entry.blob_id, "size": entry.size}
        if entry.sha256:
            size = len(pointer(entry.sha256, entry.size))
            value["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": size}
    return value


def tree(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """The files (and folders) of a revision, 1000 a page with a Link to the next."""
    repo = seen(service, exchange, names["repo"])
    commit = revision_of(service, repo, names["revision"])
    folder = f"{names.get('folder') or ''}".strip("/")
    recursive = exchange.option("recursive").lower() in ("true", "1")
    rows = tree_rows(commit, folder, recursive)
    if folder and not rows:
        return error_reply(404, f"{folder} does not exist on {names['revision']!r}", "EntryNotFound")
    start = int(exchange.option("cursor") or 0)
    page, headers = rows[start : start + TREE_PAGE], {}
    if start + TREE_PAGE < len(rows):
        address = f"{service.endpoint}{exchange.path}?recursive={recursive}&cursor={start + TREE_PAGE}"
        headers["Link"] = f'<{address}>; rel="next"'
    return json_reply(page, 200, **headers)


def tree_rows(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Folders first met, then their files, in order of path."""
    rows: list[dict[str, Any]] = []
    folders: set[str] = set()
    for path, entry in commit.files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        inner = path[len(folder) + 1 if folder else 0 :].split("/")
        for depth in range(1, len(inner)):
            name = "/".join([*([folder] if folder else []), *inner[:depth]])
            if name not in folders and (recursive or depth == 1):
                folders.add(name)
                rows.append(
                    {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
                )
        if recursive or len(inner) == 1:
            rows.append(file_row(path, entry))
    return rows


def file_row(path: str, entry: Entry) -> dict[str, Any]:
    """One file as `tree` and `paths-info` show it."""
    row: dict[str, Any] = {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": path}
    if entry.sha256:
        size = len(pointer(entry.sha256, entry.size))
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
    if entry.xet_hash:
        row["xetHash"] = entry.xet_hash
    return row


def paths_info(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Some paths of a revision; absent ones are left out."""
    repo = seen(service, exchange, names["repo"])
    commit = revision_of(service, repo, names["revision"])
    body = exchange.body()
    as_json = exchange.headers.get("content-type", "").startswith("application/json")
    paths = json_paths(body) if as_json else parse_qs(body.decode()).get("paths", [])
    rows = {row["path"]: row for row in tree_rows(commit, "", True)}
    return json_reply([rows[path.strip("/")] for path in paths if path.strip("/") in rows])


def json_paths(body: bytes) -> list[str]:
    """The `paths` of a JSON body."""
    return list(json.loads(body)["paths"])


def refs(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    repo = seen(service, exchange, names["repo"])
    value: dict[str, Any] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, oid in repo.branches.items():
        if name.startswith("refs/pr/"):
            value["pullRequests"].append({"name": name.rsplit("/", 1)[1], "ref": name, "targetCommit": oid})
        else:
            value["branches"].append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid})
    value["tags"] = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
    if not exchange.option("include_prs"):
        del value["pullRequests"]
    return json_reply(value)


def history(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Commits of a revision, newest first, 50 a page."""
    repo = seen(service, exchange, names["repo"])
    revision_of(service, repo, names["revision"])
    commits = service.state.history(repo, names["revision"])
    page = int(exchange.option("p") or 0)
    shown = commits[page * HISTORY_PAGE : (page + 1) * HISTORY_PAGE]
    rows = [
        {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": "loop"}]}
        for c in shown
    ]
    headers = {"X_Total_Count": str(len(commits))}
    if (page + 1) * HISTORY_PAGE < len(commits):
        headers["Link"] = f'<{service.endpoint}{exchange.path}?p={page + 1}>; rel="next"'
    return json_reply(rows, 200, **headers)


def auth_check(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    readable(service, exchange, names["repo"])
    return json_reply({})


ROUTES = (
    Route("GET", "/api/whoami-v2", whoami),
    Route("POST", "/api/repos/create", create),
    Route("DELETE", "/api/repos/delete", delete),
    Route("GET", "/api/models", listing),
    Route("GET", API, info),
    Route("GET", rf"{API}/revision/(?P<revision>.+)", info),
    Route("GET", rf"{API}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?P<folder>/.*)?", tree),
    Route("POST", rf"{API}/paths-info/(?P<revision>.+)", paths_info),
    Route("GET", rf"{API}/refs", refs),
    Route("GET", rf"{API}/commits/(?P<revision>.+)", history),
    Route("GET", rf"{API}/auth-check", auth_check),
)
