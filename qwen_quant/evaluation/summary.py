"""From what was measured at each position to the figures of a report, with their intervals."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qwen_quant.evaluation.divergence import summarize
from qwen_quant.evaluation.pair import TokenScores
from qwen_quant.evaluation.perplexity import WindowSet, perplexity_pair
from qwen_quant.evaluation.significance import block_bootstrap, perplexity_ratio_interval, perplexity_verdict
from qwen_quant.evaluation.texts import EvaluationText
from qwen_quant.results import Interval, LengthRow, TextResult

POSITION_STRETCHES = 64


def _fresh(values: Tensor, windows: WindowSet, offset: int) -> Tensor:
    """Values that count, flat: [windows, positions] less what an earlier window has scored already.

    `offset` 1: `values` stand at the predicted token, so that column 0 belongs to position 1 of the window.
    """
    if windows.stride == windows.window_tokens:
        return values.flatten()
    later = values[1:, windows.first_fresh(1) - offset :]
    return torch.cat([values[0], later.flatten()])


def _blocks(flat: Tensor, windows: WindowSet) -> np.ndarray:
    """The values as FP64 [blocks, items], one block a window's share; a rest at the start is left out."""
    count = windows.ids.shape[0]
    size = flat.numel() // count if windows.stride == windows.window_tokens else windows.stride
    return flat[flat.numel() % size :].double().view(-1, size).numpy()


def _with_estimate(interval: Interval, estimate: float, most: float = math.inf) -> Interval:
    """The interval around the value over ALL positions (blocks may have left out a rest), within 0..most."""
    shift = estimate - interval.estimate
    low, high = (min(max(end + shift, 0.0), most) for end in (interval.low, interval.high))
    return Interval(estimate, min(low, estimate), max(high, estimate), interval.confidence)


def scored_bytes(windows: WindowSet, decode: object) -> int:
    """UTF-8 bytes of the scored tokens; `decode` is the tokenizer's ids -> text."""
    assert callable(decode)
    count = windows.ids.shape[0]
    return sum(len(str(decode(windows.scored_ids(k))).encode("utf-8")) for k in range(count))


def text_result(
    text: EvaluationText, windows: WindowSet, scores: TokenScores, *, byte_count: int, seed: int
) -> TextResult:
    """The figures of one text; `byte_count` as `scored_bytes`, `seed` of the bootstrap."""
    kl, same = _fresh(scores.kl, windows, 0), _fresh(scores.same_top1, windows, 0)
    baseline = _fresh(scores.baseline_losses, windows, 1)
    quantized = _fresh(scores.quantized_losses, windows, 1)
    pair, divergence = perplexity_pair(baseline, quantized), summarize(kl, same)
    ratio = perplexity_ratio_interval(_blocks(baseline, windows), _blocks(quantized, windows), seed=seed)
    ratio = _with_estimate(ratio, pair.ratio)
    bits = math.log(2) * max(byte_count, 1)
    return TextResult(
        dataset=text.name,
        dataset_sha256=text.sha256,
        joining=text.joining,
        window_tokens=windows.window_tokens,
        stride_tokens=windows.stride,
        windows=int(windows.ids.shape[0]),
        tokens=pair.tokens,
        perplexity=pair,
        perplexity_ratio=ratio,
        bits_per_byte_baseline=float(baseline.sum()) / bits,
        bits_per_byte_quantized=float(quantized.sum()) / bits,
        divergence=divergence,
        kl_mean=_with_estimate(block_bootstrap(_blocks(kl, windows), seed=seed), divergence.kl_mean),
        top1_agreement=_with_estimate(
            block_bootstrap(_blocks(same, windows), seed=seed), divergence.top1_agreement, most=1.0
        ),
        kl_by_position=kl_by_position(scores.kl, windows),
        verdict=perplexity_verdict(ratio),
    )


def kl_by_position(kl: Tensor, windows: WindowSet) -> tuple[tuple[int, float], ...]:
    """Mean KL divergence over up to POSITION_STRETCHES equal stretches of the window: (first position, mean)."""
    first = windows.first_fresh(1)
    size = math.ceil(windows.window_tokens / POSITION_STRETCHES)
    stretches = []
    for start in range(0, windows.window_tokens, size):
        part = kl[:, start : start + size] if start >= first else kl[:1, start : start + size]
        stretches.append((start, float(part.mean())))
    return tuple(stretches)


def length_row(windows: WindowSet, scores: TokenScores) -> LengthRow:
    """One row of the long-context table."""
    pair = perplexity_pair(scores.baseline_losses.flatten(), scores.quantized_losses.flatten())
    count = int(windows.ids.shape[0])
    return LengthRow(windows.window_tokens, count, pair.tokens, pair.baseline, pair.quantized, pair.ratio)
