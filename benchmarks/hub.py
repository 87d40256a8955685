#!/usr/bin/env python3
"""Download and push over loopback: 200 disturbed runs, the memory of a 3 GiB push, the time of a real artifact.

Every command is a process of its own against tests/loophub, in LFS and in Xet mode.

    python benchmarks/hub.py stress --work DIR [--first 1000] [--runs 200] [--again SEED ...]
    python benchmarks/hub.py memory --work DIR [--gib 3]
    python benchmarks/hub.py real --work DIR --artifact FOLDER [--repeat 3]
    python benchmarks/hub.py tables

Each part replaces its own section of benchmarks/results/hub.json; `tables` writes hub.md from that file.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fcntl
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from tests.loophub import Hub, serve_hub  # noqa: E402
from tests.support.hub_stress import Outcome, make_plan, run_one  # noqa: E402
from tests.support.pushable import make_pushable, seal_again, write_report_for  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
# For an artifact of a local folder; any real id will do, the card only has to be complete.
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODES = ("lfs", "xet")
MIB = 1 << 20
CLIENT_DOWNLOAD = "import sys, huggingface_hub as h; h.snapshot_download('loop/real', local_dir=sys.argv[1])"
CLIENT_PUSH = (
    "import sys, huggingface_hub as h; h.create_repo('loop/real-hf', exist_ok=True); "
    "h.upload_folder(repo_id='loop/real-hf', folder_path=sys.argv[1])"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("stress", "memory", "real", "tables"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--again", type=int, nargs="*", help="these seeds only, reported apart")
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.part == "tables":
        write_tables()
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.part == "stress":
        seeds = arguments.again or list(range(arguments.first, arguments.first + arguments.runs))
        stress(arguments.work, seeds, "again" if arguments.again else f"stress {arguments.first}")
    elif arguments.part == "memory":
        save("memory", memory(arguments.work, arguments.gib))
    else:
        save("real", real(arguments.work, arguments.artifact, arguments.repeat))


def save(section: str, value: dict[str, Any]) -> None:
    """Replace one section; parts may run side by side."""
    path = RESULTS / "hub.json"
    with (Path(tempfile.gettempdir()) / "qwen-quant-hub-benchmark.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        document = json.loads(path.read_text()) if path.is_file() else {}
        document[section] = value
        document["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def stress(work: Path, seeds: list[int], section: str) -> None:
    """One seed after the other; what is known so far is saved after each."""
    artifact = make_pushable(work / "tiny-Int4", shards=2)
    outcomes = []
    for seed in seeds:
        outcome = run_one(make_plan(seed), work / str(seed), artifact)
        outcomes.append(outcome)
        print(seed, outcome.codes, f"{outcome.seconds:.1f} s", *outcome.problems, file=sys.stderr, flush=True)
        save(section, summary(outcomes))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    groups = collections.Counter(f"{o.plan.command} {o.plan.mode} {o.plan.event}" for o in outcomes)
    first_codes = collections.Counter(str(o.codes[0]) for o in outcomes)
    kinds = collections.Counter(f.kind for o in outcomes if o.plan.event == "fault" for f in o.plan.faults)
    return {
        "runs": len(outcomes),
        "seeds": [outcomes[0].plan.seed, outcomes[-1].plan.seed],
        "list": ", ".join(str(o.plan.seed) for o in outcomes),
        "groups": dict(groups),
        "fault_kinds_planned": dict(kinds),
        "faults_injected": sum(o.faults for o in outcomes if o.plan.event == "fault"),
        "killed": sum(o.codes[0] == -9 for o in outcomes),
        "first_exit_codes": dict(first_codes),
        "second_run_succeeded": sum(o.codes[1] == 0 for o in outcomes),
        "runs_with_problems": [
            {"seed": o.plan.seed, "plan": dataclasses.asdict(o.plan), "problems": o.problems}
            for o in outcomes
            if o.problems
        ],
        "seconds": round(sum(o.seconds for o in outcomes), 1),
    }


def memory(work: Path, gib: float) -> dict[str, Any]:
    """Peak resident bytes of `push` for a model with one tensor of `gib` GiB, and of the same push without it."""
    small = make_pushable(work / "small-Int4")
    big = Path(shutil.copytree(small, work / "big-Int4", dirs_exist_ok=True))
    enlarge(big, int(gib * (1 << 30)))
    value: dict[str, Any] = {"file_bytes": (big / "model.safetensors").stat().st_size, "push": {}}
    for mode in MODES:
        for name, folder in (("without", small), ("with", big)):
            with serve_hub(work / f"hub-{mode}-{name}", mode=mode, part_bytes=64 * MIB) as hub:  # type: ignore[arg-type]
                value["push"][f"{mode} {name}"] = watched(hub, work, ["push", str(folder), f"loop/{name}-{mode}"])
            shutil.rmtree(work / f"hub-{mode}-{name}")
        save("memory", value)
    shutil.rmtree(big)
    return value


def enlarge(folder: Path, size: int) -> None:
    """Give the artifact an embedding of `size` bytes (random values below 1), its config and evidence following."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            file.seek(start + entry["data_offsets"][0])
            tensors[name] = file.read(entry["data_offsets"][1] - entry["data_offsets"][0])
    embedding = "model.embed_tokens.weight"
    width = header[embedding]["shape"][1]
    item = len(tensors[embedding]) // (header[embedding]["shape"][0] * width)
    rows = size // (width * item) // 64 * 64
    header[embedding]["shape"] = [rows, width]
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows, "tie_word_embeddings": True}
    header.pop("lm_head.weight", None)
    place = 0
    for name, entry in header.items():
        length = rows * width * item if name == embedding else len(tensors[name])
        entry["data_offsets"] = [place, place + length]
        place += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for block in random_values(rows * width * item) if name == embedding else (tensors[name],):
                file.write(block)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "report.json").unlink()
    seal_again(folder)
    write_report_for(folder)


