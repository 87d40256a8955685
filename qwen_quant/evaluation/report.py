"""report.json (schema `qwen-quant/report/2`, every field in docs/report.md) and report.html, written and read back.

JSON knows neither NaN nor infinity: such a number is the string "NaN", "Infinity" or "-Infinity". So null means only
"not measured", and a report reads back as the result it was written from. Reading is strict: every key of the schema
must be there with its type, and no other.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from qwen_quant.errors import InputError
from qwen_quant.evaluation.report_html import render_html
from qwen_quant.results import LayerStats, ValidationResult, to_json

SCHEMA = "qwen-quant/report/2"
JSON_FILE = "report.json"
HTML_FILE = "report.html"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEXT_STEP = "give the report.json that qwen-quant validate wrote, or run it again"
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

logger = logging.getLogger(__name__)


def write_report(
    result: ValidationResult, folder: Path, layers: Sequence[LayerStats] | None = None
) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder` (made where missing), each replaced as a whole.

    Args:
        result: what was measured.
        folder: where to write.
        layers: per-layer statistics of the artifact for the page; None: `layers_of` the quantized folder.

    Returns:
        (path of report.json, path of report.html). The JSON is in place before the page is made.

    Errors: InputError when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} cannot hold a report", "it is not a folder", "give another folder") from error
    report, page = folder / JSON_FILE, folder / HTML_FILE
    _replace(report, report_text(result).encode("utf-8"))
    known = layers_of(Path(result.quantized)) if layers is None else layers
    _replace(page, render_html(result, known).encode("utf-8", "backslashreplace"))
    return report, page


def report_text(result: ValidationResult) -> str:
    """The text of report.json: UTF-8 JSON, two spaces of indent, keys in the order of docs/report.md."""
    document = {"schema": SCHEMA, **_without_non_finite(to_json(result))}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path that is not UTF-8 holds lone surrogates, which JSON can only hold as escapes.
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def read_report(path: Path) -> ValidationResult:
    """The result that a report.json holds, equal to what was written.

    Errors: InputError naming the file, and the key where there is one, when it is missing, is not JSON, has another
    schema, lacks a key, has one too many, or a value of the wrong type.
    """
    document = _load(path)
    if document.get("schema") != SCHEMA:
        found = f"its schema is {document['schema']!r}" if "schema" in document else "it has no key 'schema'"
        raise InputError(f"{path} is not a report", f"{found}, this version reads {SCHEMA!r}", _NEXT_STEP)
    fields = {key: value for key, value in document.items() if key != "schema"}
    try:
        result: ValidationResult = _decode_object(ValidationResult, fields, "")
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged", str(error), _NEXT_STEP) from error
    return result


def layers_of(folder: Path) -> tuple[LayerStats, ...]:
    """Per-layer statistics that this tool's `gptq` wrote into `folder`'s qwen-quant.json; seconds is 0, it is not kept.

    () where there are none: not a local folder, or another tool's artifact. A manifest that cannot be read is logged
    as a warning and gives () too: it must not cost a finished validation its report.
    """
    from qwen_quant.checkpoint.manifest import MANIFEST_FILE  # imports torch, which reading a report does not need

    path = folder / MANIFEST_FILE
    if not path.is_file():
        return ()
    try:
        found = _load(path).get("layers", [])
        absent = {"seconds": 0.0, "routed_tokens": None, "calibrated_by": None}  # which not every layer has
        return tuple(_decode_tuple((LayerStats, ...), [{**absent, **layer} for layer in found], "layers"))
    except (InputError, TypeError, ValueError, OverflowError) as error:
        logger.warning("the report has no per-layer plot: %s: %s", path, error)
        return ()


def _replace(path: Path, data: bytes) -> None:
    """Write beside `path`, make it durable, rename: `path` is always either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except IsADirectoryError as error:
        raise InputError(f"{path} cannot be written", "it is a folder", "remove it or give another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _without_non_finite(value: Any) -> Any:
    """The same JSON value with every NaN and infinity as its name."""
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _load(path: Path) -> dict[str, Any]:
    """The JSON object in a file (InputError when there is none)."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read", "no such file", _NEXT_STEP) from error
    except IsADirectoryError as error:
        raise InputError(f"{path} cannot be read", "it is a folder", f"give {path / JSON_FILE}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read", str(error.strerror), _NEXT_STEP) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", str(error), _NEXT_STEP) from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a report", "it does not hold a JSON object", _NEXT_STEP)
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _decode_object(kind: type, value: Any, place: str) -> Any:
    """A dataclass of results.py from its JSON object (ValueError naming the key below `place`)."""
    if not isinstance(value, dict):
        raise ValueError(f"key '{place}' is not an object")
    hints, prefix = get_type_hints(kind), f"{place}." if place else ""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in value:
            raise ValueError(f"key '{prefix}{name}' is missing")
    for name in value:
        if name not in hints:
            raise ValueError(f"key '{prefix}{name}' does not belong to the schema")
    return kind(**{name: _decode(hints[name], value[name], f"{prefix}{name}") for name in names})


def _decode(kind: Any, value: Any, place: str) -> Any:
    """`value` as the annotated type `kind` of results.py (ValueError naming `place`)."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, place)  # type: ignore[arg-type]  # an instance never gets here
    if origin is UnionType:
        return None if value is None else _decode(get_args(kind)[0], value, place)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, place)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"key '{place}' is not an object")
        return {key: _decode(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}
    return _decode_scalar(kind, value, place)


def _decode_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    """tuple[X, ...] or tuple[X, Y] from a JSON array."""
    if not isinstance(value, list):
        raise ValueError(f"key '{place}' is not an array")
    each = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
    if len(each) != len(value):
        raise ValueError(f"key '{place}' holds {len(value)} values instead of {len(each)}")
    return tuple(_decode(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(zip(each, value, strict=True)))


def _decode_scalar(kind: type, value: Any, place: str) -> Any:
    """str, int, float or bool. A float may be written as 1 or be the name of what is not finite; true is no number."""
    if kind is float and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"key '{place}' is {json.dumps(value)[:60]}, not {_WORDS[kind]}")
    return value
