#!/usr/bin/env python3
"""Int4 kernels on 7B-shaped linears, and decoding of a real model, against dense weights; all sides take turns.

    python benchmarks/int4.py [--int4 FOLDER --dense FOLDER] [--rounds 15] [--threads 2] [--tokens 64]
        [--llama VENV/bin/python [--gguf FILE]]

For each shape and number of rows: the kernels' products, the product by dequantized tiles, and dense FP32 and BF16.
Times are the least of the rounds: what other programs take is no property of a kernel (the medians are in the JSON).
Bytes are what one product must read; the roofline is those bytes over this machine's measured reading speed.
With --llama, a Python that has llama-cpp-python, llama.cpp decodes the same codes as Q4_0 in turn with the others, with
as many threads; FILE is written from --int4 where it does not exist (default: beside --out).
(Not called kernels.py: transformers looks for a package of that name and would find this file from any script here.)
Prints Markdown and writes benchmarks/results/int4_speed.json (or --out) and .md beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_side import LlamaSide, write_q4_0
from torch.nn import functional

from qwen_quant.environment import cpu_features, peak_rss_bytes
from qwen_quant.errors import UsageError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.runtime.decode import decode
from qwen_quant.runtime.kernels.choose import KERNEL_NAMES
from qwen_quant.runtime.linear import Int4Linear, LinearSettings
from qwen_quant.runtime.loading import load_model
from qwen_quant.runtime.quantized_model import bytes_per_token, load_quantized

RESULTS = Path(__file__).resolve().parent / "results" / "int4_speed.json"
SHAPES = {
    "q/k/v/o 4096 x 4096": (4096, 4096),
    "gate/up 11008 x 4096": (11008, 4096),
    "down 4096 x 11008": (4096, 11008),
}
GROUP_SIZE = 128
ROWS = (1, 4, 8, 16, 24, 32, 64, 256)
FIRST_TOKEN = 1
OURS, LLAMA = "Int4 (FP32 activations)", "llama.cpp Q4_0"
FAST = tuple(name for name in KERNEL_NAMES if name != "reference")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--int4", type=Path, help="GPTQ folder")
    parser.add_argument("--dense", type=Path, help="the 16-bit folder it was made from")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--llama", type=Path, help="a Python that has llama-cpp-python, for the other side")
    parser.add_argument("--gguf", type=Path, help="Q4_0 file of --int4; written where absent")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(sides: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Least and median seconds of each side; one warm-up, then one call of each in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            wait(device)
            started = time.perf_counter()
            call()
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: {"seconds": min(values), "median": statistics.median(values)} for name, values in seconds.items()}


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second of reading 512 MiB once: the best of several sums and products with a vector."""
    values = torch.ones(1 << 14, 1 << 13, dtype=torch.float32, device=device)
    vector = torch.ones(1 << 13, dtype=torch.float32, device=device)
    reads = {"sum": lambda: values.sum(1), "product": lambda: values @ vector}
    return values.nbytes / min(row["seconds"] for row in take_turns(reads, max(rounds, 10), device).values())


