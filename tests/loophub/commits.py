"""Writing: what a file is to be uploaded as, commits, pull requests, branches, tags, and the card's metadata."""

from __future__ import annotations

import base64
import fnmatch
import json
from dataclasses import replace
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.loophub import access, xet
from tests.loophub.access import RefusedError
from tests.loophub.service import API, Route, Service, revision_of, seen, writable
from tests.loophub.state import Commit, Entry, PullRequest, Repository, is_large
from tests.loophub.wire import Exchange, Reply, error_reply, json_reply

RELATIONS = ("adapter", "merge", "quantized", "finetune")


def validate_yaml(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """The metadata of a card: errors (400) and warnings, a message each."""
    errors, warnings = card_findings(exchange.json()["content"])
    value = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return json_reply(value, 400 if errors else 200)


def card_findings(content: str) -> tuple[list[str], list[str]]:
    """What the Hub objects to in a README.md: (errors, warnings). A part of its rules, of the same strictness."""
    parts = content.replace("\r\n", "\n").split("---\n", 2)
    if not content.startswith("---") or len(parts) < 3:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError as problem:
        return [f"Invalid YAML: {problem}"], []
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"], []
    errors = [
        f'"{key}" must be a string'
        for key in ("pipeline_tag", "library_name")
        if not isinstance(data.get(key, ""), str)
    ]
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for key in ("license", "base_model", "language", "tags"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or a list of strings')
    return errors + _index_errors(data.get("model-index", [])), []


def _index_errors(index: Any) -> list[str]:
    """model-index: name; results, each a task type, a dataset with type and name, metrics with type and value."""
    errors = []
    try:
        for model in index:
            if not isinstance(model["name"], str):
                errors.append('"model-index[0].name" must be a string')
            for result in model["results"]:
                texts = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                texts += [metric["type"] for metric in result["metrics"]]
                _ = [metric["value"] for metric in result["metrics"]]
                if not all(isinstance(text, str) for text in texts):
                    errors.append('"model-index" types and names must be strings')
    except (KeyError, TypeError) as problem:
        errors.append(f'"model-index" is not well formed: {problem!r}')
    return errors


def preupload(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Per file: regular or lfs, ignored by .gitignore or not, and what the revision holds under its path."""
    repo = seen(service, exchange, names["repo"])
    if not exchange.option("create_pr"):
        repo = writable(service, exchange, names["repo"])
    access.require_person(exchange.token)
    commit = revision_of(service, repo, names["revision"])
    asked = exchange.json()
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip() and line[0] != "#"]
    rows = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        entry = commit.files.get(path)
        row = {"path": path, "uploadMode": "lfs" if is_large(path, file["size"], sample) else "regular"}
        row["shouldIgnore"] = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        if entry is not None:
            row["oid"] = entry.sha256 or entry.blob_id
        rows.append(row)
    return json_reply({"files": rows, "commitOid": commit.oid})


def commit(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """One commit on a branch (412 when its head is not the stated parent), or a new pull request."""
    as_pull = bool(exchange.option("create_pr"))
    repo_id, branch = names["repo"], names["revision"]
    repo = seen(service, exchange, repo_id) if as_pull else writable(service, exchange, repo_id)
    access.require_person(exchange.token)
    lines = [json.loads(line) for line in exchange.body().splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header":
        return error_reply(400, "The first line must be the header")
    header = lines[0]["value"]
    with service.state.lock:
        repo = service.state.repository(repo_id) or repo
        if branch not in repo.branches:
            return error_reply(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        stated = header.get("parentCommit")
        if stated and not as_pull and not repo.branches[branch].startswith(stated):
            return error_reply(412, "A commit has happened since. Please refresh and try again.")
        base = revision_of(service, repo, (stated if as_pull else None) or branch)
        files = changed_tree(service, base.files, lines[1:])
        target, number = branch, 0
        if as_pull:
            repo, number = open_pull(service, repo, header["summary"], header.get("description", ""), base)
            target = f"refs/pr/{number}"
        made = service.state.add_commit(repo, target, header["summary"], header.get("description", ""), files)
    value = {"success": True, "commitOid": made.oid, "commitUrl": f"{service.endpoint}/{repo_id}/commit/{made.oid}"}
    if as_pull:
        value["pullRequestUrl"] = f"{service.endpoint}/{repo_id}/discussions/{number}"
    return json_reply(value | {"hookOutput": ""})


def changed_tree(service: Service, before: dict[str, Entry], lines: list[dict[str, Any]]) -> dict[str, Entry]:
    """The tree after a commit's operations. Raises RefusedError for what the Hub would reject."""
    files = dict(before)
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/") or path.split("/")[0] == ".git":
            raise RefusedError(error_reply(400, f'Invalid file path "{path}"'))
        if key == "file":
            files[path] = _small(service, path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = _large(service, path, value["oid"], value.get("size"))
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(error_reply(404, "A file with this name doesn't exist", "EntryNotFound"))
        elif key == "deletedFolder":
            files = {name: entry for name, entry in files.items() if not name.startswith(f"{path.rstrip('/')}/")}
        else:
            raise RefusedError(error_reply(400, f"Unknown operation {key}"))
    return files


def _small(service: Service, path: str, content: bytes) -> Entry:
    if is_large(path, len(content), content[:512]) and content:
        raise RefusedError(error_reply(400, f'"{path}" must be uploaded as LFS: it is binary or too large'))
    if path == "README.md" and (errors := card_findings(content.decode())[0]):
        raise RefusedError(error_reply(400, "Invalid metadata in README.md: " + "; ".join(errors)))
    return service.state.store_blob(content)


def _large(service: Service, path: str, sha256: str, size: int | None) -> Entry:
    entry = xet.stored_entry(service, sha256)
    if entry is None or (size is not None and size != entry.size):
        wording = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        raise RefusedError(error_reply(400, f"{wording} Offending file: - {path}"))
    return entry


def open_pull(service: Service, repo: Repository, title: str, description: str, base: Commit) -> tuple[Repository, int]:
    """A new pull request whose ref starts at `base`."""
    number = len(repo.pulls) + 1
    pull = PullRequest(number, title, description, base.oid, base.date)
    repo = replace(repo, pulls=(*repo.pulls, pull), branches=repo.branches | {f"refs/pr/{number}": base.oid})
    service.state.save(repo)
    return repo, number


def discuss(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """POST opens a pull request, GET lists them."""
    repo = seen(service, exchange, names["repo"])
    if exchange.method == "GET":
        rows = [_discussion(service, repo, pull) for pull in reversed(repo.pulls)]
        return json_reply({"count": len(rows), "start": 0, "discussions": rows})
    access.require_person(exchange.token)
    asked = exchange.json()
    with service.state.lock:
        repo = service.state.repository(repo.repo_id) or repo
        base = revision_of(service, repo, "main")
        repo, number = open_pull(service, repo, asked["title"], asked.get("description") or "", base)
    return json_reply(
        {"num": number, "url": f"{service.endpoint}/{repo.repo_id}/discussions/{number}", "pullRequest": True}
    )


def discussion(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """One pull request."""
    repo = seen(service, exchange, names["repo"])
    found = [pull for pull in repo.pulls if pull.num == int(names["number"])]
    if not found:
        return error_reply(404, "Discussion not found", "EntryNotFound")
    more = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": [], "diff": ""}
    return json_reply(_discussion(service, repo, found[0]) | more)


def _discussion(service: Service, repo: Repository, pull: PullRequest) -> dict[str, Any]:
    return {
        "num": pull.num,
        "title": pull.title,
        "author": {"name": "loop"},
        "createdAt": pull.date,
        "status": pull.status,
        "repo": {"name": repo.repo_id, "type": "model"},
        "isPullRequest": True,
    }


def branch(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """Make a branch from a starting point, or remove one."""
    writable(service, exchange, names["repo"])
    asked = exchange.json() if exchange.method == "POST" else {}
    with service.state.lock:
        repo, name = writable(service, exchange, names["repo"]), names["name"]
        if exchange.method == "DELETE":
            if name not in repo.branches or name == "main":
                return error_reply(404 if name != "main" else 403, f"Invalid rev id: {name}", "RevisionNotFound")
            kept = {key: oid for key, oid in repo.branches.items() if key != name}
            service.state.save(replace(repo, branches=kept))
            return json_reply({})
        if name in repo.branches:
            return error_reply(409, f"Reference already exists: refs/heads/{name}")
        start = revision_of(service, repo, asked.get("startingPoint") or "main")
        service.state.save(replace(repo, branches=repo.branches | {name: start.oid}))
    return json_reply({})


def tag(service: Service, exchange: Exchange, names: dict[str, str]) -> Reply:
    """POST .../tag/REVISION with {tag} makes one; DELETE .../tag/NAME removes it."""
    writable(service, exchange, names["repo"])
    asked = exchange.json() if exchange.method == "POST" else {}
    with service.state.lock:
        repo, name = writable(service, exchange, names["repo"]), names["name"]
        if exchange.method == "DELETE":
            if name not in repo.tags:
                return error_reply(404, f"Invalid rev id: {name}", "RevisionNotFound")
            service.state.save(replace(repo, tags={key: oid for key, oid in repo.tags.items() if key != name}))
            return json_reply({})
        commit = revision_of(service, repo, name)
        if asked["tag"] in repo.tags:
            return error_reply(409, f"Tag reference exists already: {asked['tag']}")
        service.state.save(replace(repo, tags=repo.tags | {asked["tag"]: commit.oid}))
    return json_reply({})


ROUTES = (
    Route("POST", "/api/validate-yaml", validate_yaml),
    Route("POST", rf"{API}/preupload/(?P<revision>.+)", preupload),
    Route("POST", rf"{API}/commit/(?P<revision>.+)", commit),
    Route("GET|POST", rf"{API}/discussions", discuss),
    Route("GET", rf"{API}/discussions/(?P<number>\d+)", discussion),
    Route("POST|DELETE", rf"{API}/branch/(?P<name>.+)", branch),
    Route("POST|DELETE", rf"{API}/tag/(?P<name>.+)", tag),
)
