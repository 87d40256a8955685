"""GPTQ folders in both directions: `checkpoint_format` "gptq" (zero - 1 in qzeros) and "gptq_v2" (zero).

The layout is that of `packing.py`: qweight int32 [in * bits / 32, out] is `PackedRows.stream`, seen as 32-bit words and
transposed; qzeros, scales and g_idx are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant import __version__
from qwen_quant.checkpoint.manifest import QUANTIZE_CONFIG_FILE, quantization_config, skip_lists
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
from qwen_quant.export.pivot import LinearGrid
from qwen_quant.packing import SUFFIXES, WORD_BITS, pack_rows, packed_specs, unpack_rows
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import GPTQConfig
from qwen_quant.resume import write_json_atomically
from qwen_quant.runtime.gptq_folder import packed_format

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

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
        zeros = unpack_rows(self.reader.read(f"{base}.qzeros"), self.bits)
        if self.kind == "gptq":
            zeros = (zeros + 1) & (2**self.bits - 1)
        return LinearGrid(scales.mT.contiguous(), zeros.mT.contiguous(), g_idx)

    def stream(self, base: str) -> Tensor:
        """Packed codes of `base` row by row."""
        return self.reader.read(f"{base}.qweight").mT.contiguous().view(torch.uint8)


def _check(source: ExportSource) -> list[Inexact]:
    return [*checks.group_size(source), *checks.outputs_fill_words(source), *checks.fp16_scales(source)]


def _check_v1(source: ExportSource) -> list[Inexact]:
    return [*_check(source), *checks.zero_zeros(source)]


def _specs(source: ExportSource, name: str) -> Specs:
    out_features, in_features = source.shape(name)
    return packed_specs(in_features, out_features, source.layout.bits, source.facts.group_size)


def _tensors(source: ExportSource, name: str, checkpoint_format: str) -> dict[str, Tensor]:
    """The four tensors of a linear; the codes of a source that is GPTQ itself are copied as they are."""
    grid, bits = source.grid(name), source.layout.bits
    if isinstance(source.layout, GptqLayout):
        qweight = source.reader.read(f"{name}.qweight")
    else:
        qweight = source.layout.stream(name).view(torch.int32).mT.contiguous()
    zeros = grid.zeros.mT
    if checkpoint_format == "gptq":
        zeros = (zeros - 1) & (2**bits - 1)
    return {
        "qweight": qweight,
        "qzeros": pack_rows(zeros, bits),
        "scales": grid.scales.half().mT.contiguous(),
        "g_idx": grid.g_idx,
    }


def gptq_config(source: ExportSource, checkpoint_format: str) -> dict[str, Any]:
    """quantization_config; what the source says about its making (damp_percent, ...) is kept where it is known."""
    facts = source.facts
    config = GPTQConfig(
        facts.bits, facts.group_size, facts.sym, bool(facts.act_order), checkpoint_format=checkpoint_format
    )
    settings = {**quantization_config(config), **skip_lists(source.spec)}
    for key in ("damp_percent", "true_sequential"):
        if key in source.settings:
            settings[key] = source.settings[key]
        else:
            del settings[key]
    if source.unquantized_linears:
        excluded: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in source.unquantized_linears}
        settings["dynamic"] = {**settings.get("dynamic", {}), **excluded}
    return settings


def _format(checkpoint_format: str, summary: str, runtimes: tuple[str, ...]) -> Format:
    """The row of one of the two conventions."""
    encoding = Encoding(_specs, lambda source, name: _tensors(source, name, checkpoint_format))

    def plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
        return plan_folder(source, options, encoding)

    def write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
        write_weights(source, options, encoding, target, progress)
        settings = gptq_config(source, checkpoint_format)
        write_config(source, target.folder, settings, options.rest)
        names = {"model_name_or_path": None, "model_file_base_name": "model"}
        write_json_atomically(target.folder / QUANTIZE_CONFIG_FILE, {**settings, **names})

    def read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
        layout = GptqLayout(CheckpointReader(folder), gptq_config(source, checkpoint_format))
        return read_folder(folder, source, layout)

    return Format(
        name=checkpoint_format,
        summary=summary,
        runtimes=runtimes,
        extra="",
        check=_check_v1 if checkpoint_format == "gptq" else _check,
        plan=plan,
        write=write,
        read_back=read_back,
        read_with=lambda: f"qwen-quant {__version__}",
        rests=tuple(REST_DTYPES),
    )


GPTQ = _format(
    "gptq",
    "GPTQ as AutoGPTQ and GPTQModel write it (zero - 1): 2, 3, 4, 8 bits",
    ("transformers", "GPTQModel", "AutoGPTQ", "vLLM (symmetric, no act-order)"),
)
GPTQ_V2 = _format(
    "gptq_v2",
    "GPTQ with zeros as they are: 2, 3, 4, 8 bits, exact for a zero of 0 too",
    ("GPTQModel", "vLLM (symmetric, no act-order)"),
)
