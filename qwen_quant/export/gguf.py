"""One GGUF file: quantized linears in blocks of 32 (gguf_blocks.py), everything else as stored, tokenizer and all.

gguf-py names the tensors (its own tables of what llama.cpp calls them) and writes the head of the file; offsets follow
from it, so every tensor is written to its place and a killed run continues.  Vectors and routers are FP32, which is
what llama.cpp computes them in; matrices that are not quantized stay as stored (FP16 would lose small BF16 values).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint.reader import raw_bytes
from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import checks
from qwen_quant.export.folder import COMMIT_BYTES, items
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target, require
from qwen_quant.export.gguf_blocks import BLOCK, BlockType, encode, narrowest
from qwen_quant.export.gguf_metadata import ARCHITECTURES, Vocabulary, architecture_facts, read_vocabulary
from qwen_quant.export.rows import row_pieces
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

FILE = "model.gguf"
ALIGNMENT = 32
HEAD_BYTES = 16 << 20  # of metadata, vocabulary and tensor table: a bound for planning
_EXPERT = re.compile(r"(?P<stack>.*\.mlp\.experts)\.(?P<index>\d+)\.(?P<linear>\w+)")
_DENSE_MLP = re.compile(r".*\.mlp\.(gate|up|down)_proj")
_FULL_PRECISION = (".mlp.gate.weight", ".shared_expert_gate.weight")  # routers
_PLAIN_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_RESTS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file.

    Attributes:
        name: in the file. sources: names of the source that it holds, in order: several for a stack of experts.
        kind: GGUF type. shape: rows last to first as torch has them. nbytes: of its data, offset: in the file's data.
    """

    name: str
    sources: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def _block_type(source: ExportSource) -> BlockType:
    found = narrowest(source.facts.bits, sym=source.facts.sym)
    assert found is not None  # _check
    return found


def _kind(source: ExportSource, name: str, rest: str | None) -> str:
    """GGUF type of kept tensor `name`."""
    info = source.reader.info(name)
    if len(info.shape) < 2 or name.endswith(_FULL_PRECISION) or min(info.shape) == 1:
        return "F32"
    if rest == "q8_0" and info.shape[-1] % BLOCK:
        return "BF16"
    return _RESTS[rest] if rest is not None else _PLAIN_TYPES[info.dtype]


