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
class ValidationResult:
    """How far `quantized` is from `baseline` on `dataset`, with the protocol spelled out."""

    baseline: str
    quantized: str
    dataset: str
    dataset_sha256: str
    window_tokens: int
    windows: int
    perplexity: PerplexityPair
    divergence: Divergence
    baseline_bytes: int
    quantized_bytes: int
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
