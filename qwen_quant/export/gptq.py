"""GPTQ folders in both directions: `checkpoint_format` "gptq" (zero - 1 in qzeros) and "gptq_v2" (zero).

The layout is that of `packing.py`: qweight int32 [in * bits / 32, out] is `PackedRows.stream`, seen as 32-bit words and
transposed; qzeros, scales and g_idx are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.export.pivot import LinearGrid
from qwen_quant.packing import SUFFIXES, WORD_BITS, _unpack_rows, packed_specs
from qwen_quant.runtime.gptq_folder import packed_format

_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHECK_STEP = "check that quantization_config belongs to these weights"


class GptqLayout:
    """Reads the linears of a GPTQ folder (see `source.Layout`)."""

    def __init__(self, reader: CheckpointReader, settings: dict[str, Any]) -> None:
        packed = packed_format(reader.folder, settings)
        self.reader, self.bits, self.kind = reader, packed.bits, packed.checkpoint_format

    def suffixes(self, base: str) -> tuple[str, ...]:
        """The four of `packing.SUFFIXES`, or none. Errors: InputError when some of them are missing."""
        there = [suffix for suffix in SUFFIXES if f"{base}.{suffix}" in self.reader]
        if there and len(there) < len(SUFFIXES):
            absent = next(suffix for suffix in SUFFIXES if suffix not in there)
            raise InputError(
                f"{self.reader.folder} lacks the tensor '{base}.{absent}'",
                "a GPTQ linear is qweight, qzeros, scales and g_idx",
                "fetch the artifact again",
            )
        return tuple(there)

    def shape(self, base: str) -> tuple[int, int]:
        """(out, in), with every header checked against the others."""
        infos = {suffix: self.reader.info(f"{base}.{suffix}") for suffix in SUFFIXES}
        qweight, scales = infos["qweight"].shape, infos["scales"].shape
        if len(qweight) != 2 or len(scales) != 2:
            raise InputError(
                f"{self.reader.folder}: the packed tensors of '{base}' are not matrices", next_step=_CHECK_STEP
            )
        in_features = qweight[0] * WORD_BITS // self.bits
        for suffix, (dtype, shape) in packed_specs(in_features, qweight[1], self.bits, -1).items():
            expected = (scales[0], *shape[1:]) if suffix in ("qzeros", "scales") else shape
            info = infos[suffix]
            if info.shape != expected or info.dtype not in (_SCALE_DTYPES if suffix == "scales" else (dtype,)):
                raise InputError(
                    f"{self.reader.folder}: '{base}.{suffix}' is {info.dtype} {info.shape}",
                    f"{dtype} {expected} is needed at {self.bits} bits",
                    _CHECK_STEP,
                )
        return qweight[1], in_features

    def grid(self, base: str) -> LinearGrid:
        """Scales, zeros and g_idx of `base` (InputError for a g_idx out of range)."""
        scales, g_idx = self.reader.read(f"{base}.scales"), self.reader.read(f"{base}.g_idx")
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= scales.shape[0]:
            raise InputError(
                f"{self.reader.folder}: '{base}.g_idx' names a group outside 0..{scales.shape[0] - 1}",
                next_step=_CHECK_STEP,
            )
        zeros = _unpack_rows(self.reader.read(f"{base}.qzeros"), self.bits)
        if self.kind == "gptq":
            zeros = (zeros + 1) & (2**self.bits - 1)
        return LinearGrid(scales.mT.contiguous(), zeros.mT.contiguous(), g_idx)

    def stream(self, base: str) -> Tensor:
        """Packed codes of `base` row by row."""
        return self.reader.read(f"{base}.qweight").mT.contiguous().view(torch.uint8)
