"""What a checkpoint or artifact folder holds, from its configs and safetensors headers alone: no weight is read.

The accounting is the audit's: every tensor is a linear that is (or can be) quantized, is kept 16-bit by a rule of its
family, or is named as not accounted for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qwen_quant.checkpoint.families import ModelSpec, read_model_spec
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, QUANTIZE_CONFIG_FILE
from qwen_quant.checkpoint.reader import DTYPE_NAMES, CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.packing import SUFFIXES
from qwen_quant.runtime.bnb_folder import BnbLinears, bnb_format

TENSOR_PARALLEL = (2, 4, 8)
MARLIN_IN_MULTIPLE = 128
MARLIN_OUT_MULTIPLE = 64
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one role and dtype: how many, their parameters (0 for packed codes and scales) and bytes."""

    role: str
    dtype: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Linear:
    """One linear to quantize, as found: its tensors, and whether they are packed codes."""

    name: str
    in_features: int
    out_features: int
    quantized: bool
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Accounting:
    """The audit's view: linears by state, kept tensors counted by rule, and what no rule explains."""

    quantized_linears: int
    unquantized_linears: int
    kept: dict[str, int]
    missing: tuple[str, ...]
    unaccounted: tuple[str, ...]


@dataclass(frozen=True)
class ShapeLimit:
    """Linears of one shape that a kernel class or a tensor-parallel split cannot serve, and why."""

    linear: str
    layers: int
    in_features: int
    out_features: int
    target: str
    reason: str


@dataclass(frozen=True)
class InspectResult:
    """Everything `qwen-quant inspect` shows. `group_size` is the artifact's, or the one asked about."""

    path: str
    kind: str
    model_type: str
    num_layers: int
    hidden_size: int
    tied_head: bool
    files: int
    weight_bytes: int
    folder_bytes: int
    parameters: int
    quantized_parameters: int
    classes: tuple[TensorClass, ...]
    quantization: dict[str, Any] | None
    group_size: int
    accounting: Accounting
    limits: tuple[ShapeLimit, ...]
    provenance: dict[str, Any] | None
    layers: tuple[dict[str, Any], ...]


def inspect_path(path: Path, group_size: int = 128) -> InspectResult:
    """Read the configs and headers of `path`; `group_size` is assumed where the folder is not quantized yet.

    Errors: InputError when it is not a checkpoint, not of a known family, or damaged.
    """
    if not path.is_dir():
        reason = "it is a file" if path.exists() else "no such folder"
        raise InputError(f"{path} is not a checkpoint", reason, "give the folder of a checkpoint or artifact")
    spec, reader = read_model_spec(path), CheckpointReader(path)
    quantization = _quantization(path, spec)
    bits = int((quantization or {}).get("bits", 4))
    size = int((quantization or {}).get("group_size", group_size))
    bnb = BnbLinears(reader, bnb_format(path, quantization)) if _is_bnb(quantization) else None
    linears, missing = _linears(spec, reader, bits, bnb)
    manifest = _read_json(path / MANIFEST_FILE)
    packed = sum(linear.in_features * linear.out_features for linear in linears if linear.quantized)
    classes = _classes(spec, reader, linears)
    return InspectResult(
        path=str(path),
        kind="artifact" if quantization is not None else "checkpoint",
        model_type=spec.family.model_type,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        tied_head=spec.tied_head,
        files=len(reader.files),
        weight_bytes=reader.nbytes,
        folder_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        parameters=packed + sum(row.parameters for row in classes),
        quantized_parameters=packed,
        classes=classes,
        quantization=quantization,
        group_size=size,
        accounting=_accounting(spec, reader, linears, missing),
        limits=shape_limits(spec, linears, bits, size) if bnb is None else (),
        provenance={key: value for key, value in manifest.items() if key != "layers"} if manifest else None,
        layers=tuple(manifest.get("layers", ())) if manifest else (),
    )


def _is_bnb(quantization: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    return (quantization or {}).get("quant_method") == "bitsandbytes"


def _quantization(path: Path, spec: ModelSpec) -> dict[str, Any] | None:
    """The quantization settings of config.json, or of quantize_config.json where that is all there is."""
    settings = spec.config.get("quantization_config") or _read_json(path / QUANTIZE_CONFIG_FILE)
    return settings if isinstance(settings, dict) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None when the file is absent (InputError when it is damaged)."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", str(error), "fetch or make the folder again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object", next_step="fetch or make the folder again")
    return value


