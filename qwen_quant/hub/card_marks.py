"""Places in a card that belong to people: what stands between two marked comments survives every regeneration.

    <!-- qwen-quant:begin notes-en: text up to the end mark is kept -->
    (anything)
    <!-- qwen-quant:end notes-en -->

The text is kept byte for byte: line ends are not touched, and bytes that are not UTF-8 pass through as surrogates.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwen_quant.errors import InputError

PLACES = ("intro", "notes")
_MARK = re.compile(r"^[ \t]*<!-- qwen-quant:(begin|end) ([\w-]+)\b[^\n]*?-->[ \t]*\r?$\n?", re.MULTILINE)


def read_text(path: Path) -> str:
    """The text of a card with its line ends as they are; other bytes than UTF-8 become lone surrogates."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def place(name: str, kept: dict[str, str]) -> str:
    """The marked place `name` with its kept text (none: an empty place)."""
    text = kept.get(name, "")
    gap = "" if not text or text.endswith("\n") else "\n"
    begin = f"<!-- qwen-quant:begin {name}: text up to the end mark is kept -->"
    return f"{begin}\n{text}{gap}<!-- qwen-quant:end {name} -->"


def kept_texts(path: Path, text: str) -> dict[str, str]:
    """Name -> what stands between the marks, without empty places.

    Errors: InputError naming `path` and the line where a mark has no partner, or a place appears twice.
    """
    found: dict[str, str] = {}
    opened: tuple[str, int] | None = None
    for mark in _MARK.finditer(text):
        kind, name = mark[1], mark[2]
        line = text.count("\n", 0, mark.start()) + 1
        if kind == "begin" and opened is None and name not in found:
            opened = (name, mark.end())
        elif kind == "end" and opened is not None and opened[0] == name:
            found[name] = text[opened[1] : mark.start()]
            opened = None
        else:
            raise _damaged(path, line, f"the mark '{kind} {name}' has no partner, or the place appears twice")
    if opened is not None:
        raise _damaged(path, text.count("\n", 0, opened[1]), f"the mark 'begin {opened[0]}' has no end")
    return {name: body for name, body in found.items() if body}


def _damaged(path: Path, line: int, why: str) -> InputError:
    step = "put the pair of comments back, or rename the file to start a new card"
    return InputError(f"{path}, line {line}: the marked places are damaged", why, step)
