"""Frozen results with units in their names, and their JSON form (schema `qwen-quant/1`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerStats:
    """What the solver did to one linear.

    Attributes:
        name: the linear's name in the source, without ".weight".
        relative_error: sqrt(tr(dW H dW^T) / tr(W H W^T)) of the artifact's weights.
        rounding_error: the same for plain min-max rounding on the same Hessian.
        damp_percent: the damping that succeeded (the configured one unless it had to escalate).
        dead_columns: input columns that never fired (Hessian diagonal zero).
        tokens: calibration tokens in the Hessian.
        seconds: time of the solve, shared out by rows among linears solved together.
        routed_tokens: tokens that the router sent to this linear's expert (None for a linear of no routed expert).
        calibrated_by: "routed" where those were enough, else the expert policy that stepped in.
    """

    name: str
    in_features: int
    out_features: int
    relative_error: float
    rounding_error: float
    damp_percent: float
    dead_columns: int
    tokens: int
    seconds: float
    routed_tokens: int | None = None
    calibrated_by: str | None = None


@dataclass(frozen=True)
class Divergence:
    """KL divergence KL(baseline || quantized) per token in nats, over the full vocabulary, and top-1 agreement."""

    kl_mean: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    tokens: int


@dataclass(frozen=True)
class PerplexityPair:
    """Perplexity of the same tokens under both models (natural logarithm, mean over scored tokens)."""

    baseline: float
    quantized: float
    ratio: float
    tokens: int


@dataclass(frozen=True)
class Interval:
    """A measured value with its confidence interval (both ends included)."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """What the statistics say, in words.

    Attributes:
        word: "no loss detected", "loss", "gain" or "too little data".
        text: the same as a sentence with its figures.
        smallest_detectable: the smallest loss that this much data would have seen (80% power), in the metric's unit;
            None where there is too little data to say.
    """

    word: str
    text: str
    smallest_detectable: float | None


@dataclass(frozen=True)
class TextResult:
    """Perplexity and divergence of both models on the same windows of one text.

    Attributes:
        dataset: file, "bundled:NAME" or "hub:..." of the text; sha256 of the bytes it was read from.
        window_tokens, stride_tokens: a window starts every stride_tokens; each token is scored in the first window that
            holds it (stride_tokens == window_tokens: disjoint windows).
        windows, tokens: counted; tokens are scored tokens of both models.
        joining: how the rows of the source became one text, in words.
        perplexity: of both; ratio is quantized / baseline.
        perplexity_ratio: the ratio with its block-bootstrap interval.
        bits_per_byte_baseline, bits_per_byte_quantized: bits per UTF-8 byte of the scored text.
        divergence: KL(baseline || quantized), full vocabulary.
        kl_mean: its mean with a block-bootstrap interval.
        top1_agreement: with a block-bootstrap interval.
        kl_by_position: mean KL divergence at each of up to 64 equal stretches of the window: (first position, mean).
        verdict: on the perplexity ratio.
    """

    dataset: str
    dataset_sha256: str
    joining: str
    window_tokens: int
    stride_tokens: int
    windows: int
    tokens: int
    perplexity: PerplexityPair
    perplexity_ratio: Interval
    bits_per_byte_baseline: float
    bits_per_byte_quantized: float
    divergence: Divergence
    kl_mean: Interval
    top1_agreement: Interval
    kl_by_position: tuple[tuple[int, float], ...]
    verdict: Verdict


@dataclass(frozen=True)
class LengthRow:
    """Perplexity at one context length: the same text cut into disjoint windows of `window_tokens`."""

    window_tokens: int
    windows: int
    tokens: int
    baseline: float
    quantized: float
    ratio: float


@dataclass(frozen=True)
class TaskResult:
    """One benchmark task on the same items under both models.

    Attributes:
        task, metric: lm-eval's names. shots: examples in the prompt. items: paired items.
        baseline, quantized: mean score in 0..1. difference: quantized - baseline with its paired-bootstrap interval.
        only_baseline_right, only_quantized_right: discordant items (None where the metric is not 0/1).
        p_value: McNemar's exact test, or of a sign-flip permutation test where the metric is not 0/1.
        p_holm: after Holm's correction over all tasks of the report.
        verdict: in words.
    """

    task: str
    metric: str
    shots: int
    items: int
    baseline: float
    quantized: float
    difference: Interval
    only_baseline_right: int | None
    only_quantized_right: int | None
    p_value: float
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True)
class SmokeCase:
    """One fixed prompt through the quantized model, greedy.

    Attributes:
        name, language: of the prompt. prompt: as sent (after the chat template where there is one).
        text: what came back. tokens: how many. stopped: whether a stop token ended it.
        baseline_text: what the baseline said (empty when it was not asked).
        failures: what is wrong with it, in words; empty when it passes.
        notes: what was seen and not counted, and why; a limit on the answer.
    """

    name: str
    language: str
    prompt: str
    text: str
    tokens: int
    stopped: bool
    baseline_text: str
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateOutcome:
    """One gate: `value` is the unfavourable end of what was measured, compared with `limit`."""

    name: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class ValidationResult:
    """report.json (schema `qwen-quant/report/2`, documented in docs/report.md): how far `quantized` is from `baseline`.

    Attributes:
        baseline, quantized: folders or hub ids as given; *_kind: "16-bit", "gptq 4 bit", "bitsandbytes nf4", ...
        baseline_sha256, quantized_sha256: checkpoint.identity.weights_sha256 of the folder that was read, which names
            the weights whatever the folder is called; "" where it has no *.safetensors file.
        kv_cache: how the quantized side held the keys and values of its attention: "" when no cache was asked for (and
            none was used), else "bf16" (the model's own dtype), "int8" or "qwen".
        texts: one row a text; by_length: the long-context table; tasks: benchmark tasks; smoke: fixed prompts.
        gates: every gate that was asked for; override_reason: why failing gates were overridden ("" when not).
        warnings: everything that a reader should know before trusting the numbers.
        seed: of every bootstrap. versions: of the packages that computed it.
    """

    baseline: str
    quantized: str
    baseline_kind: str
    quantized_kind: str
    baseline_bytes: int
    quantized_bytes: int
    baseline_sha256: str
    quantized_sha256: str
    kv_cache: str
    texts: tuple[TextResult, ...]
    by_length: tuple[LengthRow, ...]
    tasks: tuple[TaskResult, ...]
    smoke: tuple[SmokeCase, ...]
    gates: tuple[GateOutcome, ...]
    override_reason: str
    warnings: tuple[str, ...]
    seed: int
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int


def to_json(value: Any) -> Any:
    """Plain JSON types of a result: dataclasses become objects, tuples lists, paths strings; keys stay as named."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
