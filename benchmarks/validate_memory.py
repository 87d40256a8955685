#!/usr/bin/env python3
"""Peak memory of `qwen-quant validate` on a 14B-shaped pair, run for real on a few blocks.

Blocks stream one at a time, so the peak does not depend on how many there are; the embedding and the head have their
full size. The artifact is made by plain rounding.

    python benchmarks/validate_memory.py --work /tmp/vm --tokenizer FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import SHAPES, write_checkpoint  # noqa: E402
from run import cpu_name  # noqa: E402

HERE = Path(__file__).resolve().parent
LIMIT_BYTES = 8_000_000_000


def command(*arguments: str) -> dict[str, Any]:
    """One qwen-quant command in a fresh process, its JSON document."""
    call = [sys.executable, "-m", "qwen_quant", *arguments, "--json", "--quiet"]
    result: dict[str, Any] = json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout)
    return result


def main() -> None:
    """Make the pair, validate it, write benchmarks/results/validate_memory.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()
    model, artifact = arguments.work / "14B", arguments.work / "14B-Int4"
    if not model.exists():
        write_checkpoint(model, SHAPES["14B"], arguments.blocks, random=True, tokenizer=arguments.tokenizer)
    if not artifact.exists():
        options = ["--rounding-only", "--num-samples", "1", "--seq-len", "64"]
        command("gptq", str(model), str(artifact), *options)
    options = ["--text", "bundled:en", "--max-windows", str(arguments.windows), "--no-smoke", "--force"]
    done = command("validate", str(artifact), "--baseline", str(model), *options)
    peak = int(done["peak_memory_bytes"])
    result = {
        "machine": cpu_name(),
        "shape": SHAPES["14B"],
        "blocks": arguments.blocks,
        "tokens": done["texts"][0]["tokens"],
        "peak_memory_bytes": peak,
        "limit_bytes": LIMIT_BYTES,
        "seconds": done["seconds"],
    }
    text = (
        f"14B-shaped pair (hidden 5120, MLP 13824, vocabulary 152064, {arguments.blocks} blocks), "
        f"{result['tokens']} tokens: peak {peak / 1e9:.2f} GB, limit {LIMIT_BYTES / 1e9:.0f} GB. {result['machine']}.\n"
    )
    out = HERE / "results" / "validate_memory"
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
