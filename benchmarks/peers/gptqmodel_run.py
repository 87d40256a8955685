#!/usr/bin/env python3
"""Quantize one checkpoint with GPTQModel's defaults and report its time and memory.

Runs inside the peer environment (``scripts/make_peer_venv.sh``), never inside the project's own: it imports nothing
from ``qwen_quant``. Calibration samples come as a JSON list of token-id lists, so both sides see the same tokens.
stdout carries one JSON object; everything GPTQModel prints goes to stderr.

    VENV/bin/python benchmarks/peers/gptqmodel_run.py MODEL OUT SAMPLES.json > result.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Quantize MODEL to OUT with GPTQModel's defaults.")
    parser.add_argument("model", type=pathlib.Path, help="unquantized checkpoint folder")
    parser.add_argument("out", type=pathlib.Path, help="folder to write; must not exist")
    parser.add_argument("samples", type=pathlib.Path, help="JSON list of token-id lists")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1, help="GPTQModel's default is 1")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="arithmetic of the forward passes; auto is GPTQModel's default (the checkpoint's own)",
    )
    parser.add_argument("--asym", action="store_true", help="asymmetric zeros (default symmetric)")
    return parser.parse_args()


def read_samples(path: pathlib.Path) -> list[dict[str, list[int]]]:
    """Return calibration rows in the form GPTQModel takes: input_ids with an all-ones attention_mask."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not rows or not all(isinstance(row, list) and row for row in rows):
        raise SystemExit(f"{path}: expected a non-empty JSON list of non-empty token-id lists")
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def peak_rss_bytes() -> int:
    """Return this process's largest resident set; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_seconds() -> float:
    """Return user plus system time of this process and its finished children; steadier than wall time on a busy box."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def versions() -> dict[str, str]:
    """Return the versions that decide the result."""
    import gptqmodel
    import torch
    import transformers

    return {
        "gptqmodel": gptqmodel.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def quantize(args: argparse.Namespace, samples: list[dict[str, list[int]]]) -> float:
    """Load, quantize and save; return the seconds of the quantize call alone."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=not args.asym)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = GPTQModel.load(str(args.model), config, dtype=dtype)
    start = time.perf_counter()
    model.quantize(samples, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    model.save(str(args.out))
    return seconds


def main() -> None:
    """Run once and print the measurement as JSON."""
    args = parse_arguments()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; remove it or name another folder")
    samples = read_samples(args.samples)
    load_before = os.getloadavg()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        seconds = quantize(args, samples)
    result = {
        "seconds": round(seconds, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(cpu_seconds(), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "dtype": args.dtype,
        "samples": len(samples),
        "tokens": sum(len(row["input_ids"]) for row in samples),
        "cpu_count": os.cpu_count(),
        "loadavg_before": load_before,
        "loadavg_after": os.getloadavg(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
