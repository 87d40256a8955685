"""qwen-quant.json: read back strictly, and sealed again only for what joins beside finished weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal, write_manifest
from qwen_quant.errors import InputError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE"):
        (folder / name).write_text(f"the {name}")
    write_manifest(folder, {"schema": "qwen-quant/1", "method": "gptq", "source": {"id": "千问"}})
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    found: dict[str, str] = read_manifest(folder)["output"]["sha256"]
    return found


def test_added_and_changed_evidence_is_sealed_and_the_rest_stays(artifact: Path) -> None:
    before = hashes(artifact)
    (artifact / "README.md").write_text("a card")
    (artifact / "report.json").write_text("{}")
    (artifact / "LICENSE").write_text("another licence")
    (artifact / "config.json").write_text("changed behind our back")
    seal(artifact, ["README.md", "report.json", "LICENSE"])
    after = hashes(artifact)
    for name in ("README.md", "report.json", "LICENSE"):
        assert after[name] == sha256(artifact / name)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert after[name] == before[name]
    assert after["config.json"] != sha256(artifact / "config.json"), "a changed config must stay visible"
    assert list(after) == sorted(after)
    assert {**read_manifest(artifact), "output": None} == {
        "schema": "qwen-quant/1",
        "method": "gptq",
        "source": {"id": "千问"},
        "output": None,
    }
    assert sorted(p.name for p in artifact.iterdir()) == sorted([*after, MANIFEST_FILE])


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "quantize_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "qwen.tiktoken",
        "chat_template.jinja",
        MANIFEST_FILE,
        "modeling.py",
        "LICENSE.safetensors",
        "NOTICE.py",
        "pytorch_model.bin",
        ".env",
        "../README.md",
        "sub/LICENSE",
        "",
    ],
)
def test_what_was_computed_cannot_be_sealed_again(artifact: Path, name: str) -> None:
    before = (artifact / MANIFEST_FILE).read_bytes()
    (artifact / "README.md").write_text("a card")
    for path in (artifact / "model.safetensors.index.json", artifact.parent / "README.md"):
        path.write_text("{}")
    with pytest.raises(InputError, match="cannot be sealed"):
        seal(artifact, ["README.md", name])
    assert (artifact / MANIFEST_FILE).read_bytes() == before


def test_a_link_a_folder_and_an_absent_file_are_refused(artifact: Path) -> None:
    os.symlink(artifact / "LICENSE", artifact / "README.md")
    (artifact / "report.html").mkdir()
    for name in ("README.md", "report.html", "report.json"):
        with pytest.raises(InputError, match=f"{name} cannot be sealed"):
            seal(artifact, [name])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "is not a manifest"),
        (b'{"schema": "qwen-quant/2"}', "is not a manifest"),
        (b'{"schema": "qwen-quant/1"}', "output.sha256"),
        (b'{"schema": "qwen-quant/1", "output": {"sha256": {"../a": "' + b"0" * 64 + b'"}}}', "output.sha256"),
        (b'{"schema": "qwen-quant/1", "output": {"sha256": {"a": "00"}}}', "output.sha256"),
        (b'{"schema": "qwen-quant/1", "output": {"sha256": {"a": 1}}}', "output.sha256"),
    ],
)
def test_an_unusable_manifest_is_refused(artifact: Path, text: bytes, why: str) -> None:
    (artifact / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(InputError, match=why):
        seal(artifact, [])


def test_a_folder_without_a_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an artifact"):
        read_manifest(tmp_path)


def test_a_failed_write_keeps_the_old_manifest(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / MANIFEST_FILE).read_bytes()
    (artifact / "README.md").write_text("a card")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        seal(artifact, ["README.md"])
    assert (artifact / MANIFEST_FILE).read_bytes() == before
    assert json.loads(before)["output"]["sha256"].keys() == {
        p.name for p in artifact.iterdir() if p.name not in (MANIFEST_FILE, "README.md")
    }
