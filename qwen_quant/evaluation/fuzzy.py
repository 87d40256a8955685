"""The weighted similarity of two texts that thefuzz calls WRatio, from its definition.

First-generation Qwen's multiple-choice scripts fall back on it when a response names no letter, which weak models do
often enough to move a score.  Everything rests on one number, ratio = 2 * LCS / (sum of lengths), taken over the texts,
over their sorted words, over the words they do not share, and over the best matching stretch of the longer text; the
largest counts, the less literal ones with a discount.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_quant.evaluation.scoring import lcs_length

WORD_DISCOUNT = 0.95
STRETCH_DISCOUNT, FAR_STRETCH_DISCOUNT = 0.9, 0.6
STRETCH_FROM, FAR_FROM = 1.5, 8.0  # ratio of the texts' lengths


def plain(text: str) -> str:
    """Lower case, with blanks for everything but letters and digits."""
    return re.sub(r"[\W_]", " ", text).lower().strip()


def weighted_ratio(first: str, second: str) -> float:
    """Similarity in [0, 1] of two texts that are already `plain`; 0 when one is empty."""
    if not first or not second:
        return 0.0
    lengths = max(len(first), len(second)) / min(len(first), len(second))
    if lengths < STRETCH_FROM:
        return max(ratio(first, second), WORD_DISCOUNT * words_ratio(first.split(), second.split()))
    discount = STRETCH_DISCOUNT if lengths <= FAR_FROM else FAR_STRETCH_DISCOUNT
    words = WORD_DISCOUNT * stretch_words_ratio(first.split(), second.split())
    return max(ratio(first, second), discount * max(stretch_ratio(first, second), words))


def ratio(first: str, second: str) -> float:
    """2 * LCS / (sum of lengths)."""
    total = len(first) + len(second)
    return 2 * lcs_length(first, second) / total if total else 1.0


def words_ratio(first: Sequence[str], second: Sequence[str]) -> float:
    """The best of: sorted words; shared words before the rest of each; shared words against each text's words."""
    shared, only_first, only_second = _split(first, second)
    if shared and not (only_first and only_second):
        return 1.0
    best = ratio(" ".join(sorted(first)), " ".join(sorted(second)))
    rests = " ".join(only_first), " ".join(only_second)
    head = len(" ".join(shared))
    lengths = [head + bool(head) + len(rest) for rest in rests]
    # Equal heads match as a whole, so only the rests are compared: 1 - (insertions and deletions) / (sum of lengths).
    edits = len(rests[0]) + len(rests[1]) - 2 * lcs_length(*rests)
    best = max(best, 1 - edits / sum(lengths))
    if head:
        best = max(best, *(2 * head / (head + length) for length in lengths))
    return best


def stretch_ratio(first: str, second: str) -> float:
    """The ratio of the shorter text to the best stretch of the longer one, its length or less at the ends."""
    if len(first) == len(second):
        return max(_stretch_ratio(first, second), _stretch_ratio(second, first))
    return _stretch_ratio(*sorted((first, second), key=len))


def _stretch_ratio(short: str, long: str) -> float:
    size, known = len(short), set(short)
    best = 0.0
    for start in range(1 - size, len(long)):
        stretch = long[max(0, start) : start + size]
        # A stretch whose last letter (at the end of the text: first letter) cannot match is never the best one.
        edge = stretch[0] if start + size > len(long) else stretch[-1]
        if edge in known and 2 * min(size, len(stretch)) / (size + len(stretch)) > best:
            best = max(best, ratio(short, stretch))
    return best


def stretch_words_ratio(first: Sequence[str], second: Sequence[str]) -> float:
    """1 when the texts share a word, else the best stretch ratio of their sorted words, repeated or once each."""
    shared, only_first, only_second = _split(first, second)
    if shared:
        return 1.0
    best = stretch_ratio(" ".join(sorted(first)), " ".join(sorted(second)))
    if len(only_first) == len(first) and len(only_second) == len(second):
        return best
    return max(best, stretch_ratio(" ".join(only_first), " ".join(only_second)))


def _split(first: Sequence[str], second: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Words in both, in the first only, in the second only; sorted, each once."""
    one, two = set(first), set(second)
    return sorted(one & two), sorted(one - two), sorted(two - one)
