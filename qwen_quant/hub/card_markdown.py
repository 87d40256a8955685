"""Pieces of Markdown for the model card, safe for names that come from elsewhere; numbers as the card prints them.

GitHub-flavoured Markdown, as the Hub renders it. Text from a name, a reason or a warning goes through `escape` (or
`code`), so that it can neither open an HTML tag nor a link, and cannot end a table's cell or a block of code.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from qwen_quant.results import Interval
from qwen_quant.units import format_bytes

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
_SPECIAL = re.compile(r"([\\`*_\[\]|~#$!])")
_AUTOLINK = re.compile(r"(?i)(https?|ftp)://|\bwww\.|mailto:|xmpp:")
_UNSAFE_IN_CODE = re.compile(r"[`|<>&\n]")


def plain(text: str) -> str:
    """`text` on one line: spaces for line ends, and neither control characters nor ones that change the direction."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn")).strip()


def escape(text: str) -> str:
    """`text` as Markdown that shows exactly it: no tag, link, emphasis, mention, table border or formula."""
    quoted = _SPECIAL.sub(r"\\\1", plain(text))
    quoted = "".join(_ENTITIES.get(character, character) for character in quoted)
    return _AUTOLINK.sub(lambda found: found[0].replace(":", "&#58;").replace(".", "&#46;"), quoted)


def code(text: str) -> str:
    """`text` as inline code; as escaped text where it holds what code cannot (backticks, borders, tags)."""
    clean = plain(text)
    return f"`{clean}`" if clean and not _UNSAFE_IN_CODE.search(clean) else escape(text)


def fence(language: str, text: str) -> str:
    """A block of code; its fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table; the first `text_columns` are left-aligned. Cells are Markdown already; a line end would break a row."""
    rule = [":---" if k < text_columns else "---:" for k in range(len(columns))]
    lines = (columns, rule, *rows)
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines)


def number(value: float, digits: int) -> str:
    """With so many decimals; "NaN" or an infinity as it is."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:.{digits}f}"


def percent(share: float, digits: int = 2) -> str:
    """A share of 0 to 1 as a percentage: 0.8455 -> "84.55%"."""
    return number(100 * share, digits) + "%"


def signed(value: float, digits: int) -> str:
    """With its sign: 1.2 -> "+1.2"; what rounds to zero has none."""
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(text) != 0 and math.isfinite(value) else text


def interval(value: Interval, digits: int, *, to: str) -> str:
    """ "1.0685 (1.0572 to 1.0795)"; `to` is the word between the ends."""
    low, high = number(value.low, digits), number(value.high, digits)
    return f"{number(value.estimate, digits)} ({low} {to} {high})"


def percent_interval(value: Interval, *, to: str) -> str:
    """ "84.65% (83.17 to 86.07)"."""
    return f"{percent(value.estimate)} ({number(100 * value.low, 2)} {to} {number(100 * value.high, 2)})"


def gibibytes(count: float) -> str:
    """Bytes as GiB with two decimals, for columns that must compare; small ones in their own unit."""
    return format_bytes(count) if count < 2**30 else f"{count / 2**30:.2f} GiB"
