"""`qwen-quant release` as real processes against the loopback Hub: a failed gate pushes nothing, kills cost nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.progress import no_progress
from qwen_quant.release import ReleaseJob, run_release
from qwen_quant.releasing.settings import load_release
from tests.loophub import Fault, FaultPlan, Hub, serve_hub
from tests.support.zygote import Running, Zygote
from tests.test_release import write_recipe

SOURCE, TARGET = "org/tiny", "org/tiny-Int4"
CARD = b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n"
SETTINGS = 'profile = "none"\nlicence = "apache-2.0"\ntag = "v1"\nformats = ["awq"]'
COMMIT = f"POST /api/models/{TARGET}/commit/"
DEADLINE_SECONDS = 120


@pytest.fixture
def hub(tmp_path: Path, qwen2_folder: Path) -> Iterator[Hub]:
    """A Hub with the source; the reply to the first commit that is pushed is lost."""
    lost = FaultPlan((Fault("close-after", COMMIT),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=lost) as hub:
        files: dict[str, bytes | Path] = {path.name: path for path in qwen2_folder.iterdir()}
        hub.add_repo(SOURCE, {**files, "README.md": CARD})
        yield hub


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@dataclass(frozen=True)
class Starter:
    """Starts the release in `place`, each time as a process of its own."""

    zygote: Zygote
    hub: Hub
    place: Path

    def __call__(self, recipe: Path) -> Running:
        arguments = ["release", str(recipe), "--repo", TARGET, "--work", str(self.place / "work"), "--json", "--quiet"]
        environment = {**self.hub.environment(self.place / "home"), "OMP_NUM_THREADS": "1"}
        return self.zygote.start(arguments, environment, self.place)


def finished(process: Running, code: int) -> dict[str, Any]:
    """The one JSON document of a release that ends with `code`."""
    left, out, err = process.communicate()
    assert left == code, err
    assert "Traceback" not in err
    document: dict[str, Any] = json.loads(out)
    return document


def kill_when(process: Running, happened: Callable[[], bool]) -> None:
    """SIGKILL as soon as `happened`; that the process ends before is a failure of the test."""
    limit = time.monotonic() + DEADLINE_SECONDS
    while not happened() and time.monotonic() < limit:
        time.sleep(0.001)
    process.kill(signal.SIGKILL)
    code, _, err = process.communicate()
    assert code == -signal.SIGKILL, err


def running(place: Path) -> str:
    """The stage that release.json names as running."""
    try:
        rows = json.loads((place / "work" / "release.json").read_text())["stages"]
    except (OSError, ValueError):
        return ""
    return next((row["name"] for row in rows if row["status"] == "running"), "")


def test_a_failed_gate_pushes_nothing_and_kills_cost_nothing(
    tmp_path: Path, hub: Hub, zygote: Zygote, qwen2_folder: Path
) -> None:
    start = Starter(zygote, hub, tmp_path)
    recipe = write_recipe(tmp_path, SOURCE, release=SETTINGS, max_kl=0.0)
    document = finished(start(recipe), 4)
    assert document["error"]["exit_code"] == 4 and not document["complete"]
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"} and not hub.exists(TARGET)

    write_recipe(tmp_path, SOURCE, release=SETTINGS, samples=40)
    blocks = "artifact-*/.*.partial/state/progress.json"
    kill_when(start(recipe), lambda: any((tmp_path / "work").glob(blocks)))
    assert running(tmp_path) == "gptq"
    kill_when(start(recipe), lambda: running(tmp_path) == "validate")
    kill_when(start(recipe), lambda: any(f"{m} {path}".startswith(COMMIT) for m, path in hub.requests))
    assert running(tmp_path) == "push"

    document = finished(start(recipe), 0)
    statuses = {row["name"]: row["status"] for row in document["stages"] if row["status"] != "left out"}
    earlier = ("download", "gptq", "validate", "gate", "export", "card")
    assert statuses == {**dict.fromkeys(earlier, "unchanged"), "push": "done"}
    artifact = Path(document["artifact"])
    pushed = [commit for commit in hub.commits(TARGET) if "config.json" in commit.files]
    assert len(pushed) == 1 and hub.repository(TARGET).tags["v1"] == pushed[0].oid
    assert set(pushed[0].files) - {".gitattributes"} == {path.name for path in artifact.iterdir()}
    for path in artifact.iterdir():
        assert hub.file_bytes(TARGET, "main", path.name) == path.read_bytes()
    export = next((tmp_path / "work").glob("exports-*/*-awq"))
    assert document["formats"] == {"awq": f"{TARGET}-AWQ"} and hub.repository(f"{TARGET}-AWQ").tags
    for path in export.iterdir():
        assert hub.file_bytes(f"{TARGET}-AWQ", "main", path.name) == path.read_bytes()
    assert hub.token not in json.dumps(document) + (tmp_path / "work" / "release.json").read_text()

    whole = write_recipe(tmp_path, qwen2_folder, release=SETTINGS, samples=40)
    job = ReleaseJob(load_release(whole), tmp_path / "whole", until="gptq")
    assert weights_sha256(Path(run_release(job, no_progress, print).artifact)) == weights_sha256(artifact)
