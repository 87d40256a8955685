"""The two hashes by which a hub names a file's content, and whether a local file has them.

The hub lists sha256 for what it keeps as LFS or Xet objects, and git's blob id for small files kept in git itself:
sha1("blob " + size in decimal + NUL + content), https://git-scm.com/book/en/v2/Git-Internals-Git-Objects.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_quant.errors import InputError


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; the file is streamed and torch is not needed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """Git's object id of the file as a blob, 40 hex digits; the file is streamed."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        # sha1 is git's naming scheme here, not a protection of ours: hence the flag for FIPS builds.
        prefixed = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: prefixed).hexdigest()


def matches(path: Path, size: int | None, sha256_hex: str | None, blob_id: str | None) -> bool:
    """Whether `path` is a regular file of `size` bytes with the listed hash; sha256 decides where both are listed.

    Args:
        path: a file; a symlink is followed, an absent file does not match.
        size: bytes, None when the hub does not list it.
        sha256_hex: 64 hex digits, None for a file that the hub keeps in git.
        blob_id: 40 hex digits. For an LFS file this is the id of its pointer, so it counts only without a sha256.

    Errors: InputError when the hub lists neither hash: nothing could be said about the content.
    """
    if not sha256_hex and not blob_id:
        raise InputError(
            f"{path.name} cannot be verified", "the hub lists neither a sha256 nor a git blob id for it", "leave it out"
        )
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return sha256(path) == sha256_hex.lower() if sha256_hex else git_blob_id(path) == str(blob_id).lower()
