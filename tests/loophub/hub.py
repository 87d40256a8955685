"""The Hub as tests hold it: start it, fill it, look into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tests.loophub import access, commits, files, lfs, repos, xet
from tests.loophub.faults import FaultClock, FaultPlan
from tests.loophub.service import Mode, Service, dispatch
from tests.loophub.state import Commit, Entry, Repository, State, is_large
from tests.loophub.wire import Listener, Served

ROUTES = (*repos.ROUTES, *commits.ROUTES, *lfs.ROUTES, *xet.ROUTES, *files.ROUTES)
STORAGE_ROUTES = (*lfs.STORAGE_ROUTES, *files.STORAGE_ROUTES)


class Hub:
    """A running loopback Hub."""

    token = access.GOOD_TOKEN
    read_token = access.READ_TOKEN  # may read, not write
    stranger_token = access.STRANGER_TOKEN  # a good token of somebody who sees nothing private
    expired_token = access.EXPIRED_TOKEN
    foreign_namespace = access.FOREIGN_NAMESPACE  # where the good token may not write

    def __init__(self, service: Service, clock: FaultClock, log: list[Served]) -> None:
        self._service = service
        self.clock = clock
        self.log = log

    @property
    def endpoint(self) -> str:
        return self._service.endpoint

    @property
    def storage(self) -> str:
        """The other origin, of large files."""
        return self._service.storage

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path with query) of every request so far, on both origins."""
        return [(served.method, served.path) for served in self.log]

    def environment(self, home: Path, *, token: str | None = access.GOOD_TOKEN) -> dict[str, str]:
        """os.environ for a client process that knows this Hub only, with its caches under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        ours["HF_HUB_DISABLE_XET"] = "0" if self._service.mode == "xet" else "1"
        ours["PYTHONPATH"] = str(Path(__file__).parents[2])
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes | Path], *, private: bool = False, gated: bool = False
    ) -> Commit:
        """A repository with these files in one commit on main."""
        with self._service.state.lock:
            if self._service.state.repository(repo_id) is not None:
                raise ValueError(f"{repo_id} exists")
            repo = Repository(repo_id, private=private, gated=gated)
            return self._service.state.add_commit(repo, "main", "initial commit", "", self._stored(files))

    def add_commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        title: str = "Somebody else's commit",
        branch: str = "main",
    ) -> Commit:
        """A commit behind the client's back: these files added to the branch's tree."""
        with self._service.state.lock:
            repo = self._repository(repo_id)
            before = self._service.state.resolve(repo, branch)
            tree = (before.files if before else {}) | self._stored(files)
            return self._service.state.add_commit(repo, branch, title, "", tree)

    def damage(self, repo_id: str, path: str) -> None:
        """Change one byte of what is stored of main's file, its hashes staying what they were."""
        commit = self._service.state.resolve(self._repository(repo_id), "main")
        assert commit is not None
        xet.damage(self._service, commit.files[path])

    def grant(self, repo_id: str) -> None:
        """The good token's user accepts a gated repository's terms."""
        self._service.state.save(replace(self._repository(repo_id), granted=True))

    def exists(self, repo_id: str) -> bool:
        return self._service.state.repository(repo_id) is not None

    def repository(self, repo_id: str) -> Repository:
        """Its visibility, branches, tags and pull requests."""
        return self._repository(repo_id)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; each with oid, parent, title, message and files (path to `Entry`: size, blob_id, sha256)."""
        return self._service.state.history(self._repository(repo_id), revision)

    def file_bytes(self, repo_id: str, revision: str, path: str) -> bytes:
        """What a revision holds under a path. KeyError when nothing."""
        commit = self._service.state.resolve(self._repository(repo_id), revision)
        if commit is None:
            raise KeyError(revision)
        return files.entry_bytes(self._service, commit.files[path])

    def _repository(self, repo_id: str) -> Repository:
        repo = self._service.state.repository(repo_id)
        if repo is None:
            raise KeyError(repo_id)
        return repo

    def _stored(self, contents: Mapping[str, bytes | Path]) -> dict[str, Entry]:
        """Keep these contents and give their tree."""
        state, tree = self._service.state, {}
        for path, content in contents.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            with contextlib.ExitStack() as stack:
                sample = content if isinstance(content, bytes) else stack.enter_context(content.open("rb")).read(512)
            if is_large(path, size, sample[:512]):
                tree[path] = xet.add_object(self._service, content)
            else:
                tree[path] = state.store_blob(content if isinstance(content, bytes) else content.read_bytes())
        return tree


@contextlib.contextmanager
def serve_hub(
    root: Path, *, mode: Mode, faults: FaultPlan | None = None, port: int = 0, part_bytes: int = 8 << 20
) -> Iterator[Hub]:
    """A Hub on loopback over `root`, until the block ends. A second one over the same root goes on where it was.

    mode: "lfs" (no file has a Xet hash) or "xet". port: 0 takes a free one. part_bytes: larger LFS files come in parts.
    """
    root.mkdir(parents=True, exist_ok=True)
    service = Service(State(root.resolve()), mode, part_bytes)
    clock = FaultClock(faults or FaultPlan())
    log: list[Served] = []
    hub_listener = Listener(lambda exchange: dispatch(service, ROUTES, exchange), clock, log, port)
    storage_listener = Listener(lambda exchange: dispatch(service, STORAGE_ROUTES, exchange), clock, log)
    hub_listener.start()
    storage_listener.start()
    service.endpoint, service.storage = hub_listener.address, storage_listener.address
    try:
        yield Hub(service, clock, log)
    finally:
        hub_listener.stop()
        storage_listener.stop()
