"""`qwen-quant download --source modelscope` as a real process against the loopback ModelScope."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub import modelscope as module
from tests.loophub import Fault, FaultPlan, ModelScope, serve_modelscope

REPO = "org/tiny"
WEIGHTS = random.Random(8).randbytes(2 << 20)
FILES: dict[str, bytes | Path] = {
    "model.safetensors": WEIGHTS,
    "config.json": b"{}",
    "configuration.json": b'{"framework": "pytorch"}',
    "modeling.py": b"never",
    "assets/a.json": b"{}",
}
NEEDED = {"model.safetensors", "config.json", "configuration.json"}


@dataclass(frozen=True)
class Place:
    """A ModelScope, and where its client's files go."""

    hub: ModelScope
    home: Path

    def run(self, *arguments: str, token: str | None = ModelScope.token) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qwen_quant", "download", *arguments, "--source", "modelscope"]
        environment = self.hub.environment(self.home, token=token) | {"HF_HUB_OFFLINE": "0"}
        return subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=120)


def serve(tmp_path: Path, *faults: Fault, private: bool = False) -> Iterator[Place]:
    with serve_modelscope(tmp_path / "hub", faults=FaultPlan(faults)) as hub:
        hub.add_repo(REPO, FILES, private=private)
        (tmp_path / "home").mkdir()
        yield Place(hub, tmp_path / "home")


def test_needed_files_arrive_verified_and_are_kept(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("cut", "FilePath=model"), Fault("503", "repo/files"), private=True):
        done = place.run(REPO, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        folder = Path(result["path"])
        assert folder == place.home / "modelscope/qwen-quant/org--tiny" and len(result["commit"]) == 40
        assert {path.name for path in folder.iterdir()} == NEEDED | {".qwen-quant"}
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert all(len(file["sha256"]) == 64 for file in result["files"])
        again = json.loads(place.run(REPO, "--json").stdout)
        assert {file["how"] for file in again["files"]} == {"reused"}


def test_a_flipped_byte_is_fetched_again_and_two_are_an_error(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("flip", "FilePath=model", times=3)):
        done = place.run(REPO, "--local-dir", "here")
        assert done.returncode == 5 and "model.safetensors" in done.stderr and "damaged twice" in done.stderr
        assert not (place.home / "here/model.safetensors").exists()
        done = place.run(REPO, "--local-dir", "here", "--json")
        assert {f["path"]: f["how"] for f in json.loads(done.stdout)["files"]}["model.safetensors"] == "fetched twice"


def test_refusals_speak_of_modelscope(tmp_path: Path) -> None:
    for place in serve(tmp_path, private=True):
        for arguments, token, word in (
            (["org/nosuch"], ModelScope.token, "Not found model org/nosuch"),
            ([f"{REPO}@nosuch"], ModelScope.token, "Not found the revision"),
            ([REPO], None, "Not found model"),
            ([REPO], "ms-0123456789abcdef-wrong", "MODELSCOPE_API_TOKEN"),
        ):
            done = place.run(*arguments, token=token)
            assert (done.returncode, done.stdout) == (5, ""), done.stderr
            assert word in done.stderr and "Traceback" not in done.stderr and "ms-0" not in done.stderr


@dataclass(frozen=True)
class Reply:
    """A reply as the client gives it."""

    value: object

    def json(self) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    "value", [ValueError("no JSON"), [], {"Data": None}, {"Data": {}, "Success": False, "Message": "no"}]
)
def test_a_strange_reply_is_an_error(value: object) -> None:
    with pytest.raises(NetworkError, match="cannot list"):
        module._data("org/name", Reply(value))


def test_a_listing_without_a_commit_gets_an_id_of_its_content() -> None:
    rows = [{"Path": "a.json", "Size": 1, "Sha256": "a" * 64}, {"Path": "b.json", "Size": 1, "Sha256": "b" * 64}]
    files = tuple(map(module._remote, rows))
    assert module._commit({}, files) == module._commit({"LatestCommitter": {}}, files[::-1])
    assert module._commit({}, files) != module._commit({}, files[:1])
    assert module._commit({"LatestCommitter": {"Id": "C" * 40}}, files) == "c" * 40


def test_a_cut_off_listing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "LISTING_LIMIT", 3)
    for place in serve(tmp_path):
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", place.hub.endpoint)
        with pytest.raises(InputError, match="too many files"):
            module.ModelScope().listing(REPO, None)
