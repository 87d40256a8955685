"""A reader of JSON5 (https://spec.json5.org): JSON as models write it, with single quotes, bare keys, trailing commas
and comments.

First-generation Qwen's tool-use evaluation reads action inputs as JSON5, so scoring them with strict JSON would turn
right answers into wrong ones.  Values become what `json.loads` gives for the same data.
"""

from __future__ import annotations

import re
from typing import Any

_SKIPPED = re.compile(r"(?:[\s\ufeff]+|//[^\n\r\u2028\u2029]*|/\*.*?\*/)*", re.DOTALL)
_NAME = re.compile(r"(?:[^\W\d]|[$_]|\\u[0-9a-fA-F]{4})(?:\w|[$\u200c\u200d]|\\u[0-9a-fA-F]{4})*")
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F]+|Infinity|NaN|(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII
)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_LINE_ENDS = ("\r\n", "\n", "\r", "\u2028", "\u2029")
_WORDS = {"true": True, "false": False, "null": None}


def loads(text: str) -> Any:
    """The value of a JSON5 text (ValueError with the offset where it is none)."""
    value, end = _value(text, _skip(text, 0))
    end = _skip(text, end)
    if end != len(text):
        raise ValueError(f"JSON5: something follows the value at {end}")
    return value


def _skip(text: str, at: int) -> int:
    """Past white space and comments."""
    match = _SKIPPED.match(text, at)
    return match.end() if match else at


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value that starts at `at`, and where it ends."""
    start = text[at : at + 1]
    if start == "{":
        return _members(text, at + 1)
    if start == "[":
        return _items(text, at + 1)
    if start and start in "\"'":
        return _string(text, at)
    for word, value in _WORDS.items():
        if text.startswith(word, at):
            return value, at + len(word)
    if match := _NUMBER.match(text, at):
        return _number(match.group()), match.end()
    raise ValueError(f"JSON5: no value at {at}")


def _number(text: str) -> int | float:
    """An int where the text has neither fraction nor exponent."""
    unsigned = text.lstrip("+-")
    if unsigned[:2] in ("0x", "0X"):
        return -int(unsigned, 16) if text[0] == "-" else int(unsigned, 16)
    return int(text) if unsigned.isdigit() else float(text)


def _separator(text: str, at: int, closing: str) -> tuple[int, bool]:
    """Past the comma after an element, and whether the closing bracket was there instead."""
    at = _skip(text, at)
    if text.startswith(closing, at):
        return at + 1, True
    if not text.startswith(",", at):
        raise ValueError(f"JSON5: neither comma nor {closing} at {at}")
    at = _skip(text, at + 1)
    return (at + 1, True) if text.startswith(closing, at) else (at, False)


def _items(text: str, at: int) -> tuple[list[Any], int]:
    """An array after its bracket."""
    items: list[Any] = []
    at = _skip(text, at)
    if text.startswith("]", at):
        return items, at + 1
    while True:
        item, at = _value(text, at)
        items.append(item)
        at, done = _separator(text, at, "]")
        if done:
            return items, at


def _members(text: str, at: int) -> tuple[dict[str, Any], int]:
    """An object after its brace; the last of equal keys wins."""
    members: dict[str, Any] = {}
    at = _skip(text, at)
    if text.startswith("}", at):
        return members, at + 1
    while True:
        key, at = _key(text, at)
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise ValueError(f"JSON5: no colon at {at}")
        members[key], at = _value(text, _skip(text, at + 1))
        at, done = _separator(text, at, "}")
        if done:
            return members, at


def _key(text: str, at: int) -> tuple[str, int]:
    """A quoted or bare key."""
    if text[at : at + 1] in ('"', "'"):
        return _string(text, at)
    match = _NAME.match(text, at)
    if match is None:
        raise ValueError(f"JSON5: no key at {at}")
    return re.sub(r"\\u(.{4})", lambda found: chr(int(found[1], 16)), match.group()), match.end()


def _string(text: str, at: int) -> tuple[str, int]:
    """A string from its opening quote; surrogate pairs written as two escapes become one character."""
    quote, at, parts = text[at], at + 1, []
    while at < len(text) and text[at] != quote:
        if text[at] in "\n\r":
            break
        if text[at] == "\\":
            part, at = _escape(text, at + 1)
        else:
            part, at = text[at], at + 1
        parts.append(part)
    if not text.startswith(quote, at):
        raise ValueError(f"JSON5: the string is not closed at {at}")
    return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace"), at + 1


def _escape(text: str, at: int) -> tuple[str, int]:
    """What stands after a backslash."""
    for line_end in _LINE_ENDS:
        if text.startswith(line_end, at):
            return "", at + len(line_end)
    letter = text[at : at + 1]
    digits = {"u": 4, "x": 2}.get(letter, 0)
    if digits:
        code = text[at + 1 : at + 1 + digits]
        if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code):
            raise ValueError(f"JSON5: bad escape at {at}")
        return chr(int(code, 16)), at + 1 + digits
    if not letter or letter in "123456789":
        raise ValueError(f"JSON5: bad escape at {at}")
    return _ESCAPES.get(letter, letter), at + 1
