#!/usr/bin/env python3
"""Speed and memory of `qwen-quant bnb` against reading and writing the bytes alone, and against bitsandbytes' kernel.

    python benchmarks/bnb.py MODEL [--peer VENV/bin/python] [--rounds 3] [--out FILE]
    python benchmarks/bnb.py FOLDER --memory [--out FILE]

For each format, in fresh processes that take turns, seconds of processor time (machines are shared) and of wall time:

    whole run       everything `bnb` does, hashing and audit included, but for the start
    start           imports and the plan, which take the same for a model of any size
    bytes alone     read MODEL's tensors, write as many bytes as the artifact has, sync
    our kernel      quantize every linear, tensors in memory
    their kernel    the same with bitsandbytes' own functions (--peer: a Python that has bitsandbytes and torch)

The bound: the whole run within twice the bytes alone or within their kernel, whichever is longer. Memory: the peak of
the process, and its excess over the process with everything imported, against the largest tensor in FP32 + one file +
0.5 GiB. One thread. Writes benchmarks/results/bnb.json.

--memory measures the peak alone, on a checkpoint that it makes in FOLDER (and removes): two blocks of the shapes of
Qwen-7B, an embedding of 151936 x 4096, files of 2 GB. Writes benchmarks/results/bnb_memory.json.
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
MEMORY_RESULTS = ROOT / "benchmarks" / "results" / "bnb_memory.json"
SHARD_BYTES = 2 * 10**9
LARGE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def whole_run(model: Path, kind: str, double: bool) -> dict[str, float]:
    from qwen_quant.bnb_convert import quantize_bnb
    from qwen_quant.bnb_plan import BnbJob, prepare
    from qwen_quant.environment import peak_rss_bytes
    from qwen_quant.progress import no_progress
    from qwen_quant.recipe import BnbConfig, RunConfig

    imported = peak_rss_bytes()
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        run = RunConfig(max_shard_size_bytes=SHARD_BYTES)
        job = BnbJob(model, Path(place) / "out", BnbConfig(kind, double), run, "benchmark")
        start = timed(lambda: prepare(job))
        found = timed(lambda: quantize_bnb(job, no_progress))
        written = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
    started = {f"start_{key}": value for key, value in start.items()}
    return {**found, **started, "written_bytes": written, "imported_bytes": imported, "peak_bytes": peak_rss_bytes()}


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
    from qwen_quant.runtime.kernels.int8 import int8_rows, takes_int8

    weights = linears(model)
    if kind == "int8":
        quantize = int8_rows if takes_int8(sum(weight.nbytes for weight in weights)) else quantize_int8
        return timed(lambda: [quantize(weight) for weight in weights])
    return timed(lambda: [quantize_4bit(weight, kind, double_quant=double) for weight in weights])


def their_kernel(model: Path, kind: str, double: bool) -> dict[str, float]:
    from bitsandbytes import functional

    weights = linears(model)
    if kind == "int8":
        return timed(lambda: [functional.int8_vectorwise_quant(weight.half()) for weight in weights])
    return timed(lambda: [functional.quantize_4bit(w, quant_type=kind, compress_statistics=double) for w in weights])


def child(arguments: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    if arguments.child != "theirs":  # as our command does; theirs stays what its own users run
        sys.path.insert(0, str(ROOT))
        from qwen_quant.process import tune_process

        tune_process()
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


def make_large(folder: Path) -> None:
    """A checkpoint of LARGE, random, in files of SHARD_BYTES, written tensor by tensor."""
    import torch

    from qwen_quant.checkpoint.families import model_spec
    from qwen_quant.checkpoint.writer import PlannedTensor, PlannedWriter, plan_shards
    from qwen_quant.models.skeleton import expected_tensors, meta_model

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    shapes = expected_tensors(meta_model(model_spec(LARGE, "LARGE")))
    planned = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    writer = PlannedWriter(folder, plan_shards(planned, SHARD_BYTES))
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for tensor in planned:
        count = tensor.nbytes // 2
        for start in range(0, count, noise.numel()):
            writer.write_bytes(tensor.name, 2 * start, noise[: count - start])
        writer.finish_parts(tensor.name)
    writer.finish()


def measure_memory(arguments: argparse.Namespace) -> None:
    """Peaks on a checkpoint with one large tensor; exits with 1 where one is over the bound."""
    sys.path.insert(0, str(ROOT))
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.model) as place:
        model = Path(place) / "large"
        make_large(model)
        for case in CASES:
            row = measure(sys.executable, "whole", case, model)
            shard = min(SHARD_BYTES, int(row["written_bytes"]))
            rows[case] = {**row, "bound_bytes": largest_fp32_bytes(model) + shard + HALF_GIB}
    out = arguments.out or MEMORY_RESULTS
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"config": LARGE, "shard_bytes": SHARD_BYTES, "cases": rows}, indent=2) + "\n")
    for case, row in rows.items():
        peak, imported, bound = (row[key] / 2**20 for key in ("peak_bytes", "imported_bytes", "bound_bytes"))
        print(f"{case:11s} peak {peak:.0f} MiB, {imported:.0f} of them after imports, bound {bound:.0f} MiB")
    sys.exit(any(row["peak_bytes"] > row["bound_bytes"] for row in rows.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="a Python with bitsandbytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help="some of: " + ", ".join(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true", help="peak memory on a checkpoint with one large tensor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--written", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if arguments.memory:
        measure_memory(arguments)
    cases = {case: measure_case(arguments, case) for case in arguments.cases.split(",")}
    for found in cases.values():
        whole, alone, peer = found["whole run"], found["bytes alone"], found.get("their kernel", {})
        clocks = ("cpu_seconds", "wall_seconds")
        found["bound"] = {clock: max(2 * alone[clock], peer.get(clock, 0.0)) for clock in clocks}
        shard = min(SHARD_BYTES, whole["written_bytes"])
        whole["bound_bytes"] = largest_fp32_bytes(arguments.model) + shard + HALF_GIB
    out = arguments.out or RESULTS
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"model": arguments.model.name, "rounds": arguments.rounds, "python": platform.python_version()}
    out.write_text(json.dumps({**document, "cases": cases}, indent=2) + "\n")
    for case, found in cases.items():
        whole = found["whole run"]
        rows = ((name, row["wall_seconds"], row["cpu_seconds"]) for name, row in found.items())
        speeds = ", ".join(f"{name} {wall:.2f} ({processor:.2f})" for name, wall, processor in rows)
        speeds += f", start {whole['start_wall_seconds']:.2f} ({whole['start_cpu_seconds']:.2f})"
        memory = f"{whole['peak_bytes'] / 2**20:.0f} MiB, {whole['imported_bytes'] / 2**20:.0f} of them after imports"
        bound = f"{whole['bound_bytes'] / 2**20:.0f} MiB"
        print(f"{case:11s} seconds of wall (processor) time: {speeds}; peak {memory}, bound {bound}")


if __name__ == "__main__":
    main()
