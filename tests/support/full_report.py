"""A ValidationResult with every section filled in, hostile texts included, and layer statistics to go with it."""

from __future__ import annotations

import dataclasses
import math

from qwen_quant.results import (
    Divergence,
    GateOutcome,
    Interval,
    LayerStats,
    LengthRow,
    PerplexityPair,
    SmokeCase,
    TaskResult,
    TextResult,
    ValidationResult,
    Verdict,
)

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>&\"\x00\x1b[31m \u202eabc"
NO_LOSS = Verdict("no loss detected", "No loss detected (smallest loss this could have seen: 1.3 points).", 0.013)
LOSS = Verdict("loss", "Loss: perplexity is 4.1% to 6.2% higher.", 0.004)
LITTLE = Verdict("too little data", "Too little data: 12 items.", None)


def make_text(name: str = "bundled:demo_eval.txt", sha: str = "ab", kl: float = 0.0833) -> TextResult:
    """4 disjoint windows of 1024 tokens at a mean KL divergence of `kl`."""
    positions = tuple((16 * i, kl * (1 + 1.5 / (1 + i)) * (1 + 0.2 * math.sin(i))) for i in range(64))
    return TextResult(
        dataset=name,
        dataset_sha256=sha * 32,
        joining="one file, as it is",
        window_tokens=1024,
        stride_tokens=1024,
        windows=64,
        tokens=65472,
        perplexity=PerplexityPair(18.6513, 19.6021, 1.05098, 65472),
        perplexity_ratio=Interval(1.05098, 1.0412, 1.0618),
        bits_per_byte_baseline=0.9831,
        bits_per_byte_quantized=1.0001,
        divergence=Divergence(kl, kl / 3, kl * 2.4, kl * 9, 6.123, 0.8623, 65536),
        kl_mean=Interval(kl, kl * 0.97, kl * 1.03),
        top1_agreement=Interval(0.8623, 0.8588, 0.8659),
        kl_by_position=positions,
        verdict=LOSS,
    )


def make_task(name: str, change: float, verdict: Verdict, items: int = 1319) -> TaskResult:
    """A 0/1 task that moved by `change` with an interval of 2.5 points around it."""
    interval = Interval(change, change - 0.025, change + 0.025)
    return TaskResult(name, "exact_match", 5, items, 0.513, 0.513 + change, interval, 61, 40, 0.0412, 0.165, verdict)


def full_result() -> ValidationResult:
    """Two texts, six lengths, six tasks, four smoke prompts, three gates of which one fails, warnings."""
    lengths = (1024, 2048, 4096, 8192, 16384, 32768)
    baseline = (4.23, 3.78, 39.35, 469.81, 2645.09, 4123.0)
    return ValidationResult(
        baseline="/models/Qwen2.5-0.5B",
        quantized="/models/Qwen2.5-0.5B-Int4",
        baseline_kind="16-bit",
        quantized_kind="gptq 4 bit",
        baseline_bytes=988_097_824,
        quantized_bytes=457_402_112,
        baseline_sha256="01" * 32,
        quantized_sha256="23" * 32,
        kv_cache="int8",
        texts=(make_text(), make_text("bundled:eval_zh.txt", "cd", 0.21)),
        by_length=tuple(
            LengthRow(n, 131072 // n, 131072 - 131072 // n, p, p * 1.05, 1.05)
            for n, p in zip(lengths, baseline, strict=True)
        ),
        tasks=(
            make_task("gsm8k", -0.016, NO_LOSS),
            make_task("mmlu_abstract_algebra_with_a_very_long_name_indeed", -0.061, LOSS, 100),
            make_task("ceval-valid_computer_network", 0.04, dataclasses.replace(NO_LOSS, word="gain", text="Gain.")),
            make_task("humaneval", 0.0, LITTLE, 12),
            dataclasses.replace(
                make_task("vcsum", -0.004, NO_LOSS), only_baseline_right=None, only_quantized_right=None
            ),
            make_task(HOSTILE, 0.001, NO_LOSS),
        ),
        smoke=(
            SmokeCase(
                "question", "en", "<|im_start|>user\nWhat is 2+2?<|im_end|>", "2+2 is 4.", 7, True, "It is 4.", ()
            ),
            SmokeCase(
                "greeting", "zh", "你好，请介绍一下你自己。", "你好！" * 40, 120, True, "你好！我是通义千问。", ()
            ),
            SmokeCase("loop", "en", "Tell a story.", "!" * 300, 300, False, "", ("repeats one token", "did not stop")),
            SmokeCase("hostile", "en", HOSTILE, HOSTILE, 3, True, HOSTILE, ()),
        ),
        gates=(
            GateOutcome("max_kl on bundled:demo_eval.txt", 0.1, 0.0858, True),
            GateOutcome("max_perplexity_ratio on bundled:demo_eval.txt", 1.05, 1.0618, False),
            GateOutcome("min_top1 on bundled:demo_eval.txt", 0.85, 0.8588, True),
        ),
        override_reason="",
        warnings=("the baseline is itself quantized <b>", "a text is shorter than 32 windows"),
        seed=7,
        versions={"qwen-quant": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        seconds=4711.5,
        peak_memory_bytes=3_456_789_012,
    )


def full_layers(blocks: int = 24) -> tuple[LayerStats, ...]:
    """Seven linears a block, errors that grow with depth, plain rounding about twice as far off."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    found = []
    for block in range(blocks):
        for k, kind in enumerate((*kinds, "mlp.up_proj", "mlp.down_proj")):
            error = 0.03 * (1 + 0.05 * block) * (1 + 0.3 * math.sin(3 * block + k)) * (1 + 0.15 * k)
            name = f"model.layers.{block}.{kind}"
            found.append(LayerStats(name, 896, 4864, error, 2.2 * error, 0.01, k % 2, 262144, 0.0))
    return tuple(found)