def random_weight(out: int, width: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    groups = width // GROUP_SIZE
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    scales = torch.randn(out, groups, generator=generator).mul(0.01).half()
    g_idx = (torch.arange(width) // GROUP_SIZE).int()
    return QuantizedWeight(codes, scales, torch.full((out, groups), 8, dtype=torch.uint8), g_idx)


def linears(weight: QuantizedWeight, device: torch.device) -> dict[str, Int4Linear]:
    """The fast kernels that take the weight here."""
    found = {}
    for name in FAST:
        try:
            found[name] = Int4Linear(weight, None, LinearSettings(4, device, torch.float32, name))
        except UsageError as error:
            print(f"{name}: {error.why}", file=sys.stderr)
    return found


def measure_shape(shape: tuple[int, int], rounds: int, device: torch.device) -> dict[str, Any]:
    weight = random_weight(*shape)
    packed = linears(weight, device)
    exact = weight.dequantized().to(device)
    stored = {torch.float32: exact, torch.bfloat16: exact.bfloat16()}
    result: dict[str, Any] = {"bytes": {name: module.nbytes for name, module in packed.items()}, "rows": {}}
    result["bytes"] |= {f"dense {str(dtype)[6:]}": value.nbytes for dtype, value in stored.items()}
    for rows in ROWS:
        inputs = torch.randn(rows, shape[1], device=device)
        sides: dict[str, Callable[[], Any]] = {}
        for name, module in packed.items():
            sides[name] = lambda m=module, x=inputs: m.kernel.product(x)
            sides[f"{name}, tiles"] = lambda m=module, x=inputs: m.kernel.by_tiles(x)
        for dtype, value in stored.items():
            given = inputs.to(dtype)
            sides[f"dense {str(dtype)[6:]}"] = lambda x=given, w=value: functional.linear(x, w)
        result["rows"][rows] = take_turns(sides, max(3, rounds // (1 + rows // 16)), device)
    return result


def measure_model(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tokens per second of each model, one after the other in every round."""
    quantized = load_quantized(arguments.int4, device, torch.float32)
    models = {OURS: quantized}
    for dtype in (torch.float32, torch.bfloat16):
        models[f"dense {str(dtype)[6:]}"] = load_model(arguments.dense, device, dtype)
    ids = torch.tensor([[FIRST_TOKEN]], device=device)
    rival = llama_side(arguments)
    each: dict[str, list[float]] = {name: [] for name in (*models, *([LLAMA] if rival else []))}
    said: dict[str, list[int]] = {}
    for _ in range(max(2, arguments.rounds // 5)):
        for name, model in models.items():
            made = decode(model, ids, arguments.tokens)
            each[name] += made.token_seconds
            said[name] = made.tokens[0].tolist()
        if rival:
            answer = rival.decode(FIRST_TOKEN, arguments.tokens)
            each[LLAMA] += answer["seconds"]
            said[LLAMA] = answer["tokens"]
    sizes = {name: bytes_per_token(model) for name, model in models.items()} | {LLAMA: bytes_per_token(quantized)}
    rows = {
        name: {"seconds": min(values), "median": statistics.median(values), "bytes": sizes[name]}
        for name, values in each.items()
    }
    result = {"tokens": arguments.tokens, "kernels": quantized.kernel_report.counts(), "models": rows, "said": said}
    if rival:
        result["llama"] = rival.facts
        rival.close()
    return result


def llama_side(arguments: argparse.Namespace) -> LlamaSide | None:
    """llama.cpp with the same codes, where it was asked for."""
    if arguments.llama is None:
        return None
    gguf = arguments.gguf or arguments.out.with_suffix(".gguf")
    if not gguf.is_file():
        gguf.parent.mkdir(parents=True, exist_ok=True)
        write_q4_0(arguments.int4, gguf)
    return LlamaSide(arguments.llama, gguf, arguments.threads, arguments.tokens + 8)


def layer_table(name: str, result: dict[str, Any], speed: float) -> str:
    sides = list(result["rows"][ROWS[0]])
    lines = [f"### {name}, milliseconds", "| rows | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for rows, row in result["rows"].items():
        lines.append(f"| {rows} | " + " | ".join(f"{row[side]['seconds'] * 1e3:.2f}" for side in sides) + " |")
    one = result["rows"][ROWS[0]]
    for side, nbytes in result["bytes"].items():
        rate = nbytes / one[side]["seconds"]
        gain = one["dense bfloat16"]["seconds"] / one[side]["seconds"]
        lines.append(
            f"- one row, {side}: {nbytes / 1e6:.1f} MB at {rate / 1e9:.1f} GB/s, {rate / speed:.0%} of the roofline, "
            f"{gain:.2f} x dense BF16"
        )
    return "\n".join(lines)


def model_table(result: dict[str, Any], speed: float) -> str:
    lines = [
        "### Decoding",
        "| model | tokens/s (best) | tokens/s (median) | MB per token | roofline |",
        "|---" * 5 + "|",
    ]
    for name, row in result["models"].items():
        share = row["bytes"] / row["seconds"] / speed
        lines.append(
            f"| {name} | {1 / row['seconds']:.1f} | {1 / row['median']:.1f} | {row['bytes'] / 1e6:.0f} | {share:.0%} |"
        )
    if LLAMA in result["models"]:
        ours, theirs = result["models"][OURS], result["models"][LLAMA]
        pairs = zip(result["said"][OURS], result["said"][LLAMA], strict=True)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), result["tokens"])
        lines.append(
            f"\nInt4 / llama.cpp: {theirs['seconds'] / ours['seconds']:.2f} x by the best token, "
            f"{theirs['median'] / ours['median']:.2f} x by the median; the first {alike} of {result['tokens']} tokens "
            f"are the same (llama.cpp rounds activations to 8 bits); {result['llama']['version']}"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    speed = bandwidth(device, arguments.rounds)
    machine = {"platform": platform.platform(), "cpu_features": cpu_features(), "load_average": os.getloadavg()}
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "threads": arguments.threads}
    result |= {"bandwidth_bytes_per_second": speed, "rounds": arguments.rounds, "group_size": GROUP_SIZE, "layers": {}}
    parts = [
        f"{arguments.threads} threads, read {speed / 1e9:.1f} GB/s, least of {arguments.rounds} rounds, "
        f"load average {machine['load_average'][0]:.1f}"
    ]
    with torch.inference_mode():
        for name, shape in list(SHAPES.items())[: arguments.shapes]:
            result["layers"][name] = measure_shape(shape, arguments.rounds, device)
            parts.append(layer_table(name, result["layers"][name], speed))
    if arguments.int4 and arguments.dense:
        result["model"] = measure_model(arguments, device)
        parts.append(model_table(result["model"], speed))
    result["peak_memory_bytes"] = peak_rss_bytes()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
