"""`bnb`: a checkpoint as the bitsandbytes folder that transformers itself would save, without loading the model.

Order of a run: check everything and account for every tensor (`bnb_plan`), plan every byte, write tensor by tensor in
the order of the plan, sync and commit whenever a file is full, read everything back, rename.  Double quantization reads
the weights once more beforehand: the mean of their scales is saved as decimal digits, whose number is part of the plan.
A killed run continues at its first unfinished file and ends with the same bytes.  At most one weight, as stored and in
FP32, is in memory.

Hashing costs more than everything else of an Int8 run, so bytes are hashed once: the source's files while they are
converted (a run that continues waits for them: they say whether it may) and the output's while it is read back, both in
a thread of their own (hashlib lets go of Python's lock); what
was made is compared with what was read by a checksum (`_checksum`), and kept tensors byte by byte. The error of a
linear is measured on the tensors that were made, while its weight is at hand; the checksum says that OUT holds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_quant.background import in_background
from qwen_quant.bnb import (
    NestedAbsmax,
    absmax_offset,
    block_absmax,
    dequantize_4bit,
    dequantize_int8,
    quantize_4bit,
    quantize_int8,
    tensors_4bit,
    tensors_int8,
)
from qwen_quant.bnb_plan import BnbJob, Ready, kept_dtype, plan, planned_tensors, prepare
from qwen_quant.checkpoint.audit import check_written, content_sha256
from qwen_quant.checkpoint.manifest import copy_companions, source_hashes, versions, write_manifest
from qwen_quant.checkpoint.reader import DTYPE_NAMES, CheckpointReader, file_sha256, raw_bytes
from qwen_quant.checkpoint.writer import PlannedShard, PlannedWriter
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import AuditError, InputError
from qwen_quant.preparation import finite
from qwen_quant.progress import ProgressFn
from qwen_quant.results import to_json
from qwen_quant.resume import write_json_atomically
from qwen_quant.runtime.kernels.int8 import int8_rows, takes_int8

_ERROR_VALUES = 1 << 22
_SUM_WORDS = 1 << 10


@dataclass(frozen=True)
class _Made:
    """What is known of one linear when it is written: the checksum of its tensors, and ||W' - W|| / ||W||."""

    checksum: str
    relative_error: float


@dataclass(frozen=True)
class BnbLinear:
    """One quantized linear: its shape, ||W' - W|| / ||W||, and the sha256 of its tensors on disk."""

    name: str
    in_features: int
    out_features: int
    relative_error: float
    sha256: str


@dataclass(frozen=True)
class BnbResult:
    """What a finished run did. Bytes, seconds and counts as named.

    Attributes:
        quant_type, double_quant, block_size: as asked for.
        linears: every quantized one.
        quantized_parameters, kept_parameters: weights that became codes, and all others.
        quantized_share: of the weights without embeddings and head, 0 to 1.
        skip_modules: llm_int8_skip_modules of config.json; None leaves the head out by transformers' own rule.
        left_behind: files of MODEL that are not in OUT.
        warnings: what a user of OUT should know.
    """

    out: Path
    quant_type: str
    double_quant: bool
    block_size: int
    linears: tuple[BnbLinear, ...]
    quantized_parameters: int
    kept_parameters: int
    quantized_share: float
    skip_modules: tuple[str, ...] | None
    left_behind: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def _largest(name: str, values: Tensor) -> float:
    """The largest magnitude (InputError naming the tensor when a value is NaN or Inf); 6 times as fast as isfinite."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)  # NaN anywhere makes both NaN
    return float(finite(name, torch.stack((low, high))).abs().max())


def _checksum(tensors: Iterable[Tensor]) -> str:
    """A check of what is read back against what was written, an order of magnitude faster than sha256 of the bytes.

    Every run of 8 KiB is summed as 64-bit integers, modulo 2^64; the sums, rests and lengths are hashed. One changed
    word, exchanged runs or other lengths are always seen; two changes in one run that cancel out are not.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        whole = flat.numel() // (8 * _SUM_WORDS) * 8 * _SUM_WORDS
        digest.update(flat.numel().to_bytes(8, "little"))
        digest.update(raw_bytes(flat[:whole].view(torch.int64).view(-1, _SUM_WORDS).sum(1)))
        digest.update(raw_bytes(flat[whole:]))
    return digest.hexdigest()


