"""bitsandbytes folders as transformers saves them: NF4 and FP4 with and without double quantization, and Int8.

Tensors of one linear (their meaning is in `qwen_quant/bnb.py`):

    4 bit   NAME.weight and beside it .absmax, .quant_map, .quant_state.bitsandbytes__nf4 or __fp4, and with double
            quantization .nested_absmax, .nested_quant_map. The state is JSON in a uint8 tensor: quant_type, blocksize,
            dtype, shape and, nested, nested_blocksize, nested_dtype, nested_offset.
    8 bit   NAME.weight int8, NAME.SCB, and mostly NAME.weight_format, 0 for plain rows. A routed expert's weight is
            stored as one column, [out * in, 1]; its SCB has `out` values.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_quant.bnb import NestedAbsmax, blocks_of, dequantize_4bit, dequantize_int8, is_expert
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError

QUANT_TYPES = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_REFETCH = "fetch or make the folder again"


@dataclass(frozen=True)
class BnbFormat:
    """What quantization_config promises: quant_type "nf4", "fp4" or "int8", and whether absmax is quantized too."""

    quant_type: str
    double_quant: bool

    @property
    def kind(self) -> str:
        """The format in words, for reports."""
        return f"bitsandbytes {self.quant_type}" + (" double quant" if self.double_quant else "")


@dataclass(frozen=True)
class _State:
    """The parsed quant_state of one 4-bit weight; nested_blocksize is 0 without double quantization."""

    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int
    nested_offset: float


def bnb_format(folder: object, settings: dict[str, Any]) -> BnbFormat:
    """The format of a folder with these quantization settings (quant_method "bitsandbytes").

    Errors: InputError when they say neither or both of 4 and 8 bit, or an unknown 4-bit type; `folder` is named in it.
    """
    four, eight = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
    if four == eight:
        raise InputError(
            f"{folder}: quantization_config does not say whether it is 4 or 8 bit",
            f"load_in_4bit is {four} and load_in_8bit is {eight}",
            "fetch config.json again",
        )
    if eight:
        return BnbFormat("int8", double_quant=False)
    quant_type = settings.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in QUANT_TYPES:
        raise InputError(f"{folder} has bnb_4bit_quant_type {quant_type!r}", f"known types: {', '.join(QUANT_TYPES)}")
    return BnbFormat(quant_type, bool(settings.get("bnb_4bit_use_double_quant")))


class BnbLinears:
    """The packed linears of a bitsandbytes folder.

    Attributes:
        format: as config.json says it.
        kind: "bitsandbytes nf4", "bitsandbytes nf4 double quant", "bitsandbytes int8" and so on.

    Errors: InputError when no tensor is packed: a loader would quantize such a folder on the fly, and what is measured
    here would not be what runs.
    """

    def __init__(self, reader: CheckpointReader, stored: BnbFormat) -> None:
        self.reader, self.format, self.kind = reader, stored, stored.kind
        mark = ".SCB" if stored.quant_type == "int8" else ".weight.absmax"
        if not any(name.endswith(mark) for name in reader.names):
            raise InputError(
                f"{reader.folder} says it is {self.kind}, but none of its tensors is packed",
                f"no tensor ends in {mark}",
                "give the folder that save_pretrained wrote after quantization, or remove quantization_config",
            )

    def base_of(self, name: str) -> str | None:
        """The linear (without suffix) that holds weight `name` packed, or None when it is stored plainly."""
        base = name.removesuffix(".weight")
        if name not in self.reader:
            return None
        packed = self.reader.info(name).dtype not in _FLOATS or any(
            part in self.reader for part in (f"{name}.absmax", f"{base}.SCB")
        )
        return base if packed else None

    def parts(self, name: str) -> set[str]:
        """Names of the tensors that may stand beside weight `name`."""
        base = name.removesuffix(".weight")
        if self.format.quant_type == "int8":
            return {f"{base}.SCB", f"{base}.weight_format"}
        beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in QUANT_TYPES))
        return {f"{name}.{part}" for part in beside}

    def shape(self, base: str) -> tuple[int, int]:
        """(out_features, in_features) of linear `base`, from its state alone."""
        if self.format.quant_type != "int8":
            return self._state(f"{base}.weight").shape
        return self._shape_int8(base)

    def dense(self, base: str) -> Tensor:
        """FP32 [out, in] of linear `base`, exactly. Errors: InputError for a tensor that is missing or misshapen."""
        return self._dense_int8(base) if self.format.quant_type == "int8" else self._dense_4bit(f"{base}.weight")

    def _tensor(self, name: str, count: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Flat tensor `name` of `count` values in one of `dtypes` (InputError otherwise)."""
        if name not in self.reader:
            raise InputError(f"{self.reader.folder} lacks the tensor '{name}'", f"it is {self.kind}", _REFETCH)
        info = self.reader.info(name)
        if math.prod(info.shape) != count or info.dtype not in dtypes:
            raise InputError(
                f"{self.reader.folder}: '{name}' is {info.dtype} {info.shape}",
                f"{count} values of {' or '.join(map(str, dtypes))} are needed",
                _REFETCH,
            )
        return self.reader.read(name).flatten()

    def _shape_int8(self, base: str) -> tuple[int, int]:
        """(out, in) of an 8-bit linear (InputError when its codes are no int8 matrix, or no multiple of its SCB)."""
        name, rows = f"{base}.weight", 0
        info = self.reader.info(name)
        if info.dtype != torch.int8 or len(info.shape) != 2:
            raise InputError(
                f"{self.reader.folder}: '{name}' is {info.dtype} {info.shape}", "an int8 matrix is needed", _REFETCH
            )
        if not is_expert(base):
            return info.shape[0], info.shape[1]
        if f"{base}.SCB" in self.reader:
            rows = math.prod(self.reader.info(f"{base}.SCB").shape)
        if not rows or math.prod(info.shape) % rows:
            raise InputError(
                f"{self.reader.folder}: '{name}' holds {math.prod(info.shape)} codes",
                f"'{base}.SCB' has {rows} values, one for each row",
                _REFETCH,
            )
        return rows, math.prod(info.shape) // rows

    def _dense_int8(self, base: str) -> Tensor:
        name, format_name, shape = f"{base}.weight", f"{base}.weight_format", self._shape_int8(base)
        if format_name in self.reader and bool(self.reader.read(format_name).any()):
            raise InputError(
                f"{self.reader.folder}: '{name}' is laid out for one GPU kernel",
                "weight_format is not 0 (plain rows)",
                "save it again with a current bitsandbytes",
            )
        scb = self._tensor(f"{base}.SCB", shape[0], _FLOATS)
        return dequantize_int8(self.reader.read(name).view(shape), scb)

    def _dense_4bit(self, name: str) -> Tensor:
        state = self._state(name)
        blocks = blocks_of(state.shape, state.blocksize)
        info = self.reader.info(name)
        if info.nbytes != math.ceil(math.prod(state.shape) / 2):
            raise InputError(
                f"{self.reader.folder}: '{name}' holds {info.nbytes} bytes",
                f"its state says shape {state.shape}, two values a byte",
                _REFETCH,
            )
        nested = None
        if state.nested_blocksize:
            outer = math.ceil(blocks / state.nested_blocksize)
            nested = NestedAbsmax(
                self._tensor(f"{name}.nested_absmax", outer, _FLOATS),
                self._tensor(f"{name}.nested_quant_map", 256, _FLOATS),
                state.nested_blocksize,
                state.nested_offset,
            )
        absmax = self._tensor(f"{name}.absmax", blocks, (torch.uint8,) if nested else _FLOATS)
        quant_map = self._tensor(f"{name}.quant_map", 16, _FLOATS)
        return dequantize_4bit(self.reader.read(name), absmax, quant_map, state.blocksize, state.shape, nested=nested)

    def _state(self, name: str) -> _State:
        """The quant_state of weight `name` (InputError when it is absent, damaged or of another type)."""
        folder, key = self.reader.folder, f"{name}.{_STATE}{self.format.quant_type}"
        if key not in self.reader:
            raise InputError(
                f"{folder} lacks the tensor '{key}'",
                f"config.json says that its linears are {self.kind}",
                "check that config.json belongs to these weights",
            )
        try:
            values = json.loads(bytes(self.reader.read(key).view(torch.uint8).tolist()))
            nested = int(values["nested_blocksize"]) if f"{name}.nested_absmax" in self.reader else 0
            offset = float(values["nested_offset"]) if nested else 0.0
            out_features, in_features = (int(size) for size in values["shape"])
            state = _State(int(values["blocksize"]), (out_features, in_features), nested, offset)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: '{key}' cannot be read", str(error), _REFETCH) from error
        if state.blocksize < 2 or state.blocksize % 2 or nested < 0 or min(state.shape) < 1:
            raise InputError(f"{folder}: '{key}' holds impossible sizes", str(values), _REFETCH)
        return state
