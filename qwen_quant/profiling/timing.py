"""Timing of one generation against any clock, and what the times say. No torch.

A generation that is cut short is extrapolated: its missing tokens take the mean time of those that were seen, or, where
the time of a token grows clearly with its position (`clear_slope`), the fitted line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_quant.profiling.results import Spread

CURVE_POINTS = 64
LEAST_TOKENS = 4  # a generation is never cut before these: one prefill and three steps
_FIT_TOKENS = 64  # fewer say nothing about a slope
_FIT_BLOCKS = 16


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation: until the first token, then of each further one; `wanted_tokens` were asked for."""

    first_token_seconds: float
    step_seconds: tuple[float, ...]
    wanted_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return 1 + len(self.step_seconds)


def time_generation(
    prefill: Callable[[], None],
    step: Callable[[], None],
    new_tokens: int,
    clock: Callable[[], float],
    max_seconds: float | None = None,
) -> Timing:
    """Call `prefill` once and `step` for each further token, reading `clock` (seconds) in between.

    Both must return only when the device is done. After `max_seconds` no further token is started.
    """
    start = last = clock()
    prefill()
    now = clock()
    first, steps = now - start, []
    for token in range(1, new_tokens):
        if max_seconds is not None and now - start >= max_seconds and token >= LEAST_TOKENS:
            break
        last = now
        step()
        now = clock()
        steps.append(now - last)
    return Timing(first, tuple(steps), new_tokens)


def total_seconds(timing: Timing) -> float:
    """Time of all wanted tokens: measured, the missing ones extrapolated."""
    seconds = timing.first_token_seconds + sum(timing.step_seconds)
    missing = timing.wanted_tokens - timing.tokens
    if missing <= 0 or not timing.step_seconds:
        return seconds
    seen = len(timing.step_seconds)
    mean = sum(timing.step_seconds) / seen
    # The missing steps lie, on average, this far behind the middle of those seen.
    distance = (seen - 1) / 2 + 1 + (missing - 1) / 2
    return seconds + missing * (mean + clear_slope(timing.step_seconds) * distance)


def clear_slope(values: Sequence[float]) -> float:
    """Growth per step where it is positive and above two standard errors, else 0.

    By least squares through the least value of each of _FIT_BLOCKS equal stretches: what other programs take for a
    while only ever adds time, and a line through all values would take it for growth.
    """
    block = len(values) // _FIT_BLOCKS
    if len(values) < _FIT_TOKENS:
        return 0.0
    late = values[len(values) - block * _FIT_BLOCKS :]
    least = [min(late[start : start + block]) for start in range(0, len(late), block)]
    return _slope(least) / block


def _slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line where it is above two standard errors, else 0."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = count * (count**2 - 1) / 12
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    left = sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values))
    error = math.sqrt(left / (count - 2) / spread)
    return slope if slope > 2 * error else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of at least one value lies, interpolated between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> Spread:
    """Median, least and largest of at least one run."""
    return Spread(percentile(values, 0.5), min(values), max(values), len(values))


def latency_curve(timing: Timing) -> tuple[tuple[int, float], ...]:
    """(new tokens so far, median seconds of a token) of up to CURVE_POINTS stretches of about equal length."""
    steps = timing.step_seconds
    width = max(1, math.ceil(len(steps) / CURVE_POINTS))
    return tuple(
        (min(start + width, len(steps)) + 1, percentile(steps[start : start + width], 0.5))
        for start in range(0, len(steps), width)
    )
