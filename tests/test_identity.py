"""The hash that ties a report to the weights it measured."""

import hashlib
from pathlib import Path

import pytest

from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.errors import InputError


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (path / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (path / "config.json").write_bytes(b"{}")
    return path


def test_is_the_hash_of_what_sha256sum_prints(tmp_path: Path) -> None:
    names = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
    }
    text = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in names.items())
    assert weights_sha256(_folder(tmp_path / "a")) == hashlib.sha256(text.encode()).hexdigest()


def test_companions_do_not_change_it_and_weights_do(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    before = weights_sha256(folder)
    (folder / "README.md").write_text("card")
    assert weights_sha256(folder) == before
    (folder / "config.json").write_bytes(b"{ }")
    assert weights_sha256(folder) != before


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        weights_sha256(tmp_path)
