"""An artifact that does not exist yet, as the formats' checks see one: what it can become is known before the work.

Shapes are those of the 16-bit checkpoint and the grid is the one that the settings ask for. What only the numbers can
say (scales that FP16 does not hold, zeros of 0) is taken for the best.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.export.pivot import LinearGrid
from qwen_quant.export.source import ExportSource, SourceFacts
from qwen_quant.recipe import GPTQConfig

_A_SCALE = 0.1  # any number that a product with a code needs all of FP16's bits for


class PlannedLayout:
    """The layout of linears that are still plain (see `source.Layout`)."""

    kind = "gptq"

    def __init__(self, reader: CheckpointReader, config: GPTQConfig) -> None:
        self.reader, self.bits, self.config = reader, config.bits, config

    def suffixes(self, base: str) -> tuple[str, ...]:
        """One: the weight."""
        return ("weight",) if f"{base}.weight" in self.reader else ()

    def shape(self, base: str) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.reader.info(f"{base}.weight").shape
        return rows, columns

    def grid(self, base: str) -> LinearGrid:
        """The groups, with one scale and zero that stand for all."""
        zero, columns = 2 ** (self.bits - 1) - (not self.config.sym), self.shape(base)[1]
        size = columns if self.config.group_size == -1 else self.config.group_size
        g_idx = torch.arange(columns, dtype=torch.int32) // size
        g_idx = g_idx.flip(0) if self.config.desc_act else g_idx
        return LinearGrid(torch.full((1, 1), _A_SCALE).half(), torch.full((1, 1), zero, dtype=torch.uint8), g_idx)

    def stream(self, base: str) -> Tensor:
        """There are no codes."""
        raise InputError(f"{self.reader.folder}: '{base}' has no codes yet", next_step="quantize first")


class PlannedSource(ExportSource):
    """What `gptq` with `config` would make of the 16-bit checkpoint in `folder`; only headers are read."""

    def __init__(self, folder: Path, config: GPTQConfig) -> None:
        self.folder, self.config = folder, config
        self.spec, self.reader = read_model_spec(folder), CheckpointReader(folder)
        self.settings: dict[str, Any] = {}
        self.layout = PlannedLayout(self.reader, config)
        self.linears = tuple(name for name in self.spec.linear_names() if f"{name}.weight" in self.reader)
        packed = {f"{name}.weight" for name in self.linears}
        self.dropped = {}
        self.kept = tuple(name for name in self.reader.names if name not in packed)
        self._last = None

    @cached_property
    def facts(self) -> SourceFacts:
        """As the settings ask."""
        size, config = self.config.group_size, self.config
        ragged = () if size == -1 else tuple(name for name in self.linears if self.shape(name)[1] % size)
        return SourceFacts(
            bits=config.bits,
            group_size=size,
            sym=config.sym,
            act_order=self.linears if config.desc_act and size != -1 else (),
            ragged=ragged,
            zero_zeros=(),
            scale_dtype=torch.float16,
            wide_scales=(),
            wide_scale_error=0.0,
            wide_minimums=(),
            largest_scale=_A_SCALE,
        )