def _linears(
    spec: ModelSpec, reader: CheckpointReader, bits: int, bnb: BnbLinears | None
) -> tuple[tuple[Linear, ...], tuple[str, ...]]:
    """(linears found, names of those that are absent or packed incompletely)."""
    found, missing = [], []
    for name in spec.linear_names():
        weight = f"{name}.weight"
        if bnb is not None and bnb.base_of(weight) is not None:
            out_features, in_features = bnb.shape(name)
            tensors = (weight, *(part for part in sorted(bnb.parts(weight)) if part in reader))
            found.append(Linear(name, in_features, out_features, True, tensors))
        elif weight in reader and len(reader.info(weight).shape) == 2:
            out_features, in_features = reader.info(weight).shape
            found.append(Linear(name, in_features, out_features, False, (weight,)))
        elif all(f"{name}.{part}" in reader for part in SUFFIXES):
            words, out_features = reader.info(f"{name}.qweight").shape
            tensors = tuple(f"{name}.{part}" for part in SUFFIXES)
            found.append(Linear(name, words * 32 // bits, out_features, True, tensors))
        else:
            missing.append(name)
    return tuple(found), tuple(missing)


def _role(spec: ModelSpec, name: str, linears: dict[str, Linear]) -> str:
    base, _, part = name.rpartition(".")
    if name in linears:
        return f"linears: {name.removeprefix(linears[name].name + '.')}"
    if base == spec.family.embedding:
        return "embedding"
    if base == spec.family.head:
        return "output head"
    if part == "bias":
        return "biases"
    return "normalization" if "normalization" in (spec.keep_reason(name) or "") else "other"


def _classes(spec: ModelSpec, reader: CheckpointReader, linears: tuple[Linear, ...]) -> tuple[TensorClass, ...]:
    owners = {name: linear for linear in linears for name in linear.tensors}
    rows: dict[tuple[str, str], list[int]] = {}
    for name in reader.names:
        info, role = reader.info(name), _role(spec, name, owners)
        packed = name in owners and owners[name].quantized
        row = rows.setdefault((role, DTYPE_NAMES[info.dtype]), [0, 0, 0])
        row[0] += 1
        row[1] += 0 if packed else math.prod(info.shape)
        row[2] += info.nbytes
    return tuple(TensorClass(role, dtype, *row) for (role, dtype), row in sorted(rows.items()))


def _accounting(
    spec: ModelSpec, reader: CheckpointReader, linears: tuple[Linear, ...], missing: tuple[str, ...]
) -> Accounting:
    explained = {name for row in linears for name in row.tensors}
    reasons = {name: spec.keep_reason(name) for name in reader.names if name not in explained}
    kept = Counter(reason for reason in reasons.values() if reason is not None)
    quantized = sum(row.quantized for row in linears)
    unaccounted = tuple(name for name, reason in reasons.items() if reason is None)
    return Accounting(quantized, len(linears) - quantized, dict(kept), missing, unaccounted)


def shape_limits(spec: ModelSpec, linears: tuple[Linear, ...], bits: int, group_size: int) -> tuple[ShapeLimit, ...]:
    """Which linears Marlin-class kernels or tensor parallelism 2/4/8 cannot take at `group_size`.

    Marlin-class kernels need in_features % 128 == 0, out_features % 64 == 0 and whole groups. A tensor-parallel split
    of a linear that ends a sub-block (o_proj, down_proj) cuts its inputs, which must fall on group boundaries; the
    others are cut along their outputs, which must fall on whole 32-bit words of qzeros.
    """
    row_parallel = spec.row_parallel()
    found: Counter[tuple[str, int, int, str, str]] = Counter()
    for row in linears:
        short = _BLOCK_NUMBER.split(row.name, maxsplit=1)[-1]
        marlin = "; ".join(_marlin_problems(row, group_size))
        problems = [("Marlin", marlin)] if marlin else []
        for ranks in TENSOR_PARALLEL:
            reason = _split_problem(row, ranks, bits, group_size, cut_inputs=short in row_parallel)
            problems += [(f"tensor parallelism {ranks}", reason)] if reason else []
        kind = _EXPERT_NUMBER.sub(".experts.*.", short)
        found.update((kind, row.in_features, row.out_features, target, reason) for target, reason in problems)
    limits = [
        ShapeLimit(short, count, inputs, outputs, target, reason)
        for (short, inputs, outputs, target, reason), count in found.items()
    ]
    return tuple(sorted(limits, key=lambda limit: (limit.linear, limit.target)))


def _marlin_problems(row: Linear, group_size: int) -> list[str]:
    problems = []
    if row.in_features % MARLIN_IN_MULTIPLE:
        problems.append(f"in_features {row.in_features} is not a multiple of {MARLIN_IN_MULTIPLE}")
    if row.out_features % MARLIN_OUT_MULTIPLE:
        problems.append(f"out_features {row.out_features} is not a multiple of {MARLIN_OUT_MULTIPLE}")
    if group_size > 0 and row.in_features % group_size:
        problems.append(f"in_features {row.in_features} leaves a short last group of {row.in_features % group_size}")
    return problems


def _split_problem(row: Linear, ranks: int, bits: int, group_size: int, *, cut_inputs: bool) -> str:
    """Why `row` cannot be cut into `ranks` parts ("" when it can)."""
    words = 32 // math.gcd(32, bits)
    if cut_inputs:
        unit, what, size = (group_size if group_size > 0 else words), "in_features", row.in_features
        name = f"group_size {group_size}" if group_size > 0 else "whole 32-bit words"
    else:
        unit, what, size, name = words, "out_features", row.out_features, "whole 32-bit words"
    return "" if size % (ranks * unit) == 0 else f"{what} {size} / {ranks} does not fall on {name}"
