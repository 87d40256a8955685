"""Download and push under a random fault, a SIGKILL or somebody else's commit, then again undisturbed: what is left.

One seed is one run: mode, command, what goes wrong and when all follow from it. The commands are real processes against
the loopback Hub. `run_one` says what is wrong afterwards; an empty tuple is the claim of the stress test.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.loophub import Fault, FaultPlan, Hub, serve_hub

REPO = "loop/stress"
NEEDED = ("config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors", "LICENSE", "README.md")
TIMEOUT_SECONDS = 240
# Routes that the commands ask; those of one storage, of the tag and of pull requests only where they are in use.
_ROUTES = {
    "download": ("GET /api/models/", "GET /api/models/.*/tree", "/resolve/", "GET /api/resolve-cache"),
    "push": ("POST /api/repos/create", "GET /api/models/", "GET .*/refs", "GET .*/tree/", "POST .*/preupload",
             "POST .*/validate-yaml", "GET .*/commits/", *("POST .*/commit/",) * 3),
    "download lfs": ("GET /storage",) * 3,
    "download xet": ("xet-read-token",),
    "push lfs": ("POST .*/objects/batch", "objects/verify", "POST /api/complete_multipart", *("PUT /storage",) * 2),
    "push xet": ("xet-write-token",),
}  # fmt: skip
_REPLIES = ("503", "500", "429", "close", "close-after")


@dataclass(frozen=True)
class Plan:
    """What one run does.

    Attributes:
        event: "fault", "kill" (SIGKILL) or "intruder" (another commit lands on the branch).
        after_requests, delay_seconds: when the last two happen: so long after the arrival of that request.
        options: of the command, besides its target.
    """

    seed: int
    mode: Literal["lfs", "xet"]
    command: Literal["download", "push"]
    event: Literal["fault", "kill", "intruder"]
    faults: tuple[Fault, ...]
    after_requests: int
    delay_seconds: float
    options: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of it. `codes`: exit codes of both runs (-9: killed). `faults`: how many were injected."""

    plan: Plan
    codes: tuple[int, int]
    faults: int
    problems: tuple[str, ...]
    seconds: float


def make_plan(seed: int) -> Plan:
    """The run that a seed stands for."""
    rng = random.Random(seed)
    command: Literal["download", "push"] = "push" if rng.random() < 0.5 else "download"
    mode: Literal["lfs", "xet"] = "xet" if rng.random() < 0.5 else "lfs"
    event: Literal["fault", "kill", "intruder"] = "fault" if rng.random() < 0.5 else "kill"
    if command == "push" and rng.random() < 0.1:
        event = "intruder"
    choices = ((), ("--cache",)) if command == "download" else ((), ("--tag", "v1"), ("--create-pr",))
    options: tuple[str, ...] = rng.choice(choices)
    routes = _ROUTES[command] + _ROUTES[f"{command} {mode}"] + (("POST .*/tag/",) if "--tag" in options else ())
    if event == "fault":
        faults = tuple(_fault(rng, routes) for _ in range(rng.choice((1, 1, 2, 3))))
    else:  # slow bodies, so that a moment may lie inside one
        faults = (Fault("slow", "(GET|PUT) /storage", times=1000, bytes_per_second=rng.choice((1, 2, 4)) << 20),)
    last = 16 if command == "download" else 26
    # A download writes each MiB once it has it: a moment inside a slow body is seconds after its request.
    longest = 2.5 if command == "download" and mode == "lfs" else 0.5
    return Plan(seed, mode, command, event, faults, rng.randint(1, last), rng.random() ** 2 * longest, options)


def _fault(rng: random.Random, routes: tuple[str, ...]) -> Fault:
    route = rng.choice(routes)
    kinds: tuple[str, ...] = _REPLIES
    if "storage" in route or "resolve-cache" in route:
        kinds += ("cut", "flip", "slow", "cut", "flip")
    if "/commit/" in route:
        kinds += ("412", "close-after", "close-after")
    kind = rng.choice(kinds)
    times = 60 if rng.random() < 0.04 and kind in ("503", "close") else rng.randint(1, 2)
    return Fault(kind, route, times=times, skip=rng.choice((0, 0, 0, 1)), bytes_per_second=2 << 20)  # type: ignore[arg-type]


