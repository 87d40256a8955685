"""Lazy reading of safetensors checkpoints, one tensor at a time, by name.

A tensor is read with plain file reads into memory of its own, not through a memory map: what has been read and dropped
does not stay in the resident set, so the peak is what the caller holds.
Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_quant.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FUSED_EXPERTS = re.compile(r"(model\.(?:language_model\.)?layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_HASH_CHUNK_BYTES = 1 << 22
_PART_BYTES = 16 << 20  # memory of this size is used again, larger blocks would be faulted in anew (process.py)
_SEEK_BYTES = 1 << 16  # reading one row by itself takes about as long as reading so many bytes in a large piece


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, absolute byte `offset` and `nbytes` in it, with its dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def _read_header(path: Path) -> list[TensorInfo]:
    """Every tensor of one safetensors file. Errors: InputError for a truncated, corrupt or foreign file."""
    try:
        # The format's own library checks lengths, overlaps and holes; for torch it would map the file writable, which
        # a system refuses for a file larger than its memory.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is truncated or corrupt", str(error), "fetch this file again") from error
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: tensor '{name}' has dtype {entry['dtype']}", next_step="give a BF16, F16 or F32 checkpoint"
            )
        begin, end = entry["data_offsets"]
        infos.append(
            TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + size + begin, end - begin)
        )
    return infos


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder and, when there is an index, its weight map."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("weight_map names something else than files of this folder")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} cannot be read", str(error), "fetch this file again") from error
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{index} names {name}, which is absent", next_step=f"fetch {name} again")
        return [folder / name for name in names], weight_map
    if single.is_file():
        return [single], None
    if any(True for pattern in PICKLE_PATTERNS for _ in folder.glob(pattern)):
        raise InputError(
            f"{folder} holds pickle weights only",
            "a pickle can run code, so it is never read here",
            "convert it once: state = torch.load(file, weights_only=True); safetensors.torch.save_file(state, ...)",
        )
    raise InputError(
        f"{folder} is not a checkpoint", f"it holds neither {SINGLE_FILE} nor {INDEX_FILE}", "give a model folder"
    )


def separate_experts(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors with each expert of a fused stack under a name of its own, as every other checkpoint has it.

    gate_up_proj [experts, 2 * width, hidden] and down_proj [experts, hidden, width] are laid out expert by expert, gate
    in front of up, so each expert's matrix is a run of bytes of the file.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        match = _FUSED_EXPERTS.fullmatch(name)
        if match is None or len(info.shape) != 3:
            found[name] = info
            continue
        count, rows, columns = info.shape
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        size = info.nbytes // (count * len(parts)) if count else 0
        for k in range(count * len(parts)):
            own = f"{match[1]}.{k // len(parts)}.{parts[k % len(parts)]}.weight"
            shape = (rows // len(parts), columns)
            found[own] = TensorInfo(own, info.dtype, shape, info.file, info.offset + k * size, size)
    return found


class CheckpointReader:
    """Reads tensors of a safetensors folder (single file or sharded) by name; holds only the headers.

    Experts stored as one fused stack appear one by one (`separate_experts`).

    Errors: InputError for files that are missing, truncated, inconsistent with the index, or pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a folder", next_step="give the folder of a checkpoint or a hub id org/name"
            )
        self.files, weight_map = _weight_files(folder)
        self._infos: dict[str, TensorInfo] = {}
        for path in self.files:
            for info in _read_header(path):
                if info.name in self._infos:
                    raise InputError(
                        f"tensor '{info.name}' is in two files of {folder}", next_step="fetch the checkpoint again"
                    )
                self._infos[info.name] = info
        for name, file in (weight_map or {}).items():
            if name not in self._infos or self._infos[name].file.name != file:
                raise InputError(
                    f"{folder}: the index places '{name}' in {file}, which does not hold it",
                    next_step=f"fetch {file} again",
                )
        self._infos = separate_experts(self._infos)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name, in file order."""
        return tuple(self._infos)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._infos.values())

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place of tensor `name` (InputError when it is missing)."""
        if name not in self._infos:
            raise InputError(f"{self.folder} lacks the tensor '{name}'", next_step="fetch the checkpoint again")
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored, in memory of its own."""
        info = self.info(name)
        return self._read_bytes(info, 0, info.nbytes).view(info.shape)

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(byte offset in the tensor, flat values) of `name` in pieces of at most 16 MiB, as stored."""
        info = self.info(name)
        for start in range(0, info.nbytes, _PART_BYTES):
            yield start, self._read_bytes(info, start, min(_PART_BYTES, info.nbytes - start))

    def gather_rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows `indices` (int64, any shape) of the matrix `name`: [*indices.shape, width], dtype as stored.

        Reads the matrix in pieces and keeps only the rows asked for, or those one by one where they are few (InputError
        for an index out of range).
        """
        info = self.info(name)
        unique, inverse = torch.unique(indices, return_inverse=True)
        if unique.numel() and (int(unique[0]) < 0 or int(unique[-1]) >= info.shape[0]):
            raise InputError(
                f"token id {int(unique[-1])} is outside the {info.shape[0]} rows of '{name}'",
                "the tokenizer does not belong to this checkpoint",
                "put the checkpoint's own tokenizer files beside it",
            )
        row_bytes = info.nbytes // info.shape[0]
        rows_per_part = max(1, _PART_BYTES // row_bytes)
        kept = torch.empty(unique.numel(), info.shape[1], dtype=info.dtype)
        if unique.numel() * _SEEK_BYTES < info.nbytes:  # few rows of a large table
            for k, row in enumerate(unique.tolist()):
                kept[k] = self._read_bytes(info, row * row_bytes, row_bytes)
            return kept[inverse]
        for start in range(0, info.shape[0], rows_per_part):
            stop = min(start + rows_per_part, info.shape[0])
            low, high = (int(torch.searchsorted(unique, edge)) for edge in (start, stop))
            if low < high:
                part = self._read_bytes(info, start * row_bytes, (stop - start) * row_bytes).view(stop - start, -1)
                kept[low:high] = part[unique[low:high] - start]
        return kept[inverse]

    def _read_bytes(self, info: TensorInfo, start: int, count: int) -> torch.Tensor:
        """`count` bytes from byte `start` of a tensor's data, as its flat values."""
        # Not cleared first, as a bytearray is; on the CPU also where models are built under torch.device("meta").
        buffer = torch.empty(count // info.dtype.itemsize, dtype=info.dtype, device="cpu")
        view, done = raw_bytes(buffer), 0
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.offset + start)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise InputError(f"{info.file} ended inside '{info.name}'", next_step="fetch this file again")
                done += got
        return buffer


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor's values (a copy only where it is not contiguous)."""
    flat = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat.data).cast("B") if flat.size else memoryview(b"")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in 4 MiB steps."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
