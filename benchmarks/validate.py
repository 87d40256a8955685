#!/usr/bin/env python3
"""What `qwen-quant validate` costs beside two plain BF16 forward passes, and whether its figures are right.

    python benchmarks/validate.py --model MODEL --quantized OUT --text TEST.raw

Three fresh processes over the same windows: (1) transformers' own model in BF16, forward passes only, baseline and
dequantized artifact one after the other; (2) `qwen-quant validate`; (3) transformers' own model in FP32, perplexity and
KL divergence in FP64, over fewer windows, as an independent check.  Writes benchmarks/results/validate.json and .md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import cpu_name  # noqa: E402

HERE = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="of 1024 tokens")
    parser.add_argument("--check-windows", type=int, default=4, help="of the independent computation")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "validate", help="path without suffix")
    parser.add_argument("--stage", choices=("all", "plain", "check"), default="all", help=argparse.SUPPRESS)
    return parser.parse_args()


def _windows(model: Path, text: Path, count: int) -> Any:
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * 1024]).view(count, 1024)


def _models(arguments: argparse.Namespace, dtype: Any) -> list[Any]:
    """The baseline through transformers alone; the artifact's weights dequantized by our loader into its class."""
    from transformers import AutoModelForCausalLM

    from qwen_quant.runtime.loading import load_model

    return [
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval(),
        load_model(arguments.quantized, dtype=dtype),
    ]


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of two BF16 forward passes over every window, one window at a time, loading not counted."""
    import torch

    windows, seconds = _windows(arguments.model, arguments.text, arguments.windows), []
    with torch.no_grad():
        for model in _models(arguments, torch.bfloat16):
            model(windows[:1])
            started = time.perf_counter()
            for row in windows:
                model(row[None], use_cache=False)
            seconds.append(time.perf_counter() - started)
    return {"seconds": sum(seconds), "each": seconds}


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexities and mean KL from whole FP32 models, everything after the logits in FP64."""
    import torch

    windows = _windows(arguments.model, arguments.text, arguments.check_windows)
    first, second = _models(arguments, torch.float32)
    losses: list[list[float]] = [[], []]
    kl = []
    with torch.no_grad():
        for row in windows:
            logs = [torch.log_softmax(m(row[None], use_cache=False).logits[0].double(), -1) for m in (first, second)]
            for values, log in zip(losses, logs, strict=True):
                values.append(float(-log[:-1].gather(1, row[1:, None]).mean()))
            kl.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()))
    means = [sum(values) / len(values) for values in losses]
    return {
        "baseline": float(torch.tensor(means[0]).double().exp()),
        "quantized": float(torch.tensor(means[1]).double().exp()),
        "kl_mean": sum(kl) / len(kl),
    }


def stage(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One stage of this file in a fresh process."""
    command = [sys.executable, __file__, "--stage", name, "--model", str(arguments.model)]
    command += ["--quantized", str(arguments.quantized), "--text", str(arguments.text)]
    command += ["--windows", str(arguments.windows), "--check-windows", str(arguments.check_windows)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def validate(arguments: argparse.Namespace, windows: int) -> dict[str, Any]:
    """`qwen-quant validate` without smoke prompts, as one JSON document, with its process's wall seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qwen_quant", "validate", str(arguments.quantized), "--baseline"]
        command += [str(arguments.model), "--text", str(arguments.text), "--max-windows", str(windows), "--no-smoke"]
        started = time.perf_counter()
        done = subprocess.run([*command, "--json", "--quiet", "--report", folder], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    result["process_seconds"] = time.perf_counter() - started
    return result


def main() -> None:
    """Run the stages, write and print the result."""
    arguments = parse_arguments()
    if arguments.stage != "all":
        print(json.dumps(plain(arguments) if arguments.stage == "plain" else check(arguments)))
        return
    forward = stage(arguments, "plain")
    ours = validate(arguments, arguments.windows)
    truth, small = stage(arguments, "check"), validate(arguments, arguments.check_windows)["texts"][0]
    ratio = ours["seconds"] / forward["seconds"]
    differences = {
        "baseline perplexity, relative": abs(small["perplexity"]["baseline"] / truth["baseline"] - 1),
        "quantized perplexity, relative": abs(small["perplexity"]["quantized"] / truth["quantized"] - 1),
        "KL divergence, absolute": abs(small["divergence"]["kl_mean"] - truth["kl_mean"]),
    }
    result = {
        "command": " ".join(sys.argv),
        "machine": cpu_name(),
        "tokens": arguments.windows * 1024,
        "two_bf16_forward_seconds": forward["seconds"],
        "validate_seconds": ours["seconds"],
        "validate_process_seconds": ours["process_seconds"],
        "ratio": ratio,
        "peak_memory_bytes": ours["peak_memory_bytes"],
        "independent": truth,
        "differences": differences,
    }
    lines = [
        f"{result['tokens']} tokens; {result['machine']}.",
        "",
        "| | seconds |",
        "|---|---|",
        f"| two plain BF16 forward passes (transformers) | {forward['seconds']:.0f} |",
        f"| qwen-quant validate | {ours['seconds']:.0f} |",
        "",
        f"Ratio {ratio:.2f}; peak {ours['peak_memory_bytes'] / 1e9:.2f} GB.",
        "",
        "| against FP32 transformers, FP64 sums | difference |",
        "|---|---|",
        *(f"| {name} | {value:.2e} |" for name, value in differences.items()),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"peak of this process's children: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
