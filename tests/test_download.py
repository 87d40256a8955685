"""`qwen-quant download` as a real process against the loopback hub: what is fetched, checked, continued and refused."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir

from qwen_quant import cli
from qwen_quant.commands.options import find_model
from qwen_quant.console import Output
from qwen_quant.errors import InputError
from qwen_quant.hub import download as download_module
from qwen_quant.hub.download import DownloadJob, ModelSource, download_repo, resolve_model
from qwen_quant.hub.transport import RetryPolicy
from tests.loophub import Fault, FaultPlan, Hub, serve_hub

REPO = "org/tiny"
WEIGHTS = "model.safetensors"
SIZE = 3 << 20
ROOT = Path(__file__).parents[1]


def repository() -> dict[str, bytes | Path]:
    """A repository with all kinds of files; the weights are random bytes, which no download looks into."""
    weights = random.Random(7).randbytes(SIZE)
    return {
        WEIGHTS: weights,
        "config.json": b'{"model_type": "qwen2"}',
        "tokenizer.json": b'{"tokens": []}' * 1000,
        "merges.txt": b"a b\n",
        "LICENSE": b"Apache-2.0\n",
        "README.md": b"# card\n",
        "modeling_qwen.py": b"print('never')\n",
        "pytorch_model.bin": b"pickle" * 100,
        "pytorch_model.bin.index.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "assets/config.json": b"{}",
    }


NEEDED = {WEIGHTS, "config.json", "tokenizer.json", "merges.txt", "LICENSE", "README.md"}


@dataclass(frozen=True)
class Place:
    """A hub, and where its client's files go."""

    hub: Hub
    home: Path

    def start(self, *arguments: str, token: str | None = Hub.token, **variables: str) -> subprocess.Popen[str]:
        """`qwen-quant download ARGUMENTS` as a process of its own."""
        environment = self.hub.environment(self.home, token=token) | {"PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-m", "qwen_quant", *arguments]
        return subprocess.Popen(
            command, cwd=self.home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, token: str | None = Hub.token, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*arguments, token=token, **variables)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def result(self, *arguments: str, **options: str) -> dict:
        """The JSON of a download that succeeds."""
        done = self.run("download", *arguments, "--json", **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def error(self, code: int, *arguments: str, token: str | None = Hub.token, **variables: str) -> str:
        """The message of a download that fails: one, without a traceback or a token. In this process, to save time."""
        out, err = io.StringIO(), io.StringIO()
        with self.client_here(token, **variables), redirect_stdout(out), redirect_stderr(err):
            returned = cli.run(["download", *arguments])
        assert (returned, out.getvalue()) == (code, ""), err.getvalue()
        message = err.getvalue()
        assert message.count("error: ") == 1 and "Traceback" not in message and "hf_" not in message
        return message

    @contextmanager
    def client_here(self, token: str | None = Hub.token, **variables: str) -> Iterator[None]:
        """Make this process a client of the hub, in the home folder."""
        endpoint = variables.get("HF_ENDPOINT", self.hub.endpoint)
        settings = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": variables.get("HF_HUB_OFFLINE") == "1",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN_PATH": str(self.home / "token"),
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(constants, name, value)
            patch.setenv("HF_TOKEN", token) if token else patch.delenv("HF_TOKEN", raising=False)
            patch.setattr(download_module, "RetryPolicy", lambda: RetryPolicy(3, 0.05))
            patch.chdir(self.home)
            yield

    def fetched(self, method: str = "GET") -> list[str]:
        """Paths of storage and resolve requests so far."""
        return [path for verb, path in self.hub.requests if verb == method and ("/storage/" in path or "cache" in path)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield from serve(tmp_path)


def serve(tmp_path: Path, *faults: Fault, mode: str = "lfs", **options: bool) -> Iterator[Place]:
    """A hub with the repository under REPO."""
    home = tmp_path / "home"
    home.mkdir()
    with serve_hub(tmp_path / "hub", mode=mode, faults=FaultPlan(faults)) as hub:
        hub.add_repo(REPO, repository(), **options)
        yield Place(hub, home)


def check_files(folder: Path, names: set[str] = NEEDED) -> None:
    """The folder shows exactly these files, each with the repository's bytes."""
    content = repository()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".qwen-quant/")} == names
    for name in names:
        assert hashlib.sha256((folder / name).read_bytes()).digest() == hashlib.sha256(content[name]).digest(), name


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_only_what_is_needed_arrives_and_is_found_again(tmp_path: Path, mode: str) -> None:
    for place in serve(tmp_path, mode=mode):
        result = place.result(REPO)
        folder = Path(result["path"])
        commit = place.hub.commits(REPO)[0].oid
        assert folder == place.home / "hub/models--org--tiny/snapshots" / commit
        check_files(folder)
        assert (folder / WEIGHTS).is_symlink() and result["commit"] == commit
        assert result["left_out"]["modeling_qwen.py"] == "code is never fetched"
        assert result["left_out"]["pytorch_model.bin"] == "pickles are never fetched"
        assert {file["how"] for file in result["files"]} == {"fetched"}
        assert result["fetched_bytes"] == result["total_bytes"] > SIZE
        stored = [path for path in place.fetched() if "/storage/" in path]
        assert len(stored) == (1 if mode == "lfs" else 0), "Xet files do not come over HTTP"
        before = len(place.fetched())
        again = place.result(REPO)
        assert {file["how"] for file in again["files"]} == {"reused"} and len(place.fetched()) == before
        with place.client_here(HF_HUB_OFFLINE="1"):
            offline = download_repo(DownloadJob(REPO, "main"))
        assert offline.offline and offline.commit == commit and offline.path == folder
        assert not scan_cache_dir(place.home / "hub").warnings, "huggingface_hub finds nothing wrong with its cache"


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_a_partial_file_is_continued(tmp_path: Path, mode: str) -> None:
    for place in serve(tmp_path, mode=mode):
        weights = repository()[WEIGHTS]
        assert isinstance(weights, bytes)
        blobs = place.home / "hub/models--org--tiny/blobs"
        blobs.mkdir(parents=True)
        name = f"{hashlib.sha256(weights).hexdigest()}.qwen-quant.incomplete"
        (blobs / name).write_bytes(weights[:2_000_000])
        result = place.result(REPO)
        file = next(file for file in result["files"] if file["path"] == WEIGHTS)
        assert (file["how"], file["bytes_fetched"]) == ("resumed", SIZE - 2_000_000)
        check_files(Path(result["path"]))
        assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_continues(tmp_path: Path, how: signal.Signals) -> None:
    for place in serve(tmp_path, Fault("slow", r"GET /storage", times=1, bytes_per_second=1 << 18)):
        folder = place.home / "here"
        process = place.start("download", REPO, "--local-dir", str(folder))
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(
            path.stat().st_size > 300_000 for path in folder.glob(".qwen-quant/*.incomplete")
        ):
            time.sleep(0.02)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
        assert not (folder / WEIGHTS).exists()
        result = place.result(REPO, "--local-dir", str(folder))
        file = next(file for file in result["files"] if file["path"] == WEIGHTS)
        assert file["how"] == "resumed" and 0 < file["bytes_fetched"] <= SIZE - 300_000
        check_files(folder)


