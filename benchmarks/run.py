#!/usr/bin/env python3
"""Int4 quality and time side by side with GPTQModel, on one checkpoint, one calibration text, one evaluation text.

Each variant quantizes in a fresh process and is then compared with the unquantized checkpoint by `qwen-quant validate`
on the same windows.  The two timed sides (ours and GPTQModel, each with its defaults) alternate `--rounds` times; the
table shows the median.  The further rows show what each step of the solver gains.

    python benchmarks/run.py --model MODEL --calibration VALID.raw --text TEST.raw --peer-python VENV/bin/python

Writes benchmarks/results/int4.json and int4.md (or --out), and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = "qwen-quant (defaults)"
PEER = "GPTQModel (defaults)"
STEPS = {
    "plain rounding, min-max scales": ["--rounding-only"],
    "GPTQ, column order, min-max scales": ["--order", "column", "--scales", "minmax", "--no-asymmetric-calibration"],
    "+ activation order, static groups": ["--scales", "minmax", "--no-asymmetric-calibration"],
    "+ weighted scale search": ["--no-asymmetric-calibration"],
}


@dataclass(frozen=True)
class Setting:
    """What every variant shares."""

    model: Path
    calibration: Path
    text: Path
    samples: int
    seq_len: int
    group_size: int
    windows: int
    work: Path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="text whose first tokens calibrate")
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--peer-python", type=Path, help="python of scripts/make_peer_venv.sh; none: our rows only")
    parser.add_argument("--peer-dtype", default="auto", help="arithmetic of the peer (auto: its default)")
    parser.add_argument("--rounds", type=int, default=1, help="how often the timed sides alternate")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 1024 tokens")
    parser.add_argument("--skip-steps", action="store_true", help="only the two timed sides")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int4", help="path without suffix")
    return parser.parse_args()


def run_json(command: list[str]) -> dict[str, Any]:
    """stdout of a command as one JSON document, with its process's `cpu_seconds`; its stderr goes through."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    result["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result


def cost(result: dict[str, Any], peak: str) -> dict[str, Any]:
    """Wall seconds of the quantization, CPU seconds of the whole process (steadier on a busy box), peak memory."""
    return {"seconds": result["seconds"], "cpu_seconds": result["cpu_seconds"], "peak_memory_bytes": result[peak]}


def ours(setting: Setting, out: Path, options: list[str]) -> dict[str, Any]:
    """Quantize with this project in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "qwen_quant", "gptq", str(setting.model), str(out), "--json", "--quiet"]
    command += ["--group-size", str(setting.group_size), "--calibration", str(setting.calibration)]
    command += ["--num-samples", str(setting.samples), "--seq-len", str(setting.seq_len), *options]
    return cost(run_json(command), "peak_memory_bytes")


def peer(setting: Setting, out: Path, python: Path, dtype: str) -> dict[str, Any]:
    """Quantize the same token rows with GPTQModel in its own environment."""
    shutil.rmtree(out, ignore_errors=True)
    rows = setting.work / "rows.json"
    if not rows.exists():
        from transformers import AutoTokenizer

        text = setting.calibration.read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(setting.model)(text, add_special_tokens=False)["input_ids"]
        length = setting.seq_len
        rows.write_text(json.dumps([ids[k * length : (k + 1) * length] for k in range(setting.samples)]))
    command = [str(python), str(HERE / "peers" / "gptqmodel_run.py"), str(setting.model), str(out), str(rows)]
    command += ["--group-size", str(setting.group_size), "--dtype", dtype]
    return cost(run_json(command), "peak_rss_bytes")


def quality(setting: Setting, out: Path) -> dict[str, Any]:
    """Perplexity, divergence and size of an artifact against the checkpoint."""
    command = [sys.executable, "-m", "qwen_quant", "validate", str(out), "--baseline", str(setting.model), "--json"]
    command += ["--text", str(setting.text), "--window", "1024", "--max-windows", str(setting.windows), "--quiet"]
    result: dict[str, Any] = run_json([*command, "--no-smoke"])["texts"][0]
    return result


def timed_sides(setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate ours and the peer, then measure the quality of each side's last artifact."""
    times: dict[str, list[dict[str, Any]]] = {OURS: []}
    if arguments.peer_python:
        times[PEER] = []
    for _ in range(arguments.rounds):
        for name in times:
            print(f"{time.strftime('%H:%M:%S')} {name}, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
            folder = setting.work / ("ours" if name == OURS else "peer")
            if name == OURS:
                times[name].append(ours(setting, folder, []))
            else:
                times[name].append(peer(setting, folder, arguments.peer_python, arguments.peer_dtype))
    rows = []
    for name, runs in times.items():
        folder = setting.work / ("ours" if name == OURS else "peer")
        rows.append(row(name, runs, quality(setting, folder)))
    return rows


def row(name: str, runs: list[dict[str, Any]], measured: dict[str, Any]) -> dict[str, Any]:
    """One line of the result."""
    return {
        "name": name,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "runs": runs,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "perplexity": measured["perplexity"]["quantized"],
        "baseline_perplexity": measured["perplexity"]["baseline"],
        "kl_mean": measured["divergence"]["kl_mean"],
        "top1_agreement": measured["divergence"]["top1_agreement"],
        "tokens": measured["divergence"]["tokens"],
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = result["rows"]
    first = rows[0]
    lines = [
        f"{result['protocol']}; {result['machine']}. Unquantized perplexity {first['baseline_perplexity']:.2f}.",
        "",
        "| | KL divergence | perplexity | top-1 | seconds | CPU seconds | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = r["peak_memory_bytes"] / 1e9
        cells = f"{r['kl_mean']:.4f} | {r['perplexity']:.2f} | {r['top1_agreement']:.1%}"
        costs = f"{r['seconds']:.0f} | {r['cpu_seconds']:.0f} | {memory:.2f}"
        lines.append(f"| {r['name']} | {cells} | {costs} |")
    named = {r["name"]: r for r in rows}
    if PEER in named:
        kl = named[OURS]["kl_mean"] / named[PEER]["kl_mean"]
        speed = named[PEER]["seconds"] / named[OURS]["seconds"]
        cpu = named[PEER]["cpu_seconds"] / named[OURS]["cpu_seconds"]
        lines += [
            "",
            f"Ours against GPTQModel: {kl:.2f} x its KL divergence, {speed:.1f} x as fast (CPU time: {cpu:.1f} x).",
        ]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Model name and the features that matter here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next(
        (line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line), platform.machine()
    )
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text]
    return f"{name} ({', '.join(features)}), {os.cpu_count()} cores"


def main() -> None:
    """Run every variant, write JSON and Markdown, print the table."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="qwen-quant-bench-") as work:
        setting = Setting(
            arguments.model,
            arguments.calibration,
            arguments.text,
            arguments.samples,
            arguments.seq_len,
            arguments.group_size,
            arguments.windows,
            Path(work),
        )
        rows = timed_sides(setting, arguments)
        for name, options in {} if arguments.skip_steps else STEPS.items():
            rows.append(
                row(name, [ours(setting, setting.work / "step", options)], quality(setting, setting.work / "step"))
            )
    result = {
        "command": " ".join(sys.argv),
        "machine": cpu_name(),
        "peer_dtype": arguments.peer_dtype,
        "protocol": f"{arguments.samples} x {arguments.seq_len} calibration tokens of {arguments.calibration.name}, "
        f"group_size {arguments.group_size}, sym, {arguments.windows} windows of 1024 of {arguments.text.name}",
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
