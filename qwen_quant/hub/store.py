"""Where downloaded files lie, and what is known of them.

Two layouts, one interface:

- the cache (default for the Hugging Face hub) is huggingface_hub's own: `HF_HUB_CACHE/models--ORG--NAME/` with
  `blobs/CONTENT_ID`, `snapshots/COMMIT/PATH` (symlinks to blobs) and `refs/REVISION`. What transformers or vLLM
  fetched is found here, and they find what this program fetched;
- a folder (`--local-dir`, and ModelScope's default) holds plain files under their own names.

Both keep a state folder `.qwen-quant/`: `verified.json` (size and time of every file whose hash was checked here, so
that 60 GB are not read again on every run), the listing of each commit (for runs without network), `download.json`
(what a folder holds) and a lock. A partial file has the name of its content, so a later run, even of another revision
with the same content, continues it. No symlink that leads out of the repository's folder is followed when writing, and
reading through one stays within the cache.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.hub.fingerprint import matches
from qwen_quant.hub.plan_files import STATE_FOLDER, Listing, RemoteFile
from qwen_quant.resume import write_json_atomically

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_VERIFIED_FILE = "verified.json"
FOLDER_RECORD = "download.json"


@dataclass(frozen=True)
class Store:
    """One repository at one commit on this disk.

    Attributes:
        root: everything of this repository lies in here; nothing outside is written.
        folder: what the user gets: the snapshot in the cache, or `root` itself.
        in_cache: whether contents lie in `root/blobs` under their ids, with symlinks in `folder`.
        readable: a symlink may be read through when it leads into here.
    """

    root: Path
    folder: Path
    in_cache: bool
    readable: Path

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.root / STATE_FOLDER

    def shown(self, file: RemoteFile) -> Path:
        """Where the user finds the file."""
        return self.folder.joinpath(*file.path.split("/"))

    def home(self, file: RemoteFile) -> Path:
        """Where the file's bytes go."""
        return self.root / "blobs" / file.content_id if self.in_cache else self.shown(file)

    def partial(self, file: RemoteFile) -> Path:
        """Where they are collected until they are complete and verified."""
        if self.in_cache:
            return self.root / "blobs" / f"{file.content_id}.qwen-quant.incomplete"
        place = sha256(file.path.encode()).hexdigest()[:12]
        return self.state / f"{file.content_id}.{place}.incomplete"

    def key(self, path: Path) -> str:
        """A file's name in `verified.json`."""
        return path.relative_to(self.root).as_posix()


def cache_root(repo: str) -> Path:
    """huggingface_hub's folder of a model repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / ("models--" + repo.replace("/", "--"))


def cache_store(repo: str, commit: str) -> Store:
    """The hub cache's place for `repo` at `commit`."""
    root = cache_root(repo)
    return Store(root, root / "snapshots" / commit, True, root.parent)


def folder_store(folder: Path) -> Store:
    """A plain folder."""
    return Store(folder, folder, False, folder)


class Verified:
    """Which files were hashed here and found right, and what they looked like then. Safe from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        known = read_state(store.state / _VERIFIED_FILE).get("files", {})
        self._known: dict[str, dict[str, Any]] = known if isinstance(known, dict) else {}

    def holds(self, path: Path, file: RemoteFile) -> bool:
        """Whether `path` was found to be `file` and has not been touched since."""
        record = self._known.get(self._store.key(path))
        return record is not None and record == _record(path, file.content_id)

    def is_ours(self, path: Path) -> bool:
        """Whether `path` is as this program left it, whatever its content."""
        record = self._known.get(self._store.key(path))
        return record is not None and record == _record(path, str(record.get("content_id")))

    def add(self, path: Path, file: RemoteFile) -> None:
        """Remember that `path` is `file`, durably."""
        with self._lock:
            self._known[self._store.key(path)] = _record(path, file.content_id)
            self._save()

    def drop(self, keys: list[str]) -> None:
        """Forget these files."""
        with self._lock:
            self._known = {key: record for key, record in self._known.items() if key not in keys}
            self._save()

    def keys(self) -> list[str]:
        """The names of all known files."""
        return sorted(self._known)

    def _save(self) -> None:
        write_state(self._store.state / _VERIFIED_FILE, {"files": self._known})


def _record(path: Path, content_id: str) -> dict[str, Any]:
    """What a file looks like from outside."""
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"content_id": content_id, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def read_state(path: Path) -> dict[str, Any]:
    """A file of the state folder; empty when it is absent, damaged or of another format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) and value.get("format") == _FORMAT else {}


