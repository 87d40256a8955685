"""AWQ folders (version "gemm", 4 bits) in both directions.

Tensors of one linear [out, in] with G groups of consecutive columns:

    qweight  int32 [in, out / 8]    nibble i (from the low end) of word b of row r is the code of column r, output
    qzeros   int32 [G, out / 8]     8b + ORDER[i]; zeros likewise, as they are (no minus one)
    scales   FP16  [G, out]

There is no g_idx, so act-order has no place here.  Codes run along the outputs, those of `PackedRows` along the inputs:
an 8 x 8 block of nibbles is transposed by three rounds of masked swaps on whole words, without unpacking.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant import __version__
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.export import checks
from qwen_quant.export.folder import (
    REST_DTYPES,
    Encoding,
    Specs,
    plain_modules,
    plan_folder,
    read_folder,
    write_config,
    write_weights,
)
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target
from qwen_quant.export.pivot import LinearGrid, PackedRows, consecutive_groups, pack_codes, unpack_codes
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
_WORD_CODES = 8
_CHUNK_WORDS = 1 << 18
_MASKS = {4: 0x0000FFFF, 2: 0x00FF00FF, 1: 0x0F0F0F0F}


def transpose_nibbles_(planes: Tensor) -> Tensor:
    """Swap nibble k of word j with nibble j of word k, in place: int32 [8, ...], contiguous."""
    for distance, mask in _MASKS.items():
        pairs = planes.view(_WORD_CODES // (2 * distance), 2, distance, -1)
        low, high, shift = pairs[:, 0], pairs[:, 1], 4 * distance
        swapped = (low >> shift).bitwise_xor_(high).bitwise_and_(mask)
        high.bitwise_xor_(swapped)
        low.bitwise_xor_(swapped.bitwise_left_shift_(shift))
    return planes


def qweight_of(stream: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> qweight int32 [in, out / 8]; out and in are multiples of 8."""
    words = stream.view(torch.int32)
    out_words, in_words = words.shape[0] // _WORD_CODES, words.shape[1]
    blocks = words.view(out_words, _WORD_CODES, in_words)
    result = torch.empty(in_words, _WORD_CODES, out_words, dtype=torch.int32)
    for part in _parts(out_words, in_words):
        planes = torch.stack([blocks[part, output] for output in ORDER])
        result[:, :, part] = transpose_nibbles_(planes).permute(2, 0, 1)
    return result.view(in_words * _WORD_CODES, out_words)


def stream_of(qweight: Tensor) -> Tensor:
    """The inverse of `qweight_of`."""
    in_words, out_words = qweight.shape[0] // _WORD_CODES, qweight.shape[1]
    blocks = qweight.view(in_words, _WORD_CODES, out_words)
    result = torch.empty(out_words, _WORD_CODES, in_words, dtype=torch.int32)
    for part in _parts(out_words, in_words):
        planes = transpose_nibbles_(blocks[:, :, part].permute(1, 2, 0).contiguous())
        for plane, output in zip(planes, ORDER, strict=True):
            result[part, output] = plane
    return result.view(out_words * _WORD_CODES, in_words).view(torch.uint8)