def _kept_bytes(kind: str, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return count // BLOCK * 34 if kind == "Q8_0" else count * _ELEMENT_BYTES[kind]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check(source: ExportSource) -> list[Inexact]:
    facts, family = source.facts, source.spec.config.get("model_type", "")
    count = len(source.linears)
    found = [*checks.act_order(source, "GGUF blocks are consecutive columns"), *checks.fp16_scales(source)]
    if narrowest(facts.bits, sym=facts.sym) is None:
        why = "no GGUF type with one scale a block holds code - zero of all 9 bits"
        found.append(Inexact("asymmetric 8 bit codes", why, "--format gptq_v2", linears=count))
    size = facts.group_size
    if (size != -1 and size % BLOCK) or any(source.shape(name)[1] % BLOCK for name in source.linears):
        why = f"GGUF has one scale for {BLOCK} columns"
        found.append(Inexact(f"group_size {size}", why, "--format compressed-tensors", linears=count))
    if family not in ARCHITECTURES:
        why = "llama.cpp stores changed values of linear attention (1 + norm, -exp(A_log), another order of heads)"
        found.append(Inexact(f"family {family}", why, "--format gptq, awq or compressed-tensors"))
        return found
    dense = [name for name in source.linears if _DENSE_MLP.fullmatch(name)]
    if source.spec.expert_count and dense:
        why = "llama.cpp expects experts in every block of this architecture"
        found.append(Inexact("blocks without experts", why, "--format gptq or awq", linears=len(dense)))
    vocabulary = read_vocabulary(source.folder, source.spec.config["vocab_size"])
    if vocabulary is not None and not vocabulary.pre:
        why = "llama.cpp has no splitting rule that is known to be that of tokenizer.json: text would split differently"
        found.append(Inexact("the tokenizer's splitting rule", why, "--format gptq", max_error=0.0))
    return found


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    kind = _block_type(source)
    weights = sum(math.prod(source.shape(name)) // BLOCK * kind.block_bytes for name in source.linears)
    kept = sum(
        _kept_bytes(_kind(source, name, options.rest), source.reader.info(name).shape)
        for name in source.kept
        if not source.spec.is_passenger(name)
    )
    notes = [f"linears are {kind.name}"]
    if source.spec.config["model_type"] == "qwen":
        notes.append("llama.cpp has no dynamic NTK and no LogN: the model is exact up to its seq_length")
    if read_vocabulary(source.folder, source.spec.config["vocab_size"]) is None:
        notes.append("the source has no tokenizer: the file takes token ids only")
    reason = "llama.cpp has no place for it"
    dropped = {**source.dropped, **{name: reason for name in source.kept if source.spec.is_passenger(name)}}
    padding = ALIGNMENT * (len(source.linears) + len(source.kept))
    return ExportPlan(weights + kept + padding + HEAD_BYTES, 1, dropped, tuple(notes))


def _entries(source: ExportSource, options: ExportOptions) -> list[_Entry]:
    """Every tensor of the file, in order, under llama.cpp's names."""
    gguf: Any = require("gguf", "gguf", "gguf")
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[source.spec.config["model_type"]]
    )
    names = gguf.get_tensor_name_map(architecture, source.spec.num_layers)
    linears, found, offset = set(source.linears), [], 0
    for name in items(source):
        if source.spec.is_passenger(name):
            continue
        expert = _EXPERT.fullmatch(name)
        if expert is not None and int(expert["index"]):
            continue
        if name in linears:
            sources, base, suffix = _stack(source, name, expert), name, ".weight"
            rows, width = source.shape(name)
            block = _block_type(source)
            nbytes = len(sources) * rows * (width // BLOCK * block.block_bytes)
            shape: tuple[int, ...] = (len(sources), rows, width) if expert is not None else (rows, width)
            kind = block.name
        else:
            sources, (base, _, last) = (name,), name.rpartition(".")
            suffix, shape = f".{last}", source.reader.info(name).shape
            kind = _kind(source, name, options.rest)
            shape = tuple(size for size in shape if size != 1) or (1,)
            nbytes = _kept_bytes(kind, shape)
        wanted = base if expert is None else f"{expert['stack']}.{expert['linear']}"
        short = names.get_name(wanted)
        if short is None:
            raise InputError(f"gguf-py has no name for '{name}'", "this architecture lacks it", "use --format gptq")
        found.append(_Entry(short + suffix, sources, kind, shape, nbytes, offset))
        offset += _padded(nbytes)
    return found


def _stack(source: ExportSource, name: str, expert: re.Match[str] | None) -> tuple[str, ...]:
    if expert is None:
        return (name,)
    return tuple(f"{expert['stack']}.{k}.{expert['linear']}" for k in range(source.spec.expert_count))


def _write_head(source: ExportSource, entries: list[_Entry], path: Path) -> int:
    """Write metadata and tensor table; returns where data begins."""
    gguf: Any = require("gguf", "gguf", "gguf")
    name = ARCHITECTURES[source.spec.config["model_type"]]
    writer = gguf.GGUFWriter(str(path), name)
    for key, value in architecture_facts(source).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{name}.{key}", value)
    writer.add_name(source.folder.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = {"Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[_block_type(source).name]])
    _add_vocabulary(writer, read_vocabulary(source.folder, source.spec.config["vocab_size"]))
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        dtype = _numpy_type(entry.kind)
        stored = gguf.quant_shape_to_byte_shape(entry.shape, kind) if dtype == np.uint8 else entry.shape
        writer.add_tensor_info(entry.name, stored, dtype, entry.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return _padded(path.stat().st_size)


def _numpy_type(kind: str) -> Any:
    return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(kind, np.dtype(np.uint8))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for key, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key.replace('pad_', 'padding_').replace('unk_', 'unknown_')}", index)
    writer.add_add_bos_token(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Write the file; continues after the entry that `target.state` counts last."""
    entries, path = _entries(source, options), target.folder / FILE
    done = int(target.state.get("entries_done", 0)) if path.is_file() else 0
    head = target.folder / f".{FILE}.head"
    start = _write_head(source, entries, head)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        size = start + (entries[-1].offset + _padded(entries[-1].nbytes) if entries else 0)
        os.ftruncate(handle, size)
        os.posix_fallocate(handle, 0, size)
        os.pwrite(handle, head.read_bytes(), 0)
        head.unlink()
        pending = 0
        for k, entry in enumerate(entries[done:], done):
            progress("writing", k, len(entries))
            pending += _write_entry(source, entry, handle, start + entry.offset)
            if pending >= COMMIT_BYTES:
                os.fdatasync(handle)
                target.commit({"entries_done": k + 1})
                pending = 0
        os.fdatasync(handle)
    finally:
        os.close(handle)
    _remove_what_is_inside(target.folder)


def _remove_what_is_inside(folder: Path) -> None:
    """The tokenizer and its settings are in the file; config.json was never there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "qwen.tiktoken"):
        (folder / name).unlink(missing_ok=True)


def _write_entry(source: ExportSource, entry: _Entry, handle: int, offset: int) -> int:
    """Write the data of one tensor at `offset`; returns its bytes."""
    linears, written = set(source.linears), 0
    for name in entry.sources:
        if name in linears:
            parts: Iterator[Tensor] = iter([encode(source.quantized(name), _block_type(source))])
        else:
            parts = _kept_parts(source, name, entry.kind)
        for part in parts:
            data = raw_bytes(part)
            sent = 0
            while sent < len(data):
                sent += os.pwrite(handle, data[sent:], offset + written + sent)
            written += len(data)
    if written != entry.nbytes:
        raise AuditError(f"'{entry.name}' has {written} bytes", f"planned {entry.nbytes}")
    return written


def _kept_parts(source: ExportSource, name: str, kind: str) -> Iterator[Tensor]:
    """Data of a kept tensor in pieces of rows, as uint8 or in its type."""
    gguf: Any = require("gguf", "gguf", "gguf")
    for start, stop in row_pieces(source.reader.info(name)):
        rows = source.kept_rows(name, start, stop)
        if kind == "Q8_0":
            made = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            yield torch.from_numpy(made)
            continue
        values = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        if bool((values.isinf() & ~rows.isinf()).any()):
            raise InputError(f"'{name}' has values that {kind} cannot hold", next_step="use --rest bf16 or f32")
        yield values.reshape(-1)


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    gguf: Any = require("gguf", "gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(folder / FILE)).tensors}
    for entry in _entries(source, ExportOptions()):
        tensor = tensors[entry.name]
        for k, name in enumerate(entry.sources):
            data = tensor.data[k] if len(entry.sources) > 1 else tensor.data
            if name in source.linears:
                yield Piece(name, torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type)))
            else:
                yield from _kept_pieces(source, name, data, tensor.tensor_type)


def _kept_pieces(source: ExportSource, name: str, data: Any, kind: Any) -> Iterator[Piece]:
    """A kept tensor's rows in its stored dtype (AuditError for values that it cannot hold: they are a difference)."""
    gguf: Any = require("gguf", "gguf", "gguf")
    info = source.reader.info(name)
    shaped = data.reshape(info.shape[0], -1) if len(info.shape) > 1 else data
    for start, stop in row_pieces(info):
        wide = torch.from_numpy(np.array(gguf.quants.dequantize(shaped[start:stop], kind), dtype=np.float32))
        values = wide.to(info.dtype)
        if not torch.equal(values.float(), wide) and kind.name in ("F32", "BF16", "F16"):
            raise AuditError(f"'{name}' reads back with values that {info.dtype} cannot hold")
        yield Piece(name, values.view(stop - start, *info.shape[1:]), start)


GGUF = Format(
    name="gguf",
    summary="one GGUF file: Q4_0 (symmetric), Q5_0 (asymmetric), Q8_0 (8 bit); groups that 32 divides",
    runtimes=("llama.cpp", "Ollama", "LM Studio", "transformers (gguf_file, dequantized)"),
    extra="gguf",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"gguf {metadata.version('gguf')}",
    rests=tuple(_RESTS),
    packages=("gguf",),
)