def repository(seed: int) -> dict[str, bytes]:
    """What is downloaded: two large files, some small ones, and some that are never fetched."""
    rng = random.Random(seed)
    return {
        "config.json": b'{"model_type": "qwen2"}',
        "tokenizer.json": rng.randbytes(30_000).hex().encode(),
        "model-1.safetensors": rng.randbytes(4_000_000),
        "model-2.safetensors": rng.randbytes(2_500_000),
        "LICENSE": b"Apache-2.0\n",
        "README.md": b"# card\n",
        "modeling.py": b"print('never')\n",
    }


def run_one(plan: Plan, work: Path, artifact: Path) -> Outcome:
    """Do it in `work` (made, and removed when all is well). `artifact`: what a push sends, copied first."""
    started = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    (work / "home").mkdir(parents=True)
    with serve_hub(work / "hub", mode=plan.mode, faults=FaultPlan(plan.faults), part_bytes=1 << 16) as hub:
        run = _download_run(plan, hub, work) if plan.command == "download" else _push_run(plan, hub, work, artifact)
        first, err = _disturbed(plan, hub, run)
        happened = hub.clock.happened()
        problems = [*_message_problems(first, err, hub), *run.left(first)]
        hub.clock.heal()
        mark = len(hub.log)
        second, err = _finish(_start(run))
        if second != 0:
            problems.append(f"the second run failed ({second}): {err[-1500:]}")
        problems += run.right(mark)
    if not problems:
        shutil.rmtree(work)
    return Outcome(plan, (first, second), happened, tuple(problems), time.monotonic() - started)


