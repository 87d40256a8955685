#!/usr/bin/env python3
"""Speed and memory of `qwen-quant bnb` against reading and writing the bytes alone, and against bitsandbytes' kernel.

    python benchmarks/bnb.py MODEL [--peer VENV/bin/python] [--rounds 3] [--out FILE]

For each format, in fresh processes that take turns, seconds of processor time (machines are shared) and of wall time:

    whole run       everything `bnb` does, hashing and audit included
    bytes alone     read MODEL's tensors, write as many bytes as the artifact has, sync
    our kernel      quantize every linear, tensors in memory
    their kernel    the same with bitsandbytes' own functions (--peer: a Python that has bitsandbytes and torch)

The bound: the whole run within twice the bytes alone or within their kernel, whichever is longer. Memory: the peak of
the process, and its excess over the process with everything imported, against the largest tensor in FP32 + one file +
0.5 GiB. One thread. Writes benchmarks/results/bnb.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bnb.json"
CASES = {"nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4": ("fp4", False), "int8": ("int8", False)}
HALF_GIB = 1 << 29


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def whole_run(model: Path, kind: str, double: bool) -> dict[str, float]:
    from qwen_quant.bnb_convert import quantize_bnb
    from qwen_quant.bnb_plan import BnbJob
    from qwen_quant.environment import peak_rss_bytes
    from qwen_quant.progress import no_progress
    from qwen_quant.recipe import BnbConfig, RunConfig

    imported = peak_rss_bytes()
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        job = BnbJob(model, Path(place) / "out", BnbConfig(kind, double), RunConfig(), "benchmark")
        found = timed(lambda: quantize_bnb(job, no_progress))
        written = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
    return {**found, "written_bytes": written, "imported_bytes": imported, "peak_bytes": peak_rss_bytes()}


def bytes_alone(model: Path, written: int) -> dict[str, float]:
    from qwen_quant.checkpoint.reader import CheckpointReader

    def work() -> None:
        reader = CheckpointReader(model)
        for name in reader.names:
            for _ in reader.parts(name):
                pass
        with tempfile.TemporaryFile(dir=model.parent) as file:
            piece = os.urandom(1 << 22)
            for start in range(0, written, len(piece)):
                file.write(piece[: written - start])
            file.flush()
            os.fsync(file.fileno())

    return timed(work)


def linears(model: Path) -> list[Any]:
    from safetensors.torch import load_file

    tensors = {k: v for file in sorted(model.glob("*.safetensors")) for k, v in load_file(file).items()}
    return [v.clone() for k, v in tensors.items() if v.dim() == 2 and "embed" not in k and "head" not in k]


def our_kernel(model: Path, kind: str, double: bool) -> dict[str, float]:
    from qwen_quant.bnb import quantize_4bit, quantize_int8

    weights = linears(model)
    if kind == "int8":
        return timed(lambda: [quantize_int8(weight) for weight in weights])
    return timed(lambda: [quantize_4bit(weight, kind, double_quant=double) for weight in weights])


def their_kernel(model: Path, kind: str, double: bool) -> dict[str, float]:
    from bitsandbytes import functional

    weights = linears(model)
    if kind == "int8":
        return timed(lambda: [functional.int8_vectorwise_quant(weight.half()) for weight in weights])
    return timed(lambda: [functional.quantize_4bit(w, quant_type=kind, compress_statistics=double) for w in weights])


def child(arguments: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    import torch

    torch.set_num_threads(1)
    kind, double = CASES[arguments.case]
    if arguments.child == "bytes":
        found = bytes_alone(arguments.model, arguments.written)
    else:
        work = {"whole": whole_run, "ours": our_kernel, "theirs": their_kernel}[arguments.child]
        found = work(arguments.model, kind, double)
    print(json.dumps(found))


def measure(python: str, what: str, case: str, model: Path, written: int = 0) -> dict[str, float]:
    command = [python, __file__, str(model), "--child", what, "--case", case, "--written", str(written)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} {case} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure_case(arguments: argparse.Namespace, case: str) -> dict[str, dict[str, float]]:
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        whole = measure(sys.executable, "whole", case, arguments.model)
        rows.setdefault("whole run", []).append(whole)
        written = int(whole["written_bytes"])
        rows.setdefault("bytes alone", []).append(measure(sys.executable, "bytes", case, arguments.model, written))
        rows.setdefault("our kernel", []).append(measure(sys.executable, "ours", case, arguments.model))
        if arguments.peer:
            rows.setdefault("their kernel", []).append(measure(arguments.peer, "theirs", case, arguments.model))
    return {name: median(found) for name, found in rows.items()}


def largest_fp32_bytes(model: Path) -> int:
    from qwen_quant.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(model)
    return max(4 * reader.info(name).nbytes // reader.info(name).dtype.itemsize for name in reader.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="a Python with bitsandbytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--written", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    cases = {case: measure_case(arguments, case) for case in CASES}
    for found in cases.values():
        whole, peer = found["whole run"], found.get("their kernel", {"cpu_seconds": 0.0})
        found["bound"] = {"cpu_seconds": max(2 * found["bytes alone"]["cpu_seconds"], peer["cpu_seconds"])}
        whole["bound_bytes"] = largest_fp32_bytes(arguments.model) + whole["written_bytes"] + HALF_GIB
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"model": arguments.model.name, "rounds": arguments.rounds, "python": platform.python_version()}
    arguments.out.write_text(json.dumps({**document, "cases": cases}, indent=2) + "\n")
    for case, found in cases.items():
        speeds = ", ".join(f"{name} {row['cpu_seconds']:.2f} s" for name, row in found.items())
        whole = found["whole run"]
        memory = f"{whole['peak_bytes'] / 2**20:.0f} MiB, {whole['imported_bytes'] / 2**20:.0f} of them after imports"
        print(f"{case:11s} processor time: {speeds}; peak {memory}, bound {whole['bound_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
