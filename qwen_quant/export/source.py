"""An Int4 folder of any published layout, linear by linear: what every export starts from.

Read are GPTQ (`checkpoint_format` gptq and gptq_v2: ours, AutoGPTQ's, GPTQModel's), AWQ (gemm) and compressed-tensors
(pack-quantized).  What the linears have in common (`SourceFacts`) is measured on their grids, not believed from
config.json, because the exactness of an export depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.identity import CONFIG_FILE, weights_sha256_of
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, carried_hashes, read_manifest
from qwen_quant.checkpoint.reader import CheckpointReader, file_sha256
from qwen_quant.errors import InputError
from qwen_quant.export.awq import AwqLayout
from qwen_quant.export.compressed_tensors import CompressedLayout
from qwen_quant.export.gptq import GptqLayout
from qwen_quant.export.pivot import LinearGrid, PackedRows, dequantized
from qwen_quant.export.rows import stored_rows
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.models.skeleton import expected_tensors, meta_model
from qwen_quant.runtime.loading import quantization_settings

READ_FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
_RECOMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias_mask")


class Layout(Protocol):
    """How one published layout stores a linear; the linear `base` is a name without ".weight"."""

    kind: str
    bits: int

    def suffixes(self, base: str) -> tuple[str, ...]:
        """Suffixes of the stored tensors of `base`; empty when it is not packed."""

    def shape(self, base: str) -> tuple[int, int]:
        """(out, in), from headers; checks dtypes and shapes of all its tensors (InputError)."""

    def grid(self, base: str) -> LinearGrid:
        """Scales, zeros and g_idx, without reading the codes."""

    def stream(self, base: str) -> Tensor:
        """uint8 [out, in * bits / 8], as `PackedRows.stream`."""


@dataclass(frozen=True)
class SourceFacts:
    """What is true of the linears of a source, measured on every grid.

    Attributes:
        bits: of every code.
        group_size: input columns that share a scale; -1 when every linear has one group a row.
        sym: every zero is 2^(bits-1).
        act_order: linears whose groups are not consecutive columns.
        ragged: linears whose in_features is no multiple of group_size, so that the last group is short.
        zero_zeros: linears with a zero of 0.
        scale_dtype: of the scales as stored.
        wide_scales: linears with a scale that FP16 cannot hold exactly (the source stores BF16 or FP32).
        wide_scale_error: largest |scale - FP16(scale)| * largest |code - zero| over them.
        wide_minimums: linears where scale * zero is not exact in FP16, as a 16-bit minimum or bias has to be.
        largest_scale: largest |scale|.
    """

    bits: int
    group_size: int
    sym: bool
    act_order: tuple[str, ...]
    ragged: tuple[str, ...]
    zero_zeros: tuple[str, ...]
    scale_dtype: torch.dtype
    wide_scales: tuple[str, ...]
    wide_scale_error: float
    wide_minimums: tuple[str, ...]
    largest_scale: float


class ExportSource:
    """Reads one Int4 folder; holds headers only.

    Attributes:
        folder, reader: the folder and its tensors as stored.
        spec: architecture and config.json.
        settings: its quantization settings as published.
        layout: how its linears are stored; `layout.kind` is "gptq", "gptq_v2", "awq" or "compressed-tensors".
        linears: names (without ".weight") of the quantized linears, in the model's order.
        kept: names of every other tensor that belongs to the model, in file order.
        dropped: stored tensors that no export carries, with the reason.

    Errors: InputError for a folder that is no checkpoint, not Int4, mixed in its widths, damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _refuse_other_exports(folder)
        self.spec = read_model_spec(folder)
        self.reader = CheckpointReader(folder)
        self.settings: dict[str, Any] = quantization_settings(folder, self.spec.config) or {}
        self.layout: Layout = find_layout(self.reader, self.settings)
        expected = expected_tensors(meta_model(self.spec))
        packed = {name: self.layout.suffixes(name) for name in self.spec.linear_names()}
        self.linears = tuple(name for name, suffixes in packed.items() if suffixes)
        if not self.linears:
            raise InputError(
                f"{folder} holds no quantized linear",
                f"its settings say {self.layout.kind}",
                "check that config.json belongs to these weights",
            )
        parts = {f"{name}.{suffix}" for name, suffixes in packed.items() for suffix in suffixes}
        self._check_shapes(expected)
        self.dropped = self._droppable(expected, parts)
        self.kept = tuple(name for name in self.reader.names if name not in parts and name not in self.dropped)
        self._last: tuple[str, QuantizedWeight] | None = None

    @property
    def unquantized_linears(self) -> tuple[str, ...]:
        """Linears that our own solver would quantize and that this folder stores plainly."""
        quantized = set(self.linears)
        return tuple(name for name in self.spec.linear_names() if name not in quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.reader.nbytes

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of linear `name`, from headers."""
        return self.layout.shape(name)

    def groups(self, name: str) -> int:
        """Number of groups of linear `name`, from headers."""
        size = self.facts.group_size
        return 1 if size == -1 else math.ceil(self.shape(name)[1] / size)

    def grid(self, name: str) -> LinearGrid:
        """Scales, zeros and g_idx of linear `name`; its codes are not read."""
        return self.layout.grid(name)

    def packed(self, name: str) -> PackedRows:
        """Linear `name` with packed codes: the fast way."""
        return PackedRows(self.layout.stream(name), self.layout.bits, self.layout.grid(name))

    def quantized(self, name: str) -> QuantizedWeight:
        """Linear `name` with a byte for each code; the last one asked for is remembered."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.packed(name).unpacked())
        return self._last[1]

    def packed_linears(self) -> Iterator[tuple[str, PackedRows]]:
        """Every linear in order, streamed."""
        for name in self.linears:
            yield name, self.packed(name)

    def dequantized(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """FP32 [rows, in]: rows start..stop of what linear `name` means, exactly."""
        whole, rows = self.quantized(name), slice(start, stop)
        part = QuantizedWeight(whole.codes[rows], whole.scales[rows], whole.zeros[rows], whole.g_idx)
        return dequantized(part)

    def kept_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop (dimension 0) of kept tensor `name`, as stored, without reading the others."""
        return stored_rows(self.reader.info(name), start, stop)

    @cached_property
    def facts(self) -> SourceFacts:
        """Measured on every grid (scales, zeros and g_idx are read once: about 3% of the folder)."""
        return measure(self)

    def _check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every parameter of the model is there in its shape, packed or plain (InputError)."""
        linears = set(self.linears)
        for name, shape in expected.items():
            base = name.removesuffix(".weight")
            if base not in linears and name not in self.reader and self.layout.suffixes(base):
                raise InputError(
                    f"{self.folder}: '{base}' is quantized",
                    "only the linears inside the blocks can be exported",
                    "quantize again without the head: qwen-quant gptq MODEL OUT",
                )
            if base in linears:
                if name in self.reader:
                    raise InputError(f"{self.folder} holds '{name}' both packed and plain", next_step="fetch it again")
                found: tuple[int, ...] = self.layout.shape(base)
            else:
                found = self.reader.info(name).shape
            if found != shape:
                raise InputError(
                    f"{self.folder}: '{name}' has shape {found}",
                    f"config.json asks for {shape}",
                    "check that config.json belongs to these weights",
                )

    def _droppable(self, expected: dict[str, tuple[int, ...]], parts: set[str]) -> dict[str, str]:
        """Stored tensors without a place in the model that may go, with the reason (InputError for any other)."""
        head, dropped = self.spec.family.head + ".weight", {}
        for name in self.reader.names:
            base, _, last = name.rpartition(".")
            if name in expected or name in parts or self.spec.is_passenger(name):
                continue
            if name.endswith(_RECOMPUTED):
                dropped[name] = "a buffer that runtimes compute"
            elif name == head and self.spec.tied_head:
                dropped[name] = "a copy of the embedding, which it is tied to"
            elif last == "bias" and base in self.linears and not bool(self.reader.read(name).any()):
                dropped[name] = "a bias of zeros that the model does not have"
            else:
                raise InputError(
                    f"{self.folder} holds the unexpected tensor '{name}'",
                    "config.json has no place for it",
                    "check that config.json belongs to these weights",
                )
        return dropped


def _refuse_other_exports(folder: Path) -> None:
    """Say of an export to a format that is only written here what it is (InputError)."""
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else {}
    name = manifest.get("format") if manifest.get("method") == "export" else None
    if name is not None and name not in READ_FORMATS:
        origin = manifest.get("source", {}).get("id", "")
        step = f"give the artifact that it was made from{f' ({origin})' if origin else ''}"
        raise InputError(f"{folder} is an export to {name}", f"read are {', '.join(READ_FORMATS)}", step)


def source_sha256(folder: Path) -> str:
    """`weights_sha256` of a source; files that its manifest names have to be what the manifest records.

    Errors: InputError naming those that changed since: an export of them would pass for one of the artifact.
    """
    names = [path.name for path in folder.glob("*.safetensors")] + [CONFIG_FILE]
    recorded = carried_hashes(read_manifest(folder)) if (folder / MANIFEST_FILE).is_file() else {}
    names += [name for name in recorded if name not in names and (folder / name).is_file()]
    hashes = {name: file_sha256(folder / name) for name in names}
    changed = sorted(name for name in hashes if recorded.get(name, hashes[name]) != hashes[name])
    if changed:
        step = f"restore it (qwen-quant verify {folder} names everything that changed), or quantize again"
        raise InputError(f"{folder} is not what its {MANIFEST_FILE} describes", f"{changed[0]} has changed", step)
    return weights_sha256_of(hashes)


def find_layout(reader: CheckpointReader, settings: dict[str, Any]) -> Layout:
    """The layout that quantization settings speak of.

    Errors: InputError for a folder without settings, of another method, or of a variant that is not read here.
    """
    method = settings.get("quant_method")
    layouts: dict[str, Callable[[CheckpointReader, dict[str, Any]], Layout]]
    layouts = {"gptq": GptqLayout, "awq": AwqLayout, "compressed-tensors": CompressedLayout}
    if method in layouts:
        return layouts[method](reader, settings)
    what = f"{reader.folder} is not an Int4 artifact"
    if not settings:
        raise InputError(what, "it is a 16-bit checkpoint", f"quantize it first: qwen-quant gptq {reader.folder} OUT")
    raise InputError(
        what,
        f"its quant_method is {method!r}; read are {', '.join(layouts)}",
        "give a folder of one of these, or quantize the 16-bit checkpoint: qwen-quant gptq MODEL OUT",
    )


def measure(source: ExportSource) -> SourceFacts:
    """Read every grid once and say what is true of all. Errors: InputError for a scale that is not finite."""
    bits, middle, top = source.layout.bits, 2 ** (source.layout.bits - 1), 2**source.layout.bits - 1
    sizes: set[int] = set()
    found: dict[str, list[str]] = {key: [] for key in ("act", "ragged", "zero", "scale", "minimum")}
    sym, dtypes, error, largest = True, set(), 0.0, 0.0
    for name in source.linears:
        grid = source.grid(name)
        scales = grid.scales.float()
        dtypes.add(grid.scales.dtype)
        if not bool(torch.isfinite(scales).all()):
            raise InputError(
                f"{source.folder}: '{name}' has a scale that is NaN or Inf", next_step="fetch or make it again"
            )
        in_features, groups = grid.g_idx.shape[0], scales.shape[1]
        size = _group_size(grid.g_idx, groups)
        sizes.add(-1 if groups == 1 else size)
        plain = torch.arange(in_features, dtype=torch.int32) // size
        found["act"] += [name] if not torch.equal(grid.g_idx, plain) else []
        found["ragged"] += [name] if in_features % size else []
        found["zero"] += [name] if not bool(grid.zeros.all()) else []
        sym = sym and bool((grid.zeros == middle).all())
        half = scales.half().float()
        if not torch.equal(half, scales):
            found["scale"].append(name)
            span = torch.maximum(grid.zeros.float(), top - grid.zeros.float())
            error = max(error, float(((half - scales).abs() * span).max()))
        minimum = scales * grid.zeros.float()
        found["minimum"] += [name] if not torch.equal(minimum.half().float(), minimum) else []
        largest = max(largest, float(scales.abs().max()))
    group_size = _common_size(source, sizes)
    if len(dtypes) > 1:
        what = f"{source.folder} stores scales in {' and '.join(sorted(map(str, dtypes)))}"
        raise InputError(what, "one dtype for all is read here", "give an artifact of one tool")
    return SourceFacts(
        bits=bits,
        group_size=group_size,
        sym=sym,
        act_order=tuple(found["act"]),
        ragged=tuple(found["ragged"]),
        zero_zeros=tuple(found["zero"]),
        scale_dtype=dtypes.pop(),
        wide_scales=tuple(found["scale"]),
        wide_scale_error=error,
        wide_minimums=tuple(found["minimum"]),
        largest_scale=largest,
    )


def _group_size(g_idx: Tensor, groups: int) -> int:
    """Columns of the largest group: group_size, also under act-order and with a short last group."""
    return int(torch.bincount(g_idx, minlength=groups).max())


def _common_size(source: ExportSource, sizes: set[int]) -> int:
    """The one group size. A linear of a single group fits any size that is not smaller than its width.

    Errors: InputError where linears differ.
    """
    several = sizes - {-1}
    if not several:
        return -1
    if len(several) > 1:
        raise InputError(
            f"{source.folder} has linears of different group sizes",
            f"found {sorted(several)}",
            "only one group size for all linears is read here",
        )
    return several.pop()
