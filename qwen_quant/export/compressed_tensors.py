"""compressed-tensors folders (format "pack-quantized", 4 or 8 bits) in both directions.

Tensors of one linear [out, in] with G groups:

    weight_packed      int32 [out, in * bits / 32]    exactly `PackedRows.stream` as 32-bit words
    weight_scale       [out, G]                       FP16 here, often BF16 in published folders
    weight_shape       int64 [2]                      (out, in)
    weight_zero_point  int32 [out * bits / 32, G]     packed along the outputs; only in asymmetric folders
    weight_g_idx       int32 [in]                     only in folders with actorder "group", which runtimes have dropped

Codes and zeros are the library's signed values plus 2^(bits-1), which is what the codes of this package are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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

BITS = (4, 8)
FORMAT = "pack-quantized"
_NEEDED = ("weight_packed", "weight_scale", "weight_shape")
_OPTIONAL = ("weight_zero_point", "weight_g_idx")
_WORD_BITS = 32
_ASYM_NOTE = (
    "transformers 5.23 with compressed-tensors 0.18 loads asymmetric folders only with dequantize=True; vLLM loads them"
)


def to_compressed(weight: PackedRows, *, sym: bool) -> dict[str, Tensor]:
    """The three tensors of a linear, four when it is not symmetric; groups must be consecutive columns.

    Outputs that do not fill the last word of weight_zero_point are followed by zeros, as the library pads them.
    """
    tensors = {
        "weight_packed": weight.stream.view(torch.int32),
        "weight_scale": weight.grid.scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not sym:
        per_word = _WORD_BITS // weight.bits
        zeros = torch.nn.functional.pad(weight.grid.zeros.mT, (0, -weight.shape[0] % per_word))
        tensors["weight_zero_point"] = pack_codes(zeros, weight.bits).view(torch.int32).mT.contiguous()
    return tensors


def _weights_settings(folder: object, settings: dict[str, Any]) -> dict[str, Any]:
    """The "weights" object of the one config group (InputError for several, or another format)."""
    groups = settings.get("config_groups")
    rows = list(groups.values()) if isinstance(groups, dict) else []
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("weights"), dict)]
    step = "give a compressed-tensors folder of weight-only Int4 or Int8 (W4A16, W8A16)"
    if not rows:
        raise InputError(f"{folder} says nothing about its weights", "config_groups has no 'weights'", step)
    first: dict[str, Any] = rows[0]["weights"]
    if any(row["weights"].get("num_bits") != first.get("num_bits") for row in rows):
        raise InputError(f"{folder} has linears of different bits", "one width for all is read here", step)
    formats = {row.get("format") or settings.get("format") for row in rows}
    if formats != {FORMAT} or first.get("type", "int") != "int" or any(row.get("input_activations") for row in rows):
        what = f"{folder} is compressed-tensors of format {', '.join(sorted(map(str, formats)))}"
        raise InputError(what, f"only {FORMAT} integers with 16-bit activations are read here", step)
    return first


class CompressedLayout:
    """Reads the linears of a compressed-tensors folder (see `source.Layout`).

    Errors: InputError for another format than pack-quantized, other bits than 4 or 8, or several widths.
    """

    kind = "compressed-tensors"

    def __init__(self, reader: CheckpointReader, settings: dict[str, Any]) -> None:
        weights = _weights_settings(reader.folder, settings)
        bits = weights.get("num_bits")
        if type(bits) is not int or bits not in BITS:
            raise InputError(
                f"{reader.folder}: num_bits is {bits!r}", f"known widths: {BITS}", "give a folder of one of them"
            )
        self.reader, self.bits = reader, bits

    def suffixes(self, base: str) -> tuple[str, ...]:
        """Suffixes of the stored tensors of `base`. Errors: InputError when some of them are missing."""
        there = [suffix for suffix in (*_NEEDED, *_OPTIONAL) if f"{base}.{suffix}" in self.reader]
        absent = [suffix for suffix in _NEEDED if suffix not in there]
        if there and absent:
            raise InputError(
                f"{self.reader.folder} lacks the tensor '{base}.{absent[0]}'",
                "a pack-quantized linear is weight_packed, weight_scale and weight_shape",
                "fetch the artifact again",
            )
        return tuple(there)

    def shape(self, base: str) -> tuple[int, int]:
        """(out, in), with every header checked against the others."""
        packed, scale = self.reader.info(f"{base}.weight_packed"), self.reader.info(f"{base}.weight_scale")
        out_features, in_features = (int(size) for size in self.reader.read(f"{base}.weight_shape").flatten()[:2])
        zero = f"{base}.weight_zero_point"
        groups = scale.shape[1] if len(scale.shape) == 2 else 0
        words = -(-out_features * self.bits // _WORD_BITS)
        right = (
            packed.dtype == torch.int32
            and packed.shape == (out_features, in_features * self.bits // _WORD_BITS)
            and in_features * self.bits % _WORD_BITS == 0
            and scale.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and scale.shape[0] == out_features
            and groups > 0
            and in_features % groups == 0
            and (zero not in self.reader or self.reader.info(zero).shape == (words, groups))
        )
        if not right:
            raise InputError(
                f"{self.reader.folder}: the packed tensors of '{base}' do not fit together",
                f"weight_packed {packed.shape}, weight_scale {scale.dtype} {scale.shape}, "
                f"weight_shape ({out_features}, {in_features})",
                "check that quantization_config belongs to these weights",
            )
        return out_features, in_features

    def grid(self, base: str) -> LinearGrid:
        """Scales, zeros and g_idx of `base`."""
        out_features, in_features = self.shape(base)
        scales = self.reader.read(f"{base}.weight_scale")
        zeros = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        if f"{base}.weight_zero_point" in self.reader:
            words = self.reader.read(f"{base}.weight_zero_point").mT.contiguous()
            zeros = unpack_codes(words.view(torch.uint8), self.bits)[:, :out_features].mT.contiguous()
        g_idx = consecutive_groups(in_features, scales.shape[1])
        if f"{base}.weight_g_idx" in self.reader:
            stored = self.reader.read(f"{base}.weight_g_idx").to(torch.int32)
            g_idx = g_idx if bool((stored < 0).any()) else stored
        return LinearGrid(scales, zeros, g_idx)

    def stream(self, base: str) -> Tensor:
        """Packed codes of `base` row by row."""
        return self.reader.read(f"{base}.weight_packed").view(torch.uint8)


def _check(source: ExportSource) -> list[Inexact]:
    return [
        *checks.bits(source, BITS, "pack-quantized kernels are made for 4 and 8 bits"),
        *checks.group_size(source),
        *checks.act_order(source, "compressed-tensors and vLLM dropped group act-order"),
        *checks.ragged(source, "compressed-tensors divides rows into equal groups"),
    ]


def _specs(source: ExportSource, name: str) -> Specs:
    (out_features, in_features), bits = source.shape(name), source.layout.bits
    groups = source.groups(name)
    specs: Specs = {
        "weight_packed": (torch.int32, (out_features, in_features * bits // _WORD_BITS)),
        "weight_scale": (source.facts.scale_dtype, (out_features, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not source.facts.sym:
        specs["weight_zero_point"] = (torch.int32, (-(-out_features * bits // _WORD_BITS), groups))
    return specs


_ENCODING = Encoding(_specs, lambda source, name: to_compressed(source.packed(name), sym=source.facts.sym))


def compressed_config(source: ExportSource) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it for weight-only integers."""
    facts, family = source.facts, source.spec.family
    by_group = facts.group_size != -1
    weights = {
        "num_bits": facts.bits,
        "type": "int",
        "symmetric": facts.sym,
        "strategy": "group" if by_group else "channel",
        "group_size": facts.group_size if by_group else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [family.head, *(f"re:{pattern}" for pattern in family.skips), *source.unquantized_linears],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    plan = plan_folder(source, options, _ENCODING)
    return plan if source.facts.sym else replace(plan, notes=(_ASYM_NOTE,))


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    write_weights(source, options, _ENCODING, target, progress)
    write_config(source, target.folder, compressed_config(source), options.rest)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    return read_folder(folder, source, CompressedLayout(CheckpointReader(folder), compressed_config(source)))


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    summary="compressed-tensors, pack-quantized: 4 and 8 bits, consecutive groups, symmetric or not",
    runtimes=("vLLM", "transformers + compressed-tensors"),
    extra="",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"qwen-quant {__version__}",
    rests=tuple(REST_DTYPES),
)
