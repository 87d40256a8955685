"""What is noted beside downloaded files, and what of a plain folder may be replaced."""

from __future__ import annotations

import logging
from pathlib import Path

from qwen_quant.errors import InputError
from qwen_quant.hub import offline
from qwen_quant.hub.fetch import Transfer
from qwen_quant.hub.plan_files import RemoteFile
from qwen_quant.hub.store import (
    FOLDER_RECORD,
    Verified,
    cache_root,
    folder_store,
    guard,
    listing_value,
    present,
    read_listing,
    read_state,
    write_state,
)

_LOG = logging.getLogger(__name__)


def check_place(name: str, run: Transfer, missing: list[RemoteFile], *, force: bool) -> None:
    """Nothing in a plain folder is replaced but what an unfinished download left, unless forced (else InputError)."""
    store, new = run.store, run.listing
    if store.in_cache or force:
        return
    old = read_listing(store.state / FOLDER_RECORD)
    complete = bool(read_state(store.state / FOLDER_RECORD).get("complete"))
    if old is not None and (old.repo != new.repo or (complete and old.commit != new.commit)):
        raise InputError(
            f"{store.root} holds '{old.repo}' at commit {old.commit}",
            f"'{name}' is now at commit {new.commit}",
            "give another --local-dir, add --force to replace it, or ask for that commit with @COMMIT",
        )
    for file in missing:
        path = store.shown(file)
        if (path.exists() or path.is_symlink()) and not run.verified.is_ours(path):
            raise InputError(
                f"{path} is there and is not '{file.path}' of '{name}'",
                "its content differs from what the hub lists, and nothing is overwritten",
                "move it away, or add --force to replace it",
            )


def record(run: Transfer, *, complete: bool) -> None:
    """Note what is being fetched (for the next run) and what is there (for runs without network)."""
    store, listing = run.store, run.listing
    guard(store, store.state / FOLDER_RECORD)
    value = {"listing": listing_value(listing), "complete": complete}
    if not store.in_cache:
        if complete:
            _remove_stale(run)
        write_state(store.state / FOLDER_RECORD, value)
        return
    if complete:
        write_state(store.state / f"{listing.commit}.json", value)
        if listing.revision != listing.commit:
            offline.write_ref(cache_root(listing.repo), listing.revision, listing.commit)


def _remove_stale(run: Transfer) -> None:
    """Remove files of an earlier revision that this one does not have, if they are as this program left them."""
    store, listed = run.store, {file.path: file for file in run.listing.files}
    stale = []
    for key in run.verified.keys():
        path = store.root / key
        current = key in listed and run.verified.holds(path, listed[key])
        if not current and run.verified.is_ours(path):
            _LOG.info("removing %s of an earlier revision", path)
            path.unlink(missing_ok=True)
        if not current:
            stale.append(key)
    if stale:
        run.verified.drop(stale)


def known_origin(folder: Path) -> tuple[str, str] | None:
    """(hub id, commit) of a folder that `download` filled and that nobody changed since; None for any other."""
    store = folder_store(folder)
    state = read_state(store.state / FOLDER_RECORD)
    listing = read_listing(store.state / FOLDER_RECORD) if state.get("complete") else None
    if listing is None:
        return None
    verified = Verified(store)
    here = [file for file in listing.files if present(store, file) is not None]
    untouched = bool(here) and all(verified.holds(store.shown(file), file) for file in here)
    return (listing.repo, listing.commit) if untouched else None