@dataclass(frozen=True)
class _Run:
    """A command and how to judge what it leaves.

    Attributes:
        left: exit code of the first run -> what is wrong after it. right: length of the log at the second run's begin
            -> what is wrong after that one.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: Path
    left: Callable[[int], list[str]]
    right: Callable[[int], list[str]]


def _start(run: _Run) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qwen_quant", *run.arguments, "--quiet"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=run.environment, cwd=run.folder, stdout=pipe, stderr=pipe, text=True)


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        return 124, f"it hung for {TIMEOUT_SECONDS} s\n{err}"
    return process.returncode, err


def _disturbed(plan: Plan, hub: Hub, run: _Run) -> tuple[int, str]:
    """The first run, with its event."""
    process = _start(run)
    if plan.event == "fault":
        return _finish(process)
    watcher = threading.Thread(target=_strike, args=(plan, hub, process))
    watcher.start()
    code, err = _finish(process)
    watcher.join()
    return code, err


def _strike(plan: Plan, hub: Hub, process: subprocess.Popen[str]) -> None:
    while hub.clock.asked < plan.after_requests and process.poll() is None:
        time.sleep(0.002)
    time.sleep(plan.delay_seconds)
    if plan.event == "kill":
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    elif hub.exists(REPO):
        hub.add_commit(REPO, {"notes.txt": b"somebody else"}, title="Intruder")


def _message_problems(code: int, err: str, hub: Hub) -> list[str]:
    """A failure is one message of ours; a token is in none."""
    problems = ["a token in the output"] if hub.token in err else []
    if "Traceback" in err or (code not in (0, -signal.SIGKILL) and "error: " not in err):
        problems.append(f"not an error of ours ({code}): {err[-1500:]}")
    return problems


def _download_run(plan: Plan, hub: Hub, work: Path) -> _Run:
    contents = repository(plan.seed)
    hub.add_repo(REPO, contents)
    arguments = ["download", REPO] + ([] if "--cache" in plan.options else ["--local-dir", str(work / "model")])
    had: dict[str, int] = {}

    def places() -> dict[str, Path]:
        if "--cache" not in plan.options:
            return {name: work / "model" / name for name in NEEDED}
        snapshots = list((work / "home").rglob("snapshots/*"))
        return {name: snapshots[0] / name for name in NEEDED} if snapshots else {}

    def left(code: int) -> list[str]:
        problems = [
            f"{name} is there and wrong after the first run"
            for name, path in places().items()
            if path.exists() and path.read_bytes() != contents[name]
        ]
        missing = [name for name in NEEDED if name not in places() or not places()[name].exists()]
        if code == 0 and missing:
            problems.append(f"the first run succeeded without {missing}")
        flipped = any(fault.kind == "flip" for fault in plan.faults)
        for name in () if flipped else NEEDED:  # a damaged partial file has to go
            had[name] = len(contents[name]) - _missing_bytes(name, contents[name], places(), work)
        return problems

    def right(mark: int) -> list[str]:
        problems = [
            f"{name} is absent or wrong after the second run"
            for name in NEEDED
            if name not in places() or not places()[name].is_file() or places()[name].read_bytes() != contents[name]
        ]
        for name, kept in had.items():
            sha256 = hashlib.sha256(contents[name]).hexdigest()
            sent = sum(line.sent_bytes for line in hub.log[mark:] if sha256 in line.path)
            if sent > len(contents[name]) - kept:
                problems.append(f"{name}: {kept} bytes were here, and {sent} were sent again")
        return problems

    return _Run(arguments, _environment(hub, work), work, left, right)


def _missing_bytes(name: str, content: bytes, places: dict[str, Path], work: Path) -> int:
    """How much of a file the first run did not bring: nothing, the rest of a partial file, or all."""
    if name in places and places[name].is_file():
        return 0
    sha256 = hashlib.sha256(content).hexdigest()
    partials = [path for path in work.rglob(f"{sha256}*.incomplete") if "hub/objects" not in str(path)]
    return len(content) - max((path.stat().st_size for path in partials), default=0)


def _push_run(plan: Plan, hub: Hub, work: Path, artifact: Path) -> _Run:
    folder = Path(shutil.copytree(artifact, work / "artifact"))
    stored: set[str] = set()

    def left(code: int) -> list[str]:
        stored.update(path.name for path in (work / "hub/objects").iterdir())
        return _push_problems(plan, hub, folder, complete=code == 0)

    def right(mark: int) -> list[str]:
        problems = _push_problems(plan, hub, folder, complete=True)
        lines = hub.log[mark:]
        again = {line.path for line in lines if line.method == "PUT" and any(sha256 in line.path for sha256 in stored)}
        return problems + [f"sent again although it was stored: {path}" for path in sorted(again)]

    return _Run(["push", str(folder), REPO, *plan.options], _environment(hub, work), work, left, right)


def _push_problems(plan: Plan, hub: Hub, folder: Path, *, complete: bool) -> list[str]:
    """Exactly one commit of ours (at most one while it is not complete), and every byte in it as it is here."""
    if not hub.exists(REPO):
        return ["there is no repository"] if complete else []
    repo = hub.repository(REPO)
    revision = "refs/pr/1" if "--create-pr" in plan.options else "main"
    known = hub.commits(REPO, revision) if revision in repo.branches else []
    own = [commit for commit in known if commit.title not in ("initial commit", "Intruder")]
    problems = []
    if len(own) > 1 or len(repo.pulls) > 1 or (complete and not own):
        problems.append(f"{len(own)} commits and {len(repo.pulls)} pull requests of ours")
    if plan.event == "intruder" and revision == "main" and any(c.title == "Intruder" for c in known):
        if "notes.txt" not in known[0].files:
            problems.append("the other's file is gone")
    for path in folder.iterdir() if own and complete else ():
        if path.name not in known[0].files or hub.file_bytes(REPO, revision, path.name) != path.read_bytes():
            problems.append(f"{path.name} on the hub is absent or another")
    if complete and "--tag" in plan.options and repo.tags.get("v1") not in {commit.oid for commit in own}:
        problems.append("the tag is absent or elsewhere")
    return problems


def _environment(hub: Hub, work: Path) -> dict[str, str]:
    return hub.environment(work / "home") | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
