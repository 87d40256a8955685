#!/usr/bin/env python3
"""Encoding speed of first-generation Qwen's tokenizer in all its forms, against bare tiktoken, on one text.

    python benchmarks/tokenizer.py --vocabulary FOLDER [--text FILE] [--megabytes 1] [--rounds 5]

FOLDER holds qwen.tiktoken.  The text (default: the evaluation texts of the package, repeated) is cut to that many
megabytes.  Every form encodes it whole; forms take turns, the median of the rounds counts.  Prints a table and writes
benchmarks/results/tokenizer.json (or --out).  One thread.
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

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken  # noqa: E402

from qwen_quant.data import bundled_path  # noqa: E402
from qwen_quant.qwen1_fast import fast_tokenizer  # noqa: E402
from qwen_quant.qwen1_tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, load_qwen1_tokenizer  # noqa: E402
from qwen_quant.tokenizer import load_tokenizer  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "tokenizer.json"
BASELINE = "tiktoken alone"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with qwen.tiktoken")
    parser.add_argument("--text", type=Path, help="UTF-8 text file")
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def read_text(path: Path | None, size: int) -> str:
    sources = [path] if path else [bundled_path("demo_eval.txt"), bundled_path("eval_zh.txt")]
    text = "\n\n".join(source.read_text(encoding="utf-8") for source in sources)
    data = text.encode() * (size // len(text.encode()) + 1)
    return data[:size].decode("utf-8", errors="ignore")


def forms(folder: Path) -> dict[str, Callable[[str], list[int]]]:
    ours = load_qwen1_tokenizer(folder)
    bare = tiktoken.Encoding(
        "bare", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ours.ranks), special_tokens=dict(SPECIAL_TOKENS)
    )
    surface, fast = load_tokenizer(folder), fast_tokenizer(ours)
    return {
        BASELINE: lambda text: bare.encode(text, allowed_special="all"),
        "Qwen1Tokenizer.encode": ours.encode,
        "Tokenizer.encode (transformers class)": surface.encode,
        "generated tokenizer.json": lambda text: fast.encode(text, add_special_tokens=False).ids,
    }


def measure(folder: Path, text: str, rounds: int) -> dict[str, Any]:
    candidates = forms(folder)
    expected = candidates[BASELINE](text)
    for name, encode in candidates.items():
        if encode(text) != expected:
            sys.exit(f"{name} gives other ids than {BASELINE}: is the text in NFC?")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, encode in candidates.items():
            started = time.perf_counter()
            encode(text)
            seconds[name].append(time.perf_counter() - started)
    megabytes = len(text.encode()) / 1e6
    rows = {name: {"seconds": statistics.median(values)} for name, values in seconds.items()}
    for row in rows.values():
        row["megabytes_per_second"] = megabytes / row["seconds"]
        row["times_tiktoken"] = row["seconds"] / rows[BASELINE]["seconds"]
    versions = {"python": platform.python_version(), "tiktoken": tiktoken.__version__}
    return {"megabytes": megabytes, "tokens": len(expected), "rounds": rounds, "versions": versions, "forms": rows}


def main() -> None:
    arguments = parse_arguments()
    text = read_text(arguments.text, int(arguments.megabytes * 1e6))
    result = measure(arguments.vocabulary, text, arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['megabytes']:.2f} MB, {result['tokens']} tokens, median of {result['rounds']} rounds")
    for name, row in result["forms"].items():
        print(
            f"{name:40s} {row['seconds']:8.3f} s {row['megabytes_per_second']:7.2f} MB/s {row['times_tiktoken']:6.2f}x"
        )


if __name__ == "__main__":
    main()
