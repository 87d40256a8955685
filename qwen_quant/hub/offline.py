"""Downloads without network: which commit a revision was when it was last fetched, and what belongs to it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_quant.errors import NetworkError
from qwen_quant.hub.plan_files import STATE_FOLDER, Listing, RemoteFile
from qwen_quant.hub.store import FOLDER_RECORD, Store, cache_root, cache_store, folder_store, read_listing

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_ID = re.compile(r"(?P<sha256>[0-9a-f]{64})|(?P<blob_id>[0-9a-f]{40})")
_DEFAULT_REF = "main"


def listing(repo: str, revision: str | None, folder: Path | None) -> Listing:
    """The listing kept by an earlier run; in the cache also what another program left there.

    Args:
        repo: org/name.
        revision: branch, tag or commit, None for the default branch.
        folder: the plain folder, None for the hub's cache.

    Errors: NetworkError when nothing here says what belongs to that revision.
    """
    name = f"{repo}@{revision}" if revision else repo
    if folder is not None:
        kept = read_listing(folder_store(folder).state / FOLDER_RECORD)
        if kept is not None and kept.repo == repo and revision in (kept.revision, kept.commit):
            return kept
        raise incomplete(name, [])
    commit = _cached_commit(repo, revision)
    if commit is None:
        raise incomplete(name, [])
    store = cache_store(repo, commit)
    return read_listing(store.state / f"{commit}.json") or _from_names(store, repo, revision, commit)


def incomplete(name: str, missing: list[str]) -> NetworkError:
    """The error for what is not here and may not be fetched."""
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return NetworkError(
        f"cannot fetch '{name}' from the hub, and there is no local folder of that name",
        f"HF_HUB_OFFLINE allows no request, and the local copy lacks {shown or 'it'}",
        "unset HF_HUB_OFFLINE, or give the folder of a copy",
    )


def write_ref(root: Path, revision: str | None, commit: str) -> None:
    """Remember in the cache that `revision` is `commit`, as huggingface_hub does."""
    path = root / "refs" / (revision or _DEFAULT_REF)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(root.resolve()):
        return
    fresh = path.with_name(f".{path.name}.qwen-quant")
    fresh.write_text(commit, encoding="utf-8")
    os.replace(fresh, path)


def _cached_commit(repo: str, revision: str | None) -> str | None:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        text = (cache_root(repo) / "refs" / (revision or _DEFAULT_REF)).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return text if _COMMIT.fullmatch(text) else None


def _from_names(store: Store, repo: str, revision: str | None, commit: str) -> Listing:
    """A snapshot that another program made: the names of its blobs are the hashes of their contents."""
    files = []
    for path in sorted(store.folder.rglob("*")) if store.folder.is_dir() else ():
        if not path.is_symlink() or STATE_FOLDER in path.parts or not path.is_file():
            continue
        match = _CONTENT_ID.fullmatch(Path(os.readlink(path)).name)
        if match is not None:
            name = path.relative_to(store.folder).as_posix()
            files.append(RemoteFile(name, path.stat().st_size, match["sha256"], match["blob_id"]))
    if not files:
        raise incomplete(f"{repo}@{revision}" if revision else repo, [])
    missing = _missing_shards(store, {file.path for file in files})
    if missing:
        raise incomplete(f"{repo}@{revision}" if revision else repo, missing)
    return Listing("hf", repo, revision, commit, tuple(files))


def _missing_shards(store: Store, names: set[str]) -> list[str]:
    """Shards that the index names and the snapshot lacks: without a listing, the only sign of an unfinished one."""
    index = store.folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    shards = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text(encoding="utf-8")))
    return sorted(shards - names)
