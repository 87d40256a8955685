#!/usr/bin/env python3
"""Load an Int4 artifact with other people's code on CPU and compare its logits to expected ones.

Runs inside the peer environment (``scripts/make_peer_venv.sh``) and imports nothing from ``qwen_quant``: the question
is whether strangers read the artifact as we do. EXPECTED is a safetensors file with

    input_ids  int64    [B, T]      tokens, no padding
    logits     float32  [B, T, V]   what our own code makes of them (plain dequantization)

GPTQModel's torch kernel rounds scale * (code - zero) to float16 before it multiplies. Round the dequantized weights
behind EXPECTED likewise (``.half().float()``) and float32 activations give logits equal to the last bit; without it
that rounding alone moved a logit of a 30-block model by 0.06, and float16 activations moved one by 0.22.

stdout carries one JSON object. Exit status: 0 within the tolerance, 1 above it, 2 when the artifact cannot be loaded.

    VENV/bin/python scripts/interop_gptqmodel.py ARTIFACT EXPECTED.safetensors [--backend gptqmodel] [--atol 0.05]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time
import traceback
from typing import TYPE_CHECKING

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # a compiler's start-up time tells nothing about the artifact

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare an artifact's logits, read by other tools, to expected ones.")
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("expected", type=pathlib.Path)
    parser.add_argument("--backend", choices=["transformers", "gptqmodel"], default="transformers")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations; float32 is the sharpest")
    parser.add_argument(
        "--kernel", default="gptq_torch", help="GPTQModel's kernel; auto takes faster ones that round more"
    )
    parser.add_argument("--atol", type=float, default=0.05, help="largest absolute logit difference allowed")
    return parser.parse_args()


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """Return the artifact as a module that maps input_ids to an output with .logits."""
    import torch

    dtype = getattr(torch, args.dtype)
    if args.backend == "gptqmodel":
        return load_with_gptqmodel(args, dtype)
    from transformers import AutoModelForCausalLM, GPTQConfig

    bits = json.loads((args.artifact / "config.json").read_text(encoding="utf-8"))["quantization_config"]["bits"]
    config = GPTQConfig(bits=bits, backend=args.kernel)  # the artifact's own settings win; only the kernel is taken
    return AutoModelForCausalLM.from_pretrained(
        args.artifact, device_map="cpu", dtype=dtype, quantization_config=config
    )


def load_with_gptqmodel(args: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    """Load by GPTQModel; it refuses float32, so that is float16 with the parameters widened afterwards.

    qweight, qzeros and scales are buffers and stay as they are.
    """
    import torch
    from gptqmodel import GPTQModel

    load_dtype = torch.float16 if dtype == torch.float32 else dtype
    model = GPTQModel.load(str(args.artifact), device="cpu", backend=args.kernel, dtype=load_dtype).model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def quantized_layers(model: torch.nn.Module) -> dict[str, int]:
    """Count the modules that hold packed weights, by class: proof that the Int4 path ran and not a dense one."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if hasattr(module, "qweight") and hasattr(module, "qzeros"):
            name = type(module).__name__
            counts[name] = counts.get(name, 0) + 1
    return counts


def compare(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float | bool]:
    """Return max and mean absolute difference and the share of positions with the same best token."""
    difference = (actual - expected).abs()
    agreement = (actual.argmax(-1) == expected.argmax(-1)).double().mean()
    return {
        "finite": bool(actual.isfinite().all()),
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.double().mean()),
        "top1_agreement": float(agreement),
    }


def run(args: argparse.Namespace) -> dict[str, object]:
    """Load, compute and compare."""
    import torch
    from safetensors.torch import load_file

    expected = load_file(args.expected)
    start = time.perf_counter()
    model = load_model(args).eval()
    load_seconds = time.perf_counter() - start
    layers = quantized_layers(model)
    if not layers:
        raise RuntimeError(f"{args.artifact} loaded without one quantized layer")
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"], use_cache=False).logits.float()
    result: dict[str, object] = {
        "backend": args.backend,
        "dtype": args.dtype,
        "kernel": args.kernel,
        "quantized_layers": layers,
    }
    result |= compare(logits, expected["logits"].float())
    result |= {"load_seconds": round(load_seconds, 2), "forward_seconds": round(time.perf_counter() - start, 2)}
    return result | {"versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of the readers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("gptqmodel", "optimum", "transformers", "torch")}


def main() -> None:
    """Run once, print the result and exit by the tolerance."""
    args = parse_arguments()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = run(args)
    except Exception as error:  # a foreign loader fails in any way it likes; the reason belongs in the result
        traceback.print_exc()
        print(json.dumps({"backend": args.backend, "error": f"{type(error).__name__}: {error}"}, indent=2))
        raise SystemExit(2) from error
    passed = bool(result["finite"]) and float(str(result["max_abs_difference"])) <= args.atol
    print(json.dumps(result | {"atol": args.atol, "passed": passed}, indent=2))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