def write_state(path: Path, value: dict[str, Any]) -> None:
    """Write a file of the state folder durably; a read-only place keeps no state, and hashes are checked every time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, {"format": _FORMAT, **value})
    except PermissionError as error:
        _LOG.info("no state in %s: %s", path.parent, error)


def listing_value(listing: Listing) -> dict[str, Any]:
    """A listing as JSON."""
    return asdict(listing)


def read_listing(path: Path) -> Listing | None:
    """A listing from a state file, None when there is none."""
    value = read_state(path).get("listing")
    if not isinstance(value, dict):
        return None
    try:
        files = tuple(RemoteFile(**file) for file in value.pop("files"))
        return Listing(files=files, **value)
    except (TypeError, KeyError):
        return None


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """One download of a repository at a time; a second one waits. A killed holder lets go by itself."""
    guard(store, store.state / "lock")
    try:
        store.state.mkdir(parents=True, exist_ok=True)
        handle = os.open(store.state / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError:
        # A read-only cache can still be read, and nobody else writes it either.
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning("another download into %s is under way: waiting for it", store.root)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def guard(store: Store, path: Path) -> None:
    """`path` may be written: no folder on the way to it is a symlink out of `store.root` (else InputError)."""
    place = path.parent.resolve()
    if not place.is_relative_to(store.root.resolve()):
        raise InputError(
            f"{path} lies outside {store.root}",
            f"a symlink on the way leads to {place}",
            "remove it, or give another --local-dir",
        )


def present(store: Store, file: RemoteFile) -> Path | None:
    """The path under which bytes that may be `file` lie, None when there are none that may be used."""
    for path in dict.fromkeys((store.home(file), store.shown(file))):
        if store.in_cache and path == store.shown(file) and path.is_symlink():
            continue
        if not store.in_cache and path.is_symlink():
            continue
        if path.is_file() and path.resolve().is_relative_to(store.readable.resolve()):
            return path
    return None


def is_complete(store: Store, file: RemoteFile, verified: Verified, *, recheck: bool) -> bool:
    """Whether `file` is here with the right content: by the record of an earlier check, else by its hash."""
    path = present(store, file)
    if path is None:
        return False
    if not recheck and verified.holds(path, file):
        return True
    if not matches(path, file.size, file.sha256, file.blob_id):
        if store.in_cache:
            _LOG.warning("%s is damaged in the cache: fetching it again", file.path)
        return False
    verified.add(path, file)
    return True


def link(store: Store, file: RemoteFile) -> None:
    """Make `file`, whose bytes are complete, visible in the snapshot."""
    shown, home = store.shown(file), store.home(file)
    if not store.in_cache or (shown.is_file() and not shown.is_symlink() and not home.exists()):
        return
    guard(store, shown)
    target = os.path.relpath(home, shown.parent)
    if shown.is_symlink() and os.readlink(shown) == target:
        return
    shown.parent.mkdir(parents=True, exist_ok=True)
    fresh = shown.with_name(f".{shown.name}.qwen-quant-link")
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target)
    except OSError as error:
        raise InputError(
            f"the disk of {store.root} takes no symlinks", str(error), "give a plain folder with --local-dir"
        ) from error
    os.replace(fresh, shown)
