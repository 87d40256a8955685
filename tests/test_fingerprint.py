"""The hub's two names of a file's content, against git's own answer and hashlib."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_quant.errors import InputError
from qwen_quant.hub.fingerprint import git_blob_id, matches, sha256


@pytest.mark.parametrize(
    ("content", "blob"),
    [
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"what is up, doc?", "bd9dbf5aae1a3862dd1526723246b20206e5fc37"),
    ],
)
def test_known_blob_ids(tmp_path: Path, content: bytes, blob: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert git_blob_id(path) == blob
    assert sha256(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_blob_id_is_gits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)
    done = subprocess.run(["git", "hash-object", "--no-filters", path], capture_output=True, text=True, check=True)
    assert git_blob_id(path) == done.stdout.strip()


def test_one_flipped_bit_does_not_match(tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytearray(b"0123456789" * 1000)
    path.write_bytes(content)
    size, digest, blob = len(content), sha256(path), git_blob_id(path)
    assert matches(path, size, digest, None) and matches(path, size, None, blob) and matches(path, None, None, blob)
    assert matches(path, size, digest.upper(), "0" * 40), "the sha256 decides where both are listed"
    assert not matches(path, size + 1, digest, None)
    content[5000] ^= 1
    path.write_bytes(content)
    assert not matches(path, size, digest, None) and not matches(path, size, None, blob)
    assert not matches(tmp_path / "absent", size, digest, None) and not matches(tmp_path, None, digest, None)


def test_without_a_listed_hash_nothing_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be verified"):
        matches(tmp_path / "file", 3, None, None)