@pytest.mark.parametrize(
    ("faults", "how"),
    [
        ((Fault("cut", r"GET /storage", times=2),), "fetched"),
        ((Fault("503", r"GET /(api|org)", times=3), Fault("close", r"GET /storage")), "fetched"),
        ((Fault("429", r"GET /api/models/org/tiny/tree"), Fault("500", r"resolve.*safetensors")), "fetched"),
        ((Fault("flip", r"GET /storage"),), "fetched twice"),
    ],
    ids=["cut", "503-close", "429-500", "flip"],
)
def test_passing_trouble_leaves_no_trace(tmp_path: Path, faults: tuple[Fault, ...], how: str) -> None:
    for place in serve(tmp_path, *faults):
        result = place.result(REPO)
        assert next(file["how"] for file in result["files"] if file["path"] == WEIGHTS) == how
        check_files(Path(result["path"]))
        assert place.hub.clock.happened() == sum(fault.times for fault in faults)


def test_a_damaged_original_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("flip", r"GET /storage", times=99)):
        message = place.error(5, REPO, "--local-dir", "here")
        assert WEIGHTS in message and "damaged twice" in message
        assert not (place.home / "here" / WEIGHTS).exists()


def test_a_damaged_small_file_is_found_by_its_blob_id(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("flip", r"GET /api/resolve-cache.*tokenizer", times=99)):
        assert "tokenizer.json" in place.error(5, REPO, "--quiet")


def test_trouble_that_stays_is_reported_and_bounded(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("401", r"GET /org/tiny/resolve", times=99)):
        assert "wrong, revoked or expired" in place.error(5, REPO)


def test_a_repository_that_is_not_there_gets_the_nearest_names(place: Place) -> None:
    message = place.error(5, "org/tinny")
    assert "no such repository" in message and "did you mean org/tiny?" in message
    assert "HF_TOKEN" in place.error(5, "org/tinny", token=None)


def test_an_absent_revision_gets_those_that_exist(place: Place) -> None:
    message = place.error(5, f"{REPO}@maim")
    assert "'maim'" in message and "main" in message.split("next:")[1]


