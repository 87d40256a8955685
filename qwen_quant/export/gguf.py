"""GGUF: quantized linears in blocks of 32 (gguf_blocks.py), everything else as stored, tokenizer and all.

One file, or with --max-shard-size several in llama.cpp's own way: model-00001-of-00003.gguf and so on, every one with
split.no, split.count and split.tensors.count, the first with all other metadata; a reader is given the first.
gguf-py writes the head of each file; offsets follow from it, so every tensor is written to its place and a killed run
continues.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import checks
from qwen_quant.export.behind import Behind, write_at
from qwen_quant.export.folder import COMMIT_BYTES
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Target, require
from qwen_quant.export.gguf_blocks import BLOCK, encode, encode_q4_0, narrowest
from qwen_quant.export.gguf_layout import (
    ALIGNMENT,
    PLAIN,
    RESTS,
    Entry,
    Move,
    block_type,
    entries_of,
    is_left_out,
    kept_bytes,
    kept_kind,
    moves_heads,
    padded,
)
from qwen_quant.export.gguf_metadata import ARCHITECTURES, ROTATIONS, Vocabulary, architecture_facts, read_vocabulary
from qwen_quant.export.gguf_reading import read_back
from qwen_quant.export.hybrid import full_attention_interval, is_hybrid
from qwen_quant.export.rows import row_pieces
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.progress import ProgressFn

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

FILE = "model.gguf"
FACTS_BYTES, TENSOR_BYTES = 8 << 10, 128  # bounds for planning: metadata but the vocabulary, a row of the tensor table
_DENSE_MLP = re.compile(r".*\.mlp\.(gate|up|down)_proj")


@dataclass(frozen=True)
class _File:
    """One file: its name, its entries, and where the data of each begins behind the head."""

    name: str
    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all data."""
        return self.offsets[-1] + self.entries[-1].space


@lru_cache(maxsize=1)  # making the first generation's takes seconds, and a run asks several times
def _tokenizer(source: ExportSource) -> Vocabulary | None:
    return read_vocabulary(source.folder, source.spec.text_config["vocab_size"])


def _vocabulary(source: ExportSource) -> Vocabulary | None:
    """The tokenizer as the file has it: None without one, or with one that llama.cpp does not load."""
    found = _tokenizer(source)
    return found if found is not None and found.merges else None


def _check(source: ExportSource) -> list[Inexact]:
    facts, spec = source.facts, source.spec
    family, count = spec.config.get("model_type", ""), len(source.linears)
    found = [*checks.act_order(source, "GGUF blocks are consecutive columns"), *checks.fp16_scales(source)]
    if narrowest(facts.bits, sym=facts.sym) is None:
        why = "no GGUF type with one scale a block holds code - zero of all 9 bits"
        found.append(Inexact("asymmetric 8 bit codes", why, "--format gptq_v2", linears=count))
    size = facts.group_size
    if (size != -1 and size % BLOCK) or any(source.shape(name)[1] % BLOCK for name in source.linears):
        why = f"GGUF has one scale for {BLOCK} columns"
        found.append(Inexact(f"group_size {size}", why, "--format compressed-tensors", linears=count))
    if family not in ARCHITECTURES:
        return [*found, Inexact(f"family {family}", "llama.cpp has no such model", "--format gptq or awq")]
    dense = [name for name in source.linears if _DENSE_MLP.fullmatch(name)]
    if spec.expert_count and dense:
        why = "llama.cpp expects experts in every block of this architecture"
        found.append(Inexact("blocks without experts", why, "--format gptq or awq", linears=len(dense)))
    if is_hybrid(spec) and full_attention_interval(spec) is None:
        why = "llama.cpp has full attention in every n-th block"
        found.append(Inexact("the order of attention kinds", why, "--format gptq or awq"))
    if moves_heads(spec) and spec.text_config["linear_value_head_dim"] % BLOCK:
        why = f"llama.cpp takes value heads in another order, and blocks of {BLOCK} columns would be cut"
        found.append(Inexact("linear_value_head_dim", why, "--format gptq or awq"))
    return [*found, *_rotation_refusals(source), *_tokenizer_refusals(source)]


def _rotation_refusals(source: ExportSource) -> list[Inexact]:
    """A rotation of positions that llama.cpp does not have for Qwen."""
    kind = checks.rotation_kind(source.spec.text_config)
    why = f"llama.cpp has {', '.join(ROTATIONS)} for this family"
    return [] if kind in ROTATIONS else [Inexact(f"the rotation {kind!r}", why, "--format gptq or awq")]