def _weight(ready: Ready, name: str) -> Tensor:
    """A weight of the source in the model's dtype, as bitsandbytes would get it (InputError when it has no codes)."""
    weight = ready.reader.read(name).to(ready.dtype)
    largest = _largest(name, weight)
    limit = torch.finfo(torch.float16).max
    if ready.job.bnb.quant_type == "int8" and largest > limit:
        why = f"Int8 weights pass through FP16, which ends at {limit:.0f}"
        raise InputError(f"'{name}' holds a value of {largest:.3g}", why, "use --quant-type nf4")
    return weight


Commit = Callable[[dict[str, Any]], None]


def _begin(ready: Ready, source: Callable[[], dict[str, str]]) -> tuple[dict[str, Any], Commit]:
    """(progress of an earlier run, how to save progress); only what exists already has to wait for `source`."""

    def commit(state: dict[str, Any]) -> None:
        ready.work.open(_identity(ready, source()), resume=True)  # says what the run is, before any progress of it
        ready.work.commit(state)

    if ready.job.run.resume and ready.work.is_begun:
        return ready.work.open(_identity(ready, source()), resume=True), commit
    ready.work.create()
    return {}, commit


def _offsets(ready: Ready, state: dict[str, Any], commit: Commit, progress: ProgressFn) -> dict[str, float]:
    """Mean absmax by weight name; {} without double quantization. Found once and kept in the unfinished run."""
    if not ready.job.bnb.double_quant:
        return {}
    if "offsets" in state:
        return dict(state["offsets"])
    found = {}
    for k, name in enumerate(ready.accounting.quantized):
        progress("measuring scales", k, len(ready.accounting.quantized))
        found[name] = absmax_offset(block_absmax(_weight(ready, name), ready.job.bnb.block_size))
    commit({"tensors_done": 0, "made": {}, "offsets": found})
    return found


def _quantized(ready: Ready, name: str, offset: float | None) -> tuple[dict[str, Tensor], float]:
    """The tensors of one linear by full name, and ||W' - W|| / ||W|| of what they stand for."""
    config, weight, base = ready.job.bnb, _weight(ready, name), name.removesuffix(".weight")
    if config.quant_type != "int8":
        double, block = config.double_quant, config.block_size
        made = tensors_4bit(quantize_4bit(weight, config.quant_type, block, double_quant=double, offset=offset))
    elif takes_int8(ready.reader.nbytes):
        codes, scb, error = int8_rows(weight)
        made = tensors_int8(base, codes, scb)
        return {f"{base}.{suffix}": tensor for suffix, tensor in made.items()}, error
    else:
        made = tensors_int8(base, *quantize_int8(weight))
    tensors = {f"{base}.{suffix}": tensor for suffix, tensor in made.items()}
    return tensors, _relative_error(_dense(ready, name, tensors), weight)


