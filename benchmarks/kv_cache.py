"""Int8 key/value caches against the plain one on a real model: divergence, decoding time, bytes.

    python benchmarks/kv_cache.py MODEL [--tokens 512] [--windows 2] [--cached 8192] [--steps 12] [--dtype bf16]
                                  [--int4 FOLDER]

Divergence: KL(plain || cache) per token in FP32 over windows of the bundled English text, decoded the way `generate`
does: half of a window as a prompt, then token by token, so that the "qwen" scheme sees the chunks it was made for.
Time: one decoding step with `--cached` tokens in the cache (random keys and values of normal size), the kinds
alternating step by step in one process; with --int4 also that of an Int4 folder by the native step. Prints a table and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel

from qwen_quant.data import bundled_path
from qwen_quant.kv_cache import STORED, make_cache
from qwen_quant.process import tune_process
from qwen_quant.profiling.cache_size import cache_size
from qwen_quant.runtime.decode import decoding_cache, filled_storage
from qwen_quant.runtime.loading import load_model
from qwen_quant.runtime.native_step import NativeStep
from qwen_quant.runtime.quantized_model import load_quantized

KINDS = ("bf16", "int8", "qwen")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """[tokens, vocabulary] of one row of ids, its second half fed one by one."""
    cache, half = make_cache(model.config, kind), ids.shape[1] // 2
    parts = [
        model(part, past_key_values=cache, use_cache=True).logits[0].float()
        for part in ids.split([half] + [1] * (ids.shape[1] - half), dim=1)
    ]
    return torch.log_softmax(torch.cat(parts), -1)


def divergence(folder: Path, tokens: int, windows: int) -> dict[str, dict[str, float]]:
    model = load_model(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = bundled_path("demo_eval.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text)[: tokens * windows]).view(windows, tokens)
    divergences: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS[1:]}
    agreements: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS[1:]}
    losses: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for row in ids.split(1):
        plain = log_probabilities(model, row, "bf16")
        losses["bf16"].append(functional.nll_loss(plain[:-1], row[0, 1:], reduction="none"))
        for kind in KINDS[1:]:
            other = log_probabilities(model, row, kind)
            divergences[kind].append((plain.exp() * (plain - other)).sum(-1))
            agreements[kind].append((plain.argmax(-1) == other.argmax(-1)).float())
            losses[kind].append(functional.nll_loss(other[:-1], row[0, 1:], reduction="none"))
    base = torch.cat(losses["bf16"]).mean()
    return {
        kind: {
            "kl_mean": float(torch.cat(divergences[kind]).mean()),
            "kl_p99": float(torch.cat(divergences[kind]).quantile(0.99)),
            "top1_agreement": float(torch.cat(agreements[kind]).mean()),
            "perplexity_ratio": float((torch.cat(losses[kind]).mean() - base).exp()),
            "tokens": ids.numel(),
        }
        for kind in KINDS[1:]
    }


@torch.inference_mode()
def decoding(folder: Path, cached: int, steps: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    model = load_model(folder, dtype=dtype)
    config = model.config
    heads, width = getattr(config, "num_key_value_heads", config.num_attention_heads), config.hidden_size
    width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    caches = {kind: make_cache(config, kind) for kind in KINDS}
    for layer in range(config.num_hidden_layers):
        states = torch.randn(1, heads, cached - steps - 2, width, dtype=dtype)
        for cache in caches.values():
            cache.update(states, states, layer)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    token = torch.zeros(1, 1, dtype=torch.long)
    for step in range(steps + 2):
        for kind, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            if step >= 2:
                seconds[kind].append(time.perf_counter() - start)
    return rows(seconds, {kind: cache_size(cache).nbytes for kind, cache in caches.items()})


@torch.inference_mode()
def native_decoding(folder: Path, cached: int, steps: int) -> dict[str, dict[str, float]]:
    """The native step of an Int4 folder; the BF16 cache in BF16, although activations are FP32."""
    model = load_quantized(folder, dtype=torch.float32)
    attention = model.get_decoder().layers[0].self_attn
    native, nbytes = {}, {}
    for kind, name in (("bf16", STORED), ("int8", "int8")):
        cache = decoding_cache(model, cached, name)
        for layer in range(model.config.num_hidden_layers):
            shape = (1, model.config.num_key_value_heads, cached - steps - 2, attention.head_dim)
            states = torch.randn(shape, generator=torch.Generator().manual_seed(layer))
            cache.update(states, states, layer)
        native[kind], nbytes[kind] = NativeStep(model, filled_storage(cache)), cache_size(cache).nbytes
    seconds: dict[str, list[float]] = {kind: [] for kind in native}
    for step in range(steps + 2):
        for kind, run in native.items():
            start = time.perf_counter()
            run(0, cached - steps - 2 + step)
            if step >= 2:
                seconds[kind].append(time.perf_counter() - start)
    return rows(seconds, nbytes)


def rows(seconds: dict[str, list[float]], nbytes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Median step and bytes of each kind of cache, and their ratios to those of "bf16"."""
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        kind: {
            "step_seconds": medians[kind],
            "slowdown": medians[kind] / medians["bf16"],
            "bytes": nbytes[kind],
            "bytes_ratio": nbytes[kind] / nbytes["bf16"],
        }
        for kind in seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--cached", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--int4", type=Path, help="an Int4 folder that the native step runs")
    given = parser.parse_args()
    tune_process()
    quality = divergence(given.model, given.tokens, given.windows)
    speed = decoding(given.model, given.cached, given.steps, DTYPES[given.dtype])
    for kind, row in quality.items():
        print(
            f"{kind}: KL {row['kl_mean']:.2e} (p99 {row['kl_p99']:.2e}), top-1 {row['top1_agreement']:.2%}, "
            f"perplexity ratio {row['perplexity_ratio']:.5f}, {row['tokens']} tokens"
        )
    native = native_decoding(given.int4, given.cached, given.steps) if given.int4 else {}
    for where, found in ((f"transformers, {given.dtype}", speed), ("native step, Int4", native)):
        for kind, row in found.items():
            print(
                f"{where}, {kind}: {1e3 * row['step_seconds']:.1f} ms a step at {given.cached} tokens "
                f"({row['slowdown']:.3f} x), {row['bytes'] / 2**20:.1f} MiB ({row['bytes_ratio']:.4f} x)"
            )
    print(json.dumps({"model": given.model.name, "quality": quality, "speed": speed, "native": native}))


if __name__ == "__main__":
    main()
