"""GPTQ folders: the packed linears of one written by this package, or of a published one in the same layout.

checkpoint_format is "gptq" (also when absent: the format is older than the field) or "gptq_v2".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import SUFFIXES, WORD_BITS, packed_specs, unpack_weight
from qwen_quant.recipe import BITS, CHECKPOINT_FORMATS

_CHUNK_VALUES = 1 << 23
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedFormat:
    """How a folder's linears are packed: bits, and the convention of its zeros ("gptq" or "gptq_v2")."""

    bits: int
    checkpoint_format: str


def packed_format(folder: object, settings: dict[str, Any]) -> PackedFormat:
    """How a folder with these quantization settings (quant_method "gptq") is packed; `folder` is named in errors.

    Errors: InputError for another layout, unknown bits, or settings per module.
    """
    bits = settings.get("bits")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    step = "give a GPTQ folder (checkpoint_format gptq or gptq_v2) or a 16-bit checkpoint"
    if layout not in CHECKPOINT_FORMATS or settings.get("is_marlin_format"):
        raise InputError(f"{folder} has checkpoint_format {layout!r}", "its codes are laid out for one kernel", step)
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{folder}: quantization_config has bits {bits!r}", f"known widths: {BITS}", step)
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(dynamic.values()):  # empty values only name what is not quantized
        raise InputError(f"{folder} gives modules settings of their own ('dynamic')", "one width for all is read", step)
    return PackedFormat(bits, layout)


def dequantized_by_rows(quantized: QuantizedWeight) -> Tensor:
    """FP32 [out, in] as `QuantizedWeight.dequantized`, made in row chunks so that temporaries stay near 100 MiB."""
    out_features, in_features = quantized.codes.shape
    result = torch.empty(out_features, in_features)
    step = max(1, _CHUNK_VALUES // max(in_features, 1))
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        part = QuantizedWeight(quantized.codes[rows], quantized.scales[rows], quantized.zeros[rows], quantized.g_idx)
        result[rows] = part.dequantized()
    return result


class GptqLinears:
    """The packed linears of a GPTQ folder.

    Attributes:
        packed: how they are packed.
        kind: "gptq 4 bit" and so on.
    """

    def __init__(self, reader: CheckpointReader, packed: PackedFormat) -> None:
        self.reader, self.packed = reader, packed
        self.kind = f"gptq {packed.bits} bit"

    def base_of(self, name: str) -> str | None:
        """The linear (without suffix) whose packed tensors stand for weight `name`, or None when it is stored plainly.

        Errors: InputError when the folder holds both, so that nobody can tell which one is meant.
        """
        base = name.removesuffix(".weight")
        if not any(f"{base}.{suffix}" in self.reader for suffix in SUFFIXES):
            return None
        if name in self.reader:
            raise InputError(
                f"{self.reader.folder} holds '{name}' both packed and plain",
                next_step="fetch or write the artifact again",
            )
        return base

    def dense(self, base: str) -> Tensor:
        """FP32 [out, in] of linear `base`, exactly. Errors: as `quantized`."""
        return dequantized_by_rows(self.quantized(base))

    def parts(self, name: str) -> set[str]:
        """Names of the tensors that may stand for weight `name`.

        A bias of zeros is one of them: AutoGPTQ of 2023 wrote one for every packed linear, wanted by the model or not.
        """
        base = name.removesuffix(".weight")
        found, bias = {f"{base}.{suffix}" for suffix in SUFFIXES}, f"{base}.bias"
        if f"{base}.qweight" in self.reader and bias in self.reader and not bool(self.reader.read(bias).any()):
            found.add(bias)
        return found

    def quantized(self, base: str) -> QuantizedWeight:
        """The codes and grid of linear `base`. Errors: InputError for a tensor that is missing or misshapen."""
        tensors = {}
        for suffix in SUFFIXES:
            if f"{base}.{suffix}" not in self.reader:
                raise InputError(
                    f"{self.reader.folder} lacks the tensor '{base}.{suffix}'",
                    "a GPTQ linear is qweight, qzeros, scales and g_idx",
                    "fetch the artifact again",
                )
            tensors[suffix] = self.reader.read(f"{base}.{suffix}")
        self._check(base, tensors)
        weight = unpack_weight(tensors, self.packed.bits, self.packed.checkpoint_format)
        if self.packed.checkpoint_format == "gptq" and not bool(weight.zeros.all()):
            logger.warning("%s has zeros of 0, which readers of the gptq format understand differently", base)
        return weight

    def _check(self, base: str, tensors: dict[str, Tensor]) -> None:
        """Shapes and dtypes fit each other and the settings (InputError otherwise)."""
        folder, bits = self.reader.folder, self.packed.bits
        qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors["g_idx"]
        step = "check that quantization_config belongs to these weights"
        if qweight.dim() != 2 or scales.dim() != 2 or g_idx.dim() != 1:
            raise InputError(f"{folder}: the packed tensors of '{base}' are not matrices", next_step=step)
        in_features = qweight.shape[0] * WORD_BITS // bits
        specs = packed_specs(in_features, qweight.shape[1], bits, -1)
        groups = scales.shape[0]
        for suffix, (dtype, shape) in specs.items():
            expected = (groups, *shape[1:]) if suffix in ("qzeros", "scales") else shape
            right = tensors[suffix].dtype in (_SCALE_DTYPES if suffix == "scales" else (dtype,))
            if tuple(tensors[suffix].shape) != expected or not right:
                raise InputError(
                    f"{folder}: '{base}.{suffix}' is {tensors[suffix].dtype} {tuple(tensors[suffix].shape)}",
                    f"{dtype} {expected} is needed at {bits} bits",
                    step,
                )
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise InputError(f"{folder}: '{base}.g_idx' names a group outside 0..{groups - 1}", next_step=step)
