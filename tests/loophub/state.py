"""What the Hub remembers, as files: every change is one atomic replace, so a server over the same root goes on.

ROOT/repos/ORG--NAME/repo.json       visibility, branches, tags, pull requests
ROOT/repos/ORG--NAME/commits/OID     one commit: parent, title, every file of its tree
ROOT/blobs/BLOB_ID                   content of small files, by git blob id
ROOT/objects/SHA256                  content of large files, by sha256
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.bin", "*.bz2", "*.gguf", "*.gz", "*.h5", "*.model", "*.npy", "*.npz", "*.onnx", "*.pkl", "*.pt",
                    "*.pth", "*.safetensors", "*.tar.*", "*.xz", "*.zip", "*.zst", "*tfevents*")
).encode()  # fmt: skip
LARGE_SUFFIXES = (".bin", ".bz2", ".gguf", ".gz", ".h5", ".model", ".npy", ".npz", ".onnx", ".pkl", ".pt", ".pth",
                  ".safetensors", ".xz", ".zip", ".zst")  # fmt: skip
LARGE_BYTES = 10 << 20


@dataclass(frozen=True)
class Entry:
    """One file of a tree. `sha256` is set for a large file, whose blob id is that of its LFS pointer."""

    size: int
    blob_id: str
    sha256: str | None = None
    xet_hash: str | None = None


@dataclass(frozen=True)
class Commit:
    """One commit with its whole tree, as `Hub.commits` gives it."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class PullRequest:
    """A pull request: its own ref, `refs/pr/NUM`, is in the repository's branches."""

    num: int
    title: str
    description: str
    base: str
    date: str
    status: str = "draft"


@dataclass(frozen=True)
class Repository:
    """One model repository. `branches` holds names and `refs/pr/N`."""

    repo_id: str
    private: bool = False
    gated: bool = False
    granted: bool = False  # a gated repository whose terms the good token's user has accepted
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: tuple[PullRequest, ...] = ()


def git_blob_id(data: bytes) -> str:
    """Git's name of this content: sha1 over 'blob SIZE', a zero byte, the content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The LFS pointer file that git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def large_entry(sha256: str, size: int, xet_hash: str | None = None) -> Entry:
    """The tree entry of a large file."""
    return Entry(size, git_blob_id(pointer(sha256, size)), sha256, xet_hash)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants this file as LFS: by its suffix, its size or because it is not text."""
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES or b"\0" in sample


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_bytes(data)
    os.replace(partial, path)


class State:
    """The files under `root`. Every change of a repository happens under `lock`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        for name in ("repos", "blobs", "objects", "uploads"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256

    def blob_path(self, blob_id: str) -> Path:
        return self.root / "blobs" / blob_id

    def repositories(self) -> list[Repository]:
        found = [self._load(path.parent) for path in sorted((self.root / "repos").glob("*/repo.json"))]
        return [repo for repo in found if repo is not None]

    def repository(self, repo_id: str) -> Repository | None:
        return self._load(self._folder(repo_id))

    def save(self, repo: Repository) -> None:
        write_atomically(self._folder(repo.repo_id) / "repo.json", json.dumps(asdict(repo)).encode())

    def delete(self, repo_id: str) -> None:
        shutil.rmtree(self._folder(repo_id))

    def resolve(self, repo: Repository, revision: str) -> Commit | None:
        """A branch, tag, `refs/...` name, commit id or its first 7 or more digits."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = repo.branches.get(name) or repo.tags.get(name)
        return self.commit(repo, oid or revision)

    def commit(self, repo: Repository, oid: str) -> Commit | None:
        folder = self._folder(repo.repo_id) / "commits"
        found = [folder / oid] if (folder / oid).is_file() else []
        if not found and len(oid) >= 7 and all(digit in "0123456789abcdef" for digit in oid):
            found = list(folder.glob(f"{oid}*"))
        if len(found) != 1:
            return None
        value = json.loads(found[0].read_bytes())
        files = {path: Entry(**entry) for path, entry in value.pop("files").items()}
        return Commit(files=files, **value)

    def history(self, repo: Repository, revision: str) -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commits, current = [], self.resolve(repo, revision)
        while current is not None:
            commits.append(current)
            current = self.commit(repo, current.parent) if current.parent else None
        return commits

    def add_commit(self, repo: Repository, branch: str, title: str, message: str, files: dict[str, Entry]) -> Commit:
        """Put a commit with this whole tree on a branch (made when absent) and save both."""
        parent = repo.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.time_ns() // 1_000_000 % 1000:03d}Z"
        content = {"parent": parent, "title": title, "message": message, "date": date}
        listed = {path: asdict(files[path]) for path in sorted(files)}
        seed = json.dumps([repo.repo_id, content, listed, time.time_ns()]).encode()
        oid = hashlib.sha1(seed).hexdigest()
        value = {"oid": oid} | content | {"files": listed}
        write_atomically(self._folder(repo.repo_id) / "commits" / oid, json.dumps(value).encode())
        self.save(replace(repo, branches=repo.branches | {branch: oid}))
        return Commit(oid, parent, title, message, date, dict(sorted(files.items())))

    def store_blob(self, data: bytes) -> Entry:
        """Keep a small file; its tree entry."""
        blob_id = git_blob_id(data)
        if not self.blob_path(blob_id).is_file():
            write_atomically(self.blob_path(blob_id), data)
        return Entry(len(data), blob_id)

    def store_object(self, source: bytes | Path) -> Entry:
        """Keep a large file; its tree entry."""
        if isinstance(source, bytes):
            sha256, size = hashlib.sha256(source).hexdigest(), len(source)
            if not self.object_path(sha256).is_file():
                write_atomically(self.object_path(sha256), source)
            return large_entry(sha256, size)
        sha256 = file_sha256(source)
        if not self.object_path(sha256).is_file():
            partial = self.root / "uploads" / uuid.uuid4().hex
            shutil.copyfile(source, partial)
            os.replace(partial, self.object_path(sha256))
        return large_entry(sha256, source.stat().st_size)

    def content_path(self, entry: Entry) -> Path:
        """Where a file's bytes lie."""
        return self.object_path(entry.sha256) if entry.sha256 else self.blob_path(entry.blob_id)

    def _folder(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id.replace("/", "--")

    def _load(self, folder: Path) -> Repository | None:
        if not (folder / "repo.json").is_file():
            return None
        value: dict[str, Any] = json.loads((folder / "repo.json").read_bytes())
        pulls = tuple(PullRequest(**pull) for pull in value.pop("pulls"))
        return Repository(pulls=pulls, **value)
