"""The head of a GGUF file (version 3): its metadata and where each tensor lies, without the library that wrote it.

"GGUF", u32 version, u64 tensors, u64 keys
keys:     string name, u32 type, value       string: u64 bytes, UTF-8; array: u32 type, u64 count, values
tensors:  string name, u32 dimensions, u64 each, u32 type, u64 offset in the data
data      from the next multiple of general.alignment (32)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_quant.errors import InputError

MAGIC, VERSION = b"GGUF", 3
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_KEPT = 64
_MOST_BYTES = 1 << 31  # of one string or array: more is damage


@dataclass(frozen=True)
class Head:
    """`values`: metadata by key (of arrays the first values); `tensors`: name -> offset; `data`: where it begins."""

    values: dict[str, Any]
    tensors: dict[str, int]
    data: int


def gguf_files(names: Iterable[str]) -> list[str]:
    """The GGUF files among `names`, the one that readers are given first (a split export has several)."""
    return sorted(name for name in names if name.endswith(".gguf"))


def read_head(path: Path) -> Head:
    """Read it. Errors: InputError for a file that is no GGUF, of another version, cut or damaged."""
    try:
        with open(path, "rb") as file:
            return _head(file, path)
    except (OSError, struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} cannot be read as GGUF", why, "export again, or fetch it again") from error


def _head(file: BinaryIO, path: Path) -> Head:
    magic, version, tensors, keys = struct.unpack("<4sIQQ", file.read(24))
    if magic != MAGIC or version != VERSION:
        raise InputError(f"{path} is not GGUF of version {VERSION}", next_step="export again, or fetch it again")
    values = {}
    for _ in range(keys):
        name = _string(file)
        values[name] = _value(file, _number(file, "I"))
    places = {}
    for _ in range(tensors):
        name, dimensions = _string(file), _number(file, "I")
        file.read(8 * dimensions + 4)
        places[name] = _number(file, "Q")
    alignment = int(values.get("general.alignment", 32))
    return Head(values, places, -(-file.tell() // alignment) * alignment)


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    count = _number(file, "Q")
    data = file.read(min(count, _MOST_BYTES))
    if len(data) != count:
        raise ValueError("a text is cut")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _SCALARS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _SCALARS:
        size = struct.calcsize(f"<{_SCALARS[inner]}")
        data = file.read(min(size * count, _MOST_BYTES))
        kept = min(count, _LONGEST_KEPT)
        return list(struct.unpack(f"<{kept}{_SCALARS[inner]}", data[: size * kept]))
    found = []
    for k in range(count):
        item = _value(file, inner)
        if k < _LONGEST_KEPT:
            found.append(item)
    return found