def _copy(ready: Ready, writer: PlannedWriter, name: str) -> None:
    """Write a kept tensor in the model's dtype, in pieces."""
    stored, target = ready.reader.info(name).dtype, kept_dtype(ready, name)
    for start, part in ready.reader.parts(name):
        values = part.to(target)
        _largest(name, values)
        writer.write_bytes(name, start // stored.itemsize * target.itemsize, values)
    writer.finish_parts(name)


def _write_all(
    ready: Ready, shards: tuple[PlannedShard, ...], state: dict[str, Any], commit: Commit, progress: ProgressFn
) -> dict[str, _Made]:
    """Write what `state` does not say is done; returns what was made by weight name."""
    offsets: dict[str, float] = state["offsets"]
    made = {name: _Made(**values) for name, values in state.get("made", {}).items()}
    file_of = {tensor.name: k for k, shard in enumerate(shards) for tensor in shard.tensors}
    parts = [[t.name for t in planned_tensors(ready, name, offsets.get(name))] for name in ready.order]
    done = int(state.get("tensors_done", 0))
    writer = PlannedWriter(ready.work.artifact, shards)
    try:
        writer.mark_written(part for names in parts[:done] for part in names)
        for k, name in enumerate(ready.order[done:], done):
            progress("quantizing", k, len(ready.order))
            if name in ready.accounting.kept:
                _copy(ready, writer, name)
            else:
                tensors, error = _quantized(ready, name, offsets.get(name))
                made[name] = _Made(_checksum(tensors.values()), error)
                for full_name, tensor in tensors.items():
                    writer.write(full_name, tensor)
            if k + 1 < len(parts) and file_of[parts[k + 1][0]] > file_of[parts[k][0]]:
                writer.sync()
                done_so_far = {name: dataclasses.asdict(one) for name, one in made.items()}
                commit({"tensors_done": k + 1, "made": done_so_far, "offsets": offsets})
        writer.finish()
    finally:
        writer.close()
    return made


def _dense(ready: Ready, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """FP32 weight of a linear's tensors."""
    config, base, shape = ready.job.bnb, name.removesuffix(".weight"), ready.reader.info(name).shape
    if config.quant_type == "int8":
        return dequantize_int8(tensors[name].view(shape), tensors[f"{base}.SCB"])
    nested = None
    if config.double_quant:
        state = next(tensor for key, tensor in tensors.items() if ".quant_state." in key)
        nested = NestedAbsmax.from_state(tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"], state)
    absmax, table = tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
    return dequantize_4bit(tensors[name], absmax, table, config.block_size, (shape[0], shape[1]), nested=nested)


def _relative_error(dense: Tensor, weight: Tensor) -> float:
    """||dense - weight|| / ||weight||, summed in FP64 over pieces; `dense` is used up."""
    ours, theirs = dense.flatten(), weight.flatten()
    difference = size = 0.0
    for start in range(0, ours.numel(), _ERROR_VALUES):
        source = theirs[start : start + _ERROR_VALUES].float()
        difference += float(ours[start : start + _ERROR_VALUES].sub_(source).norm()) ** 2
        size += float(source.norm()) ** 2
    return math.sqrt(difference / size) if size else 0.0


def _check_kept(ready: Ready, artifact: CheckpointReader, progress: ProgressFn) -> None:
    """Every kept tensor reads back as the source's bytes, or as the source cast to the model's dtype."""
    for k, name in enumerate(ready.accounting.kept):
        progress("auditing kept tensors", k, len(ready.accounting.kept))
        pairs = zip(ready.reader.parts(name), artifact.parts(name), strict=True)
        if ready.reader.info(name).dtype == kept_dtype(ready, name):
            same = all(
                torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for (_, theirs), (_, ours) in pairs
            )
        else:  # parts of equal bytes are not equal parts
            source = (part.to(ready.dtype) for _, part in ready.reader.parts(name))
            same = content_sha256(source) == content_sha256(part for _, part in artifact.parts(name))
        if not same:
            raise AuditError(f"'{name}' should be kept as it was, but its bytes differ from the source's")


def _audit(
    ready: Ready, shards: tuple[PlannedShard, ...], made: dict[str, _Made], progress: ProgressFn
) -> tuple[BnbLinear, ...]:
    """Read OUT back and compare it with the plan, the source and what was quantized (AuditError)."""
    artifact = CheckpointReader(ready.work.artifact)
    check_written(shards, artifact)
    _check_kept(ready, artifact, progress)
    found = []
    for k, name in enumerate(ready.accounting.quantized):
        progress("auditing", k, len(ready.accounting.quantized))
        base = name.removesuffix(".weight")
        offset = 0.0 if ready.job.bnb.double_quant else None
        tensors = {t.name: artifact.read(t.name) for t in planned_tensors(ready, name, offset)}
        if name not in made or _checksum(tensors.values()) != made[name].checksum:
            raise AuditError(f"'{base}' reads back as other codes or scales than were made")
        rows, columns = ready.reader.info(name).shape
        found.append(BnbLinear(base, columns, rows, made[name].relative_error, content_sha256(tensors.values())))
    return tuple(found)


def _write_config(ready: Ready) -> None:
    """config.json as it was, with quantization_config, and with dtype where it said none."""
    kept = {key: value for key, value in ready.spec.config.items() if key != "auto_map"}
    if not (kept.get("dtype") or kept.get("torch_dtype")):
        kept["dtype"] = str(ready.dtype).removeprefix("torch.")
    write_json_atomically(ready.work.artifact / "config.json", {**kept, "quantization_config": ready.settings})


def _identity(ready: Ready, source: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the output's bytes; `source` as from `source_hashes`."""
    return {
        "bnb": dataclasses.asdict(ready.job.bnb),
        "source": source,
        "source_id": ready.job.source_id,
        "revision": ready.job.revision,
        "max_shard_size_bytes": ready.job.run.max_shard_size_bytes,
        "versions": versions(),
    }


def _manifest(ready: Ready, identity: dict[str, Any], result: BnbResult, copied: list[str]) -> dict[str, Any]:
    return {
        "schema": "qwen-quant/1",
        "method": "bitsandbytes",
        "source": {"id": ready.job.source_id, "revision": ready.job.revision, "sha256": identity["source"]},
        "settings": identity["bnb"],
        "quantization_config": ready.settings,
        "max_shard_size_bytes": identity["max_shard_size_bytes"],
        "versions": identity["versions"],
        "audit": {
            "quantized": len(result.linears),
            "quantized_share": result.quantized_share,
            "kept": ready.accounting.kept,
            "kept_dtype": DTYPE_NAMES[ready.dtype],
            "dropped_buffers": list(ready.accounting.dropped),
        },
        "warnings": list(result.warnings),
        "linears": [to_json(linear) for linear in result.linears],
        "companions": {"copied": copied, "left_behind": list(result.left_behind)},
        "measured": {"wall_seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes},
    }


def quantize_bnb(job: BnbJob, progress: ProgressFn) -> BnbResult:
    """Run (or resume) a conversion to its end.

    Errors: InputError for anything wrong with the input, the machine or the output; AuditError (our bug) when OUT does
    not read back as what was made. An interrupted run leaves its work folder; the same command continues it.
    """
    started = time.perf_counter()
    source = in_background(lambda: source_hashes(job.model))
    ready = prepare(job)
    progress("hashing the source", 0, 1)
    state, commit = _begin(ready, source)
    state = {**state, "offsets": _offsets(ready, state, commit, progress)}
    shards = plan(ready, state["offsets"])
    ready.work.check_disk(sum(shard.nbytes for shard in shards))
    made = _write_all(ready, shards, state, commit, progress)
    files = [ready.work.artifact / shard.file_name for shard in shards]
    written = in_background(lambda: {path.name: file_sha256(path) for path in files})
    copied, left = copy_companions(job.model, ready.work.artifact)
    _write_config(ready)
    linears = _audit(ready, shards, made, progress)
    result = _result(ready, shards, linears, (tuple(left), time.perf_counter() - started))
    write_manifest(ready.work.artifact, _manifest(ready, _identity(ready, source()), result, copied), written())
    ready.work.publish(force=job.run.force)
    return result


def _result(
    ready: Ready, shards: tuple[PlannedShard, ...], linears: tuple[BnbLinear, ...], run: tuple[tuple[str, ...], float]
) -> BnbResult:
    config, skip = ready.job.bnb, ready.settings["llm_int8_skip_modules"]
    return BnbResult(
        out=ready.job.out,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
        block_size=config.block_size,
        linears=linears,
        quantized_parameters=sum(linear.in_features * linear.out_features for linear in linears),
        kept_parameters=sum(math.prod(ready.reader.info(name).shape) for name in ready.accounting.kept),
        quantized_share=ready.quantized_share,
        skip_modules=None if skip is None else tuple(skip),
        left_behind=run[0],
        source_bytes=sum(path.stat().st_size for path in ready.reader.files),
        output_bytes=sum(shard.nbytes for shard in shards),
        peak_memory_bytes=peak_rss_bytes(),
        seconds=run[1],
        warnings=ready.warnings,
    )
