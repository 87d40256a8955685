"""A ModelScope on loopback: a model's revisions, its file list and its files, as modelscope-hub 0.5 asks for them.

State: ROOT/ORG/NAME/REVISION/... with the files themselves, ROOT/ORG/NAME.private for one that needs the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.loophub.faults import FaultClock, FaultPlan
from tests.loophub.state import file_sha256, is_large, write_atomically
from tests.loophub.wire import Exchange, Listener, Reply, Served, file_reply, json_reply

TOKEN = "ms-" + "10opback-0000-4000-8000-loopback0000"
PREFIX = "/api/v1/models/"
LISTED_FILES = 3000  # the real one silently stops there


class ModelScope:
    """A running loopback ModelScope."""

    token = TOKEN

    def __init__(self, root: Path, clock: FaultClock, log: list[Served]) -> None:
        self.root, self.clock, self.log = root, clock, log
        self.endpoint = ""

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path with query) of every request so far."""
        return [(served.method, served.path) for served in self.log]

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes | Path], *, revision: str = "master", private: bool = False
    ) -> None:
        """A model with these files at a revision (a branch or tag name)."""
        folder = self.root / repo_id / revision
        folder.mkdir(parents=True)
        for path, content in files.items():
            if isinstance(content, bytes):
                write_atomically(folder / path, content)
            else:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(content, folder / path)
        if private:
            (self.root / f"{repo_id}.private").touch()

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """os.environ for a client process that knows this ModelScope only, with its caches under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODELSCOPE_", "HF_"))}
        ours = {"MODELSCOPE_ENDPOINT": self.endpoint, "MODELSCOPE_CACHE": str(home / "modelscope")}
        ours |= {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[2])}
        return kept | ours | ({"MODELSCOPE_API_TOKEN": token} if token else {})

    def answer(self, exchange: Exchange) -> Reply:
        """One request."""
        org, name, *rest = [*exchange.path.removeprefix(PREFIX).split("/"), "", ""]
        folder, ask = self.root / org / name, "/".join(rest).strip("/")
        token = _token(exchange)
        if token not in (None, TOKEN):
            return _refused(401, 10010103009, "AccessToken is invalid or expired")
        private = (self.root / f"{org}/{name}.private").exists() and token is None
        if not exchange.path.startswith(PREFIX) or not name or not folder.is_dir() or private:
            return _refused(404, 10010205001, f"Not found model {org}/{name}")
        if ask == "":
            return _found({"Name": name, "Path": org, "Visibility": 5, "Revision": "master"})
        if ask == "revisions":
            return _found({"RevisionMap": {"Branches": [_revision(at) for at in sorted(folder.iterdir())], "Tags": []}})
        revision = folder / (exchange.option("Revision") or "master")
        if not revision.is_dir():
            return _refused(404, 10010205002, f"Not found the revision {revision.name}")
        if ask == "repo/files":
            recursive = exchange.option("Recursive").lower() == "true"
            rows = _listing(revision, recursive)[:LISTED_FILES]
            return _found({"Files": rows, "LatestCommitter": {"Id": _commit(revision), "Title": "all"}})
        if ask == "repo":
            return _file(exchange, revision)
        return _refused(404, 404, f"loophub has no route for {exchange.path}")


def _file(exchange: Exchange, revision: Path) -> Reply:
    path = revision / exchange.option("FilePath")
    if not path.is_file() or not path.resolve().is_relative_to(revision.resolve()):
        return _refused(404, 10010205003, f"File {exchange.option('FilePath')} not found")
    return file_reply(exchange, path, {"X-Linked-ETag": f'"{file_sha256(path)}"'})


def _listing(revision: Path, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders, as the file list shows them."""
    rows = []
    for path in sorted(revision.rglob("*") if recursive else revision.glob("*")):
        name = path.relative_to(revision).as_posix()
        row: dict[str, Any] = {"Name": path.name, "Path": name, "Type": "tree", "Size": 0, "Sha256": "", "IsLFS": False}
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                large = is_large(name, size, file.read(512))
            row |= {"Type": "blob", "Size": size, "Sha256": file_sha256(path), "IsLFS": large, "Mode": "33188"}
            row["Revision"] = _commit(revision)
        rows.append(row)
    return rows


def _commit(revision: Path) -> str:
    """A commit id that changes with the content."""
    content = [(path.name, file_sha256(path)) for path in sorted(revision.rglob("*")) if path.is_file()]
    return hashlib.sha1(repr(content).encode()).hexdigest()


def _revision(revision: Path) -> dict[str, Any]:
    return {"Revision": revision.name, "CommitId": _commit(revision), "CreatedAt": 1760000000}


def _token(exchange: Exchange) -> str | None:
    """The token, which comes as a bearer or as the cookie m_session_id."""
    for part in exchange.headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == "m_session_id" and value:
            return value
    return exchange.token


def _found(data: Any) -> Reply:
    return json_reply({"Code": 200, "Data": data, "Message": "success", "RequestId": "loopback", "Success": True})


def _refused(status: int, code: int, message: str) -> Reply:
    body = {"Code": code, "Data": None, "Message": message, "RequestId": "loopback", "Success": False}
    return json_reply(body, status)


@contextlib.contextmanager
def serve_modelscope(root: Path, *, faults: FaultPlan | None = None, port: int = 0) -> Iterator[ModelScope]:
    """A ModelScope on loopback over `root`, until the block ends."""
    root.mkdir(parents=True, exist_ok=True)
    log: list[Served] = []
    server = ModelScope(root.resolve(), FaultClock(faults or FaultPlan()), log)
    listener = Listener(server.answer, server.clock, log, port)
    listener.start()
    server.endpoint = listener.address
    try:
        yield server
    finally:
        listener.stop()
