"""A made-up ValidationResult, so that gates and commands are tested without models."""

from __future__ import annotations

from qwen_quant.results import Divergence, Interval, PerplexityPair, TaskResult, TextResult, ValidationResult, Verdict

VERDICT = Verdict("no loss detected", "no loss detected (smallest loss this could have seen: 1%)", 0.01)
TASK = TaskResult("gsm8k", "exact_match", 5, 100, 0.5, 0.49, Interval(-0.01, -0.05, 0.03), 3, 2, 1.0, 1.0, VERDICT)


KL, RATIO, TOP1 = Interval(0.08, 0.07, 0.09), Interval(1.05, 1.04, 1.06), Interval(0.9, 0.89, 0.91)


def make_result(
    kl: Interval = KL,
    ratio: Interval = RATIO,
    top1: Interval = TOP1,
) -> ValidationResult:
    """One text with these intervals, nothing else."""
    text = TextResult(
        dataset="text",
        dataset_sha256="ab" * 32,
        joining="one file",
        window_tokens=64,
        stride_tokens=64,
        windows=3,
        tokens=189,
        perplexity=PerplexityPair(20.0, 21.0, ratio.estimate, 189),
        perplexity_ratio=ratio,
        bits_per_byte_baseline=1.0,
        bits_per_byte_quantized=1.02,
        divergence=Divergence(kl.estimate, 0.05, 0.2, 0.5, 1.0, top1.estimate, 192),
        kl_mean=kl,
        top1_agreement=top1,
        kl_by_position=((0, 0.1), (32, 0.06)),
        verdict=VERDICT,
    )
    return ValidationResult(
        baseline="model",
        quantized="artifact",
        baseline_kind="16-bit",
        quantized_kind="gptq 4 bit",
        baseline_bytes=4_000_000,
        quantized_bytes=1_000_000,
        baseline_sha256="01" * 32,
        quantized_sha256="23" * 32,
        kv_cache="",
        texts=(text,),
        by_length=(),
        tasks=(),
        smoke=(),
        gates=(),
        override_reason="",
        warnings=(),
        seed=0,
        versions={"torch": "2.13.0"},
        seconds=1.0,
        peak_memory_bytes=4_000_000,
    )