def _parts(count: int, width: int) -> list[slice]:
    """Slices of `count` rows of blocks whose planes stay in the cache; each block is 8 words, `width` to a row."""
    step = max(1, _CHUNK_WORDS // (_WORD_CODES * width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def to_awq(weight: PackedRows) -> dict[str, Tensor]:
    """The three tensors of a linear; its groups must be consecutive columns and its scales exact in FP16."""
    zeros = weight.grid.zeros.mT.reshape(-1, weight.shape[0] // _WORD_CODES, _WORD_CODES)[:, :, ORDER]
    return {
        "qweight": qweight_of(weight.stream),
        "qzeros": pack_codes(zeros.flatten(1), BITS).view(torch.int32),
        "scales": weight.grid.scales.half().mT.contiguous(),
    }


def zeros_of(qzeros: Tensor) -> Tensor:
    """uint8 [out, G] of qzeros int32 [G, out / 8]."""
    nibbles = unpack_codes(qzeros.contiguous().view(torch.uint8), BITS).view(qzeros.shape[0], -1, _WORD_CODES)
    zeros = torch.empty_like(nibbles)
    zeros[:, :, ORDER] = nibbles
    return zeros.flatten(1).mT.contiguous()


class AwqLayout:
    """Reads the linears of an AWQ folder (see `source.Layout`).

    Errors: InputError for a version other than gemm, or other bits than 4.
    """

    kind = "awq"
    bits = BITS

    def __init__(self, reader: CheckpointReader, settings: dict[str, Any]) -> None:
        self.reader = reader
        version = str(settings.get("version", "gemm")).lower()
        bits = settings.get("bits", settings.get("w_bit", BITS))
        if version != "gemm" or bits != BITS:
            raise InputError(
                f"{reader.folder} is AWQ of version {version!r} with {bits} bits",
                "only gemm with 4 bits is read here: the others are laid out for one kernel",
                "give a gemm folder",
            )

    def suffixes(self, base: str) -> tuple[str, ...]:
        """The three of SUFFIXES, or none. Errors: InputError when some of them are missing."""
        there = [suffix for suffix in SUFFIXES if f"{base}.{suffix}" in self.reader]
        if there and len(there) < len(SUFFIXES):
            absent = next(suffix for suffix in SUFFIXES if suffix not in there)
            raise InputError(
                f"{self.reader.folder} lacks the tensor '{base}.{absent}'",
                "an AWQ linear is qweight, qzeros and scales",
                "fetch the artifact again",
            )
        return tuple(there)

    def shape(self, base: str) -> tuple[int, int]:
        """(out, in), with every header checked against the others."""
        qweight, qzeros, scales = (self.reader.info(f"{base}.{suffix}") for suffix in SUFFIXES)
        in_features, out_words = qweight.shape if len(qweight.shape) == 2 else (0, 0)
        groups = scales.shape[0] if scales.shape else 0
        right = (
            (qweight.dtype, qzeros.dtype) == (torch.int32, torch.int32)
            and scales.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and qzeros.shape == (groups, out_words)
            and scales.shape == (groups, out_words * _WORD_CODES)
            and groups > 0
            and in_features % (groups * _WORD_CODES) == 0
            and in_features > 0
        )
        if not right:
            raise InputError(
                f"{self.reader.folder}: the packed tensors of '{base}' do not fit together",
                f"qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.dtype} {scales.shape}",
                "check that quantization_config belongs to these weights",
            )
        return out_words * _WORD_CODES, in_features

    def grid(self, base: str) -> LinearGrid:
        """Scales, zeros and g_idx of `base`."""
        scales = self.reader.read(f"{base}.scales").mT.contiguous()
        zeros = zeros_of(self.reader.read(f"{base}.qzeros"))
        return LinearGrid(scales, zeros, consecutive_groups(self.shape(base)[1], scales.shape[1]))

    def stream(self, base: str) -> Tensor:
        """Packed codes of `base` row by row."""
        return stream_of(self.reader.read(f"{base}.qweight"))


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, (BITS,), "AWQ kernels are made for 4 bits"),
        *checks.group_size(source),
        *checks.act_order(source, "AWQ has no g_idx"),
        *checks.ragged(source, "AWQ's groups are equal"),
        *checks.outputs_fill_words(source),
        *checks.fp16_scales(source),
    ]


def _specs(source: ExportSource, name: str) -> Specs:
    out_features, in_features = source.shape(name)
    words, groups = out_features // _WORD_CODES, source.groups(name)
    return {
        "qweight": (torch.int32, (in_features, words)),
        "qzeros": (torch.int32, (groups, words)),
        "scales": (torch.float16, (groups, out_features)),
    }


_ENCODING = Encoding(_specs, lambda source, name: to_awq(source.packed(name)))


def awq_config(source: ExportSource) -> dict[str, Any]:
    """quantization_config as AutoAWQ writes it."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": source.facts.group_size,
        "zero_point": True,
        "modules_to_not_convert": plain_modules(source) or None,
    }


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    return plan_folder(source, options, _ENCODING)


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    write_weights(source, options, _ENCODING, target, progress)
    write_config(source, target.folder, awq_config(source), options.rest)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    return read_folder(folder, source, AwqLayout(CheckpointReader(folder), awq_config(source)))


AWQ = Format(
    name="awq",
    summary="AWQ, version gemm: 4 bits, consecutive groups, symmetric or not",
    runtimes=("vLLM", "transformers + gptqmodel", "GPTQModel", "mlx-lm", "onnxruntime-genai (as input of its builder)"),
    extra="",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"qwen-quant {__version__}",
    rests=tuple(REST_DTYPES),
)
