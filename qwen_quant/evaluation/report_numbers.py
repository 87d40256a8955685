"""How figures and texts of a report are written for people: digits, percentages, intervals, escaped HTML."""

from __future__ import annotations

import math
from html import escape

from qwen_quant.results import Interval, ValidationResult

# What a browser or a terminal would drop, or obey by turning the rest of a line around, is shown as its escape.
_CONTROLS = (*range(9), *range(11, 32), *range(0x7F, 0xA0))
_DIRECTIONS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _DIRECTIONS}


def visible(text: str) -> str:
    """The text with control and direction characters as their escapes (\\x1b, \\u202e); line ends and tabs stay."""
    return text.translate(_ESCAPES)


def escaped(text: str) -> str:
    """Any text as HTML text or attribute value, what it hides made visible."""
    return escape(visible(text))


def number(value: float) -> str:
    """Four significant digits: 0.08312, 20.00, 65536; what is not finite is said in words."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e12:
        return f"{value:.0f}"
    return f"{value:#.3g}" if abs(value) < 1e-4 else f"{value:#.4g}".rstrip(".")


def percent(share: float) -> str:
    """A share of 1 as a percentage with two decimals: 0.9123 -> "91.23%"."""
    return f"{100 * share:.2f}%" if math.isfinite(share) else number(share)


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign: -0.012 -> "-1.20"."""
    return f"{100 * difference:+.2f}" if math.isfinite(difference) else number(difference)


def whole(count: int) -> str:
    """A count with commas: 65536 -> "65,536"."""
    return f"{count:,}"


def cache_words(result: ValidationResult) -> str:
    """Which KV caches were compared, in a sentence; "" where none was asked for."""
    if not result.kv_cache:
        return ""
    other = "plain" if result.kv_cache == "bf16" else result.kv_cache
    weights = "the same weights" if result.baseline_sha256 == result.quantized_sha256 else "other weights"
    return f"KV cache: {other} against plain, on {weights}"


def span(interval: Interval) -> str:
    """The ends of an interval: "0.08121 to 0.08490"."""
    return f"{number(interval.low)} to {number(interval.high)}"


def percent_span(interval: Interval) -> str:
    """The ends of an interval of shares: "91.02% to 91.47%"."""
    return f"{percent(interval.low)} to {percent(interval.high)}"


def points_span(interval: Interval) -> str:
    """The ends of an interval of differences in percentage points: "-2.40 to +0.10"."""
    return f"{points(interval.low)} to {points(interval.high)}"