def test_tokens_and_terms(tmp_path: Path) -> None:
    for place in serve(tmp_path, gated=True):
        page = f"{place.hub.endpoint}/{REPO}"
        assert f"accept them at {page}" in place.error(5, REPO)
        assert "log in" in place.error(5, REPO, token=None)
        assert "wrong, revoked or expired" in place.error(5, REPO, token=place.hub.expired_token)
        place.hub.grant(REPO)
        check_files(Path(place.result(REPO)["path"]))


def test_a_private_repository_is_not_there_for_strangers(tmp_path: Path) -> None:
    for place in serve(tmp_path, private=True):
        assert "may not see it" in place.error(5, REPO, token=place.hub.stranger_token)
        check_files(Path(place.result(REPO)["path"]))


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "pickles only"),
        ({"model.safetensors": b"x", "../../evil.json": b"{}"}, "leads out of the folder"),
        ({"model.safetensors": b"x", "config.json": b"{}", "Config.json": b"{}"}, "has both"),
        ({"README.md": b"x"}, "no safetensors weights"),
    ],
)
def test_bad_repositories_are_refused_before_anything_is_written(
    place: Place, files: dict[str, bytes | Path], word: str
) -> None:
    place.hub.add_repo("org/bad", files)
    assert word in place.error(3, "org/bad", "--local-dir", "here")
    assert not (place.home / "here").exists()


def test_no_network_and_no_copy(place: Place) -> None:
    assert "HF_HUB_OFFLINE" in place.error(5, REPO, HF_HUB_OFFLINE="1")
    assert "HF_ENDPOINT" in place.error(5, REPO, HF_ENDPOINT="http://127.0.0.1:9")


def test_what_huggingface_hub_left_is_used_and_checked(place: Place) -> None:
    code = f"from huggingface_hub import snapshot_download as s; print(s({REPO!r}, ignore_patterns='*.py'))"
    environment = place.hub.environment(place.home)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    snapshot = Path(done.stdout.strip())
    offline = place.result(REPO, HF_HUB_OFFLINE="1")
    assert offline["path"] == str(snapshot) and offline["offline"]
    damaged = (snapshot / WEIGHTS).resolve()
    content = bytearray(damaged.read_bytes())
    content[99] ^= 1
    damaged.write_bytes(content)
    assert "lacks model.safetensors" in place.error(5, REPO, HF_HUB_OFFLINE="1")
    result = place.result(REPO)
    hows = {file["path"]: file["how"] for file in result["files"]}
    assert hows.pop(WEIGHTS) == "fetched" and set(hows.values()) == {"reused"}
    weights = repository()[WEIGHTS]
    assert (snapshot / WEIGHTS).read_bytes() == weights


def test_two_at_once_fetch_it_once(tmp_path: Path) -> None:
    for place in serve(tmp_path, Fault("slow", r"GET /storage", bytes_per_second=4 << 20)):
        both = [place.start("download", REPO, "--json") for _ in range(2)]
        results = [json.loads(process.communicate(timeout=120)[0]) for process in both]
        hows = sorted(next(f["how"] for f in r["files"] if f["path"] == WEIGHTS) for r in results)
        assert hows == ["fetched", "reused"]
        assert len([path for path in place.fetched() if "/storage/" in path]) == 1
        check_files(Path(results[0]["path"]))


def test_other_commands_fetch_in_the_same_way(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    commit = place.hub.commits(REPO)[0].oid
    with place.client_here():
        found = find_model(f"{REPO}@main", Output())
    assert found == ModelSource(place.home / "hub/models--org--tiny/snapshots" / commit, REPO, commit)
    assert f"{REPO} at commit {commit}" in capsys.readouterr().err
    check_files(found.path)


@pytest.mark.parametrize("repo", ["tiny", "../up", "org/name@", "a/b/c", "org/name@../x"])
def test_what_is_no_hub_id_is_bad_input(place: Place, repo: str) -> None:
    before = len(place.hub.requests)
    assert "is not a" in place.error(3, repo)
    assert len(place.hub.requests) == before


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == ModelSource(Path("org/name"), "name", None)
    assert resolve_model("./org/name/").source_id == "name"


@pytest.mark.parametrize("model", ["name", "../up", "/abs/no", "a/b/c", "org/name@", ".hidden/x", "org /name"])
def test_what_is_neither_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not a checkpoint"):
        resolve_model(model)


def test_a_table_for_people(place: Place) -> None:
    done = place.run("download", REPO)
    assert done.returncode == 0 and WEIGHTS in done.stdout and "all verified" in done.stdout
    assert place.hub.commits(REPO)[0].oid in done.stdout
    assert "never fetched" in done.stdout