def random_values(size: int) -> Iterator[bytes]:
    """`size` bytes that no storage can make smaller; the exponents stay those of values below 1."""
    rng = np.random.default_rng(0)
    while size > 0:
        block = rng.integers(0, 1 << 16, min(size, 64 * MIB) // 2, dtype=np.uint16) & np.uint16(0xBBFF)
        yield block.tobytes()
        size -= block.nbytes


def watched(hub: Hub, work: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command to its end; its seconds and its peak resident bytes, of which anonymous and of files."""
    environment = hub.environment(work / "home") | {"HF_HUB_OFFLINE": "0"}
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "qwen_quant", *arguments, "--quiet"], env=environment, cwd=work)
    peaks: dict[str, int] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    if process.wait() != 0:
        raise SystemExit(f"{arguments} failed with {process.returncode}")
    watcher.join()
    return {"seconds": round(time.monotonic() - started, 2), **peaks}


def watch(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
    """Peaks in bytes; VmHWM is the kernel's own, the others are sampled every 20 ms."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("VmHWM", "RssAnon", "RssFile"):
                peaks[f"{name}_bytes"] = max(peaks.get(f"{name}_bytes", 0), int(rest.split()[0]) * 1024)
        time.sleep(0.02)


def real(work: Path, artifact: Path, repeat: int) -> dict[str, Any]:
    """Seconds of whole commands for a real artifact, ours and huggingface_hub's own client in turn, fresh each time."""
    folder = Path(shutil.copytree(artifact, work / "real", dirs_exist_ok=True))
    if not (folder / "LICENSE").is_file():
        (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    if not (folder / "report.json").is_file():
        from qwen_quant.checkpoint.identity import weights_sha256_of
        from qwen_quant.checkpoint.manifest import read_manifest, seal

        # No figure of this report is real: a push compares whose it is, and here only the transfer is measured.
        seal(folder, ["LICENSE"])
        source = read_manifest(folder)["source"]["sha256"]
        write_report_for(folder, baseline_sha256=weights_sha256_of(source))
        card = [sys.executable, "-m", "qwen_quant", "card", str(folder), "--base-model", BASE_MODEL, "--quiet"]
        subprocess.run(card, check=True, stdout=subprocess.DEVNULL)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    for mode in MODES:
        for number in range(repeat):
            place = work / f"{mode}-{number}"
            with serve_hub(place / "hub", mode=mode) as hub:  # type: ignore[arg-type]
                hub.add_repo("loop/real", {path.name: path for path in folder.iterdir()})
                module = [sys.executable, "-m", "qwen_quant"]
                for name, command in (
                    ("download", [*module, "download", "loop/real", "--local-dir", str(place / "a"), "--quiet"]),
                    ("download again", [*module, "download", "loop/real", "--local-dir", str(place / "a"), "--quiet"]),
                    ("download hf", [sys.executable, "-c", CLIENT_DOWNLOAD, str(place / "b")]),
                ):
                    seconds[f"{mode} {name}"].append(timed(hub, place, command))
            with serve_hub(place / "hub2", mode=mode) as hub:  # type: ignore[arg-type]
                push = [*module, "push", str(folder), "loop/pushed", "--quiet"]
                seconds[f"{mode} push"].append(timed(hub, place, push))
                seconds[f"{mode} push again"].append(timed(hub, place, push))
            with serve_hub(place / "hub3", mode=mode) as hub:  # type: ignore[arg-type]
                seconds[f"{mode} push hf"].append(timed(hub, place, [sys.executable, "-c", CLIENT_PUSH, str(folder)]))
            shutil.rmtree(place)
    total = sum(path.stat().st_size for path in folder.iterdir())
    return {"artifact_bytes": total, "seconds": dict(seconds)}


def timed(hub: Hub, place: Path, command: list[str]) -> float:
    environment = hub.environment(place / "home") | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    started = time.monotonic()
    subprocess.run(command, env=environment, cwd=place, check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - started, 2)


def write_tables() -> None:
    document = json.loads((RESULTS / "hub.json").read_text())
    lines = ["# Download and push over loopback", "", f"{document['machine']}", ""]
    parts = [value for name, value in sorted(document.items()) if name.startswith("stress")]
    lines += stress_table(parts, document.get("again"))
    lines += memory_table(document.get("memory"))
    lines += real_table(document.get("real"))
    (RESULTS / "hub.md").write_text("\n".join(lines).rstrip() + "\n")


def stress_table(parts: list[dict[str, Any]], repeated: dict[str, Any] | None) -> list[str]:
    if not parts:
        return []
    again = []
    if repeated:
        left = len(repeated["runs_with_problems"])
        again = ["", f"Seeds {repeated['list']} again with the code as it is now: {left} with problems."]
    total: dict[str, Any] = {name: sum(part[name] for part in parts) for name in
                             ("runs", "killed", "faults_injected", "second_run_succeeded")}  # fmt: skip
    groups: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for part in parts:
        groups.update(part["groups"])
        codes.update(part["first_exit_codes"])
        kinds.update(part["fault_kinds_planned"])
    problems = [problem for part in parts for problem in part["runs_with_problems"]]
    rows = [f"| {name} | {count} |" for name, count in sorted(groups.items())]
    return [
        "## Disturbed runs",
        "",
        "One run: the command with a random fault, a SIGKILL at a random moment or a foreign commit, then the command "
        "again undisturbed; then every byte here and there is compared, commits are counted, and what was there before "
        "the second run must not have been sent again.",
        "",
        f"{total['runs']} runs: {total['killed']} first runs killed, {total['faults_injected']} faults injected "
        f"({', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))} planned); exit codes of the first "
        f"run: {', '.join(f'{code}: {count}' for code, count in sorted(codes.items()))}. "
        f"Second runs that succeeded: {total['second_run_succeeded']}. Runs with anything lost, wrong or double: "
        f"{len(problems)}.",
        "",
        "| command, storage, event | runs |",
        "|---|---|",
        *rows,
        "",
        *[f"- seed {p['seed']}: {' '.join('; '.join(p['problems']).split())[:300]}" for p in problems],
        *again,
        "",
    ]


def memory_table(value: dict[str, Any] | None) -> list[str]:
    if not value:
        return []
    rows = [
        f"| {name} | {row['seconds']:.1f} | {row['VmHWM_bytes'] / MIB:.0f} | {row['RssAnon_bytes'] / MIB:.0f} |"
        for name, row in value["push"].items()
    ]
    return [
        f"## Memory of a push with a file of {value['file_bytes'] / (1 << 30):.2f} GiB, and of the same without it",
        "",
        "| storage, big file | seconds | peak RSS MiB | of that anonymous MiB |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def real_table(value: dict[str, Any] | None) -> list[str]:
    if not value:
        return []
    rows = [
        f"| {name} | {statistics.median(times):.2f} | {', '.join(map(str, times))} |"
        for name, times in value["seconds"].items()
    ]
    return [
        f"## A real artifact of {value['artifact_bytes'] / MIB:.0f} MiB",
        "",
        "Whole processes, start to end; `hf` is huggingface_hub's own client, which verifies nothing.",
        "",
        "| storage, command | median seconds | all |",
        "|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