def _tokenizer_refusals(source: ExportSource) -> list[Inexact]:
    """What llama.cpp cannot do with this tokenizer; with --allow-inexact the weights are exact all the same."""
    vocabulary = _tokenizer(source)
    if vocabulary is None:
        return []
    if not vocabulary.merges:
        why = "llama.cpp loads no byte-level vocabulary without merges: the file would take token ids only"
        return [Inexact("a tokenizer without merges", why, "--format gptq", max_error=0.0)]
    if not vocabulary.pre:
        why = "llama.cpp has no splitting rule that is known to be that of tokenizer.json: text would split differently"
        return [Inexact("the tokenizer's splitting rule", why, "--format gptq", max_error=0.0)]
    return []


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    """Sizes within a percent; the number of files is known only where gguf-py is installed, and is a guess here."""
    kind, spec = block_type(source), source.spec
    shapes = (source.shape(name) for name in source.linears)
    weights = sum(rows * (width // BLOCK * kind.block_bytes) for rows, width in shapes)
    kept = [name for name in source.kept if not is_left_out(spec, name)]
    weights += sum(kept_bytes(kept_kind(source, name, options.rest), source.reader.info(name).shape) for name in kept)
    notes = [f"linears are {kind.name}"]
    if spec.config["model_type"] == "qwen":
        notes.append("llama.cpp has no dynamic NTK and no LogN: the model is exact up to its seq_length")
    if _vocabulary(source) is None:
        notes.append("the file has no tokenizer: it takes token ids only")
    why = "llama.cpp runs the text decoder, and this export leaves multi-token prediction out"
    dropped = {**source.dropped, **{name: why for name in source.kept if is_left_out(spec, name)}}
    heads = (ALIGNMENT + TENSOR_BYTES) * (len(source.linears) + len(kept)) + FACTS_BYTES + _vocabulary_bytes(source)
    limit = options.split_bytes
    files = 1 if limit is None else max(1, -(-weights // limit))
    return ExportPlan(weights + heads, files, dropped, tuple(notes))


def _vocabulary_bytes(source: ExportSource) -> int:
    """Of tokens with their types, merges and chat template (a text is its length in 8 bytes, then UTF-8)."""
    found = _vocabulary(source)
    if found is None:
        return 0
    texts = sum(8 + len(text.encode()) for part in (found.tokens, found.merges) for text in part)
    return texts + 4 * len(found.tokens) + len(found.chat_template.encode())


def _files(source: ExportSource, options: ExportOptions) -> list[_File]:
    """The files, filled in order up to --max-shard-size of data each (a larger tensor gets a file of its own)."""
    parts: list[list[Entry]] = [[]]
    limit, size = options.split_bytes, 0
    for entry in entries_of(source, options):
        if limit is not None and parts[-1] and size + entry.space > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.space
    found = []
    for k, part in enumerate(parts):
        stem = Path(FILE).stem
        name = FILE if len(parts) == 1 else f"{stem}-{k + 1:05d}-of-{len(parts):05d}.gguf"
        ends = list(itertools.accumulate(entry.space for entry in part))
        found.append(_File(name, tuple(part), (0, *ends[:-1])))
    return found


def _write_head(source: ExportSource, files: list[_File], number: int, path: Path) -> None:
    """Write metadata and tensor table of file `number`; its data begins at the next multiple of the alignment."""
    gguf: Any = require("gguf", "gguf", "gguf")
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[source.spec.config["model_type"]])
    if number == 0:
        _add_metadata(source, writer)
    else:
        writer.kv_data = [{}]
    if len(files) > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(files))
        writer.add_int32("split.tensors.count", sum(len(file.entries) for file in files))
    for entry in files[number].entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        dtype = _numpy_type(entry.kind)
        stored = gguf.quant_shape_to_byte_shape(entry.shape, kind) if dtype == np.uint8 else entry.shape
        writer.add_tensor_info(entry.name, stored, dtype, entry.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_metadata(source: ExportSource, writer: Any) -> None:
    gguf: Any = require("gguf", "gguf", "gguf")
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in architecture_facts(source).items():
        kinds[type(value)](f"{ARCHITECTURES[source.spec.config['model_type']]}.{key}", value)
    writer.add_name(source.folder.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = {"Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[block_type(source).name]])
    _add_vocabulary(writer, _vocabulary(source))


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
    """Write the files; continues after the entry that `target.state` counts last."""
    files = _files(source, options)
    total, there = sum(len(file.entries) for file in files), all((target.folder / f.name).is_file() for f in files)
    done = int(target.state.get("entries_done", 0)) if there else 0
    starts = [_create(source, files, number, target.folder) for number in range(len(files))]
    before = pending = 0
    for file, start in zip(files, starts, strict=True):
        handle = os.open(target.folder / file.name, os.O_RDWR)
        try:
            with Behind() as behind:
                for k, (entry, offset) in enumerate(zip(file.entries, file.offsets, strict=True), before):
                    if k < done:
                        continue
                    progress("writing", k, total)
                    pending += _write_entry(source, entry, _Place(handle, start + offset), behind)
                    if pending >= COMMIT_BYTES or k + 1 == before + len(file.entries):
                        behind.drain()
                        os.fdatasync(handle)
                        target.commit({"entries_done": k + 1})
                        pending = 0
        finally:
            os.close(handle)
        before += len(file.entries)
    if _vocabulary(source) is not None:
        _remove_what_is_inside(target.folder)
    (target.folder / "config.json").unlink(missing_ok=True)


def _create(source: ExportSource, files: list[_File], number: int, folder: Path) -> int:
    """Make file `number` in its full length, with its head; returns where its data begins."""
    head = folder / f".{FILE}.head"
    _write_head(source, files, number, head)
    start = padded(head.stat().st_size)
    handle = os.open(folder / files[number].name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        size = start + files[number].nbytes
        os.ftruncate(handle, size)
        os.posix_fallocate(handle, 0, size)
        os.pwrite(handle, head.read_bytes(), 0)
    finally:
        os.close(handle)
    head.unlink()
    return start


def _remove_what_is_inside(folder: Path) -> None:
    """The tokenizer and its settings are in the file."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "qwen.tiktoken"):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Place:
    """An open file and an offset in it."""

    handle: int
    offset: int


def _write_entry(source: ExportSource, entry: Entry, place: _Place, behind: Behind) -> int:
    """Write the data of one tensor to its place; returns its bytes."""
    linears, written = set(source.linears), 0
    for name in entry.sources:
        if name in linears:
            parts: Iterator[Tensor] = iter([_encoded(source, name, entry.move)])
        else:
            parts = _kept_parts(source, name, entry)
        for part in parts:
            written += write_at(place.handle, behind, place.offset + written, part)
    if written != entry.nbytes:
        raise AuditError(f"'{entry.name}' has {written} bytes", f"planned {entry.nbytes}")
    return written


def _encoded(source: ExportSource, name: str, move: Move) -> Tensor:
    """Blocks of one linear."""
    if source.facts.bits == 4 and source.facts.sym and not move.changes:
        return encode_q4_0(source.packed(name))
    return encode(_moved(source.quantized(name), move), block_type(source))


def _moved(weight: QuantizedWeight, move: Move) -> QuantizedWeight:
    """The same weights in other places: rows with their scales and zeros, columns with their groups."""
    rows = slice(None) if move.rows is None else move.rows
    codes, g_idx = weight.codes[rows], weight.g_idx
    if move.columns is not None:
        codes, g_idx = codes[:, move.columns], g_idx[move.columns]
    return QuantizedWeight(codes, weight.scales[rows], weight.zeros[rows], g_idx)


def _kept_parts(source: ExportSource, name: str, entry: Entry) -> Iterator[Tensor]:
    """Data of a kept tensor in pieces of rows (whole where it is changed), as uint8 or in its type."""
    gguf: Any = require("gguf", "gguf", "gguf")
    pieces = [(0, None)] if entry.move.changes else row_pieces(source.reader.info(name))
    for start, stop in pieces:
        rows = entry.move.apply(source.kept_rows(name, start, stop))
        if entry.kind == "Q8_0":
            made = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            yield torch.from_numpy(made)
            continue
        values = rows.to(PLAIN[entry.kind])
        if values.dtype != rows.dtype and bool((values.isinf() & ~rows.isinf()).any()):
            raise InputError(f"'{name}' has values that {entry.kind} cannot hold", next_step="use --rest bf16 or f32")
        yield values.reshape(-1).contiguous()


GGUF = Format(
    name="gguf",
    summary="GGUF: Q4_0 (symmetric), Q5_0 (asymmetric), Q8_0 (8 bit); groups that 32 divides",
    runtimes=("llama.cpp", "Ollama", "LM Studio", "transformers (gguf_file, dequantized)"),
    extra="gguf",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=read_back,
    read_with=lambda: f"gguf {metadata.version('gguf')}",
    rests=tuple(RESTS),
    packages=("gguf",),
)
