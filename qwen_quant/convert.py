"""`convert`: a first-generation checkpoint under Qwen2's names, the same numbers in every tensor, and the proof of it.

Order of a run: check everything, account for every tensor, plan every byte, write the tokenizer, copy tensor by tensor
(a matrix in pieces of 16 MiB; a packed c_attn, whose thirds are columns, whole), then read everything back.  The proof:
the parts of each source tensor, joined again from what was written, have the sha256 of the source tensor; Qwen2 as
transformers defines it needs exactly the tensors that were written; and both folders give the same logits (that pass
holds one block in FP32, and the head).  OUT appears at the end, by one rename.  A killed run continues.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen_quant.checkpoint.audit import check_written
from qwen_quant.checkpoint.families import model_spec, read_config
from qwen_quant.checkpoint.manifest import (
    QUANTIZE_CONFIG_FILE,
    copy_companions,
    provenance,
    source_hashes,
    versions,
    write_manifest,
)
from qwen_quant.checkpoint.moves import copy_tensor, joined_sha256
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.checkpoint.writer import PlannedShard, PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import AuditError, InputError
from qwen_quant.evaluation.equality import LogitsEquality, require_equal_logits, sample_ids
from qwen_quant.models.skeleton import expected_tensors, meta_model
from qwen_quant.packing import SUFFIXES
from qwen_quant.preparation import check_output
from qwen_quant.progress import ProgressFn
from qwen_quant.qwen1_fast import write_fast_tokenizer
from qwen_quant.qwen1_to_qwen2 import (
    Relabelling,
    check_convertible,
    lost_beyond_length,
    plan_moves,
    qwen2_config,
    qwen2_quantization,
)
from qwen_quant.qwen1_tokenizer import EXTRA_VOCABULARY_FILE, VOCABULARY_FILE, load_qwen1_tokenizer
from qwen_quant.recipe import RunConfig
from qwen_quant.results import to_json
from qwen_quant.resume import WorkFolder, write_json_atomically
from qwen_quant.runtime.loading import WeightSource

PROOF_TOKENS = 64
COMMIT_BYTES = 1 << 30
_KERNEL_SOURCES = (".cpp", ".cu", ".h")  # the published Int4 folders carry code to compile


@dataclass(frozen=True)
class ConvertJob:
    """One `convert` run: `model` (a local folder) to `out`, with where the source came from for the record."""

    model: Path
    out: Path
    source_id: str
    revision: str | None = None
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the source: what became of it, and the sha256 that its parts, joined again from OUT, have too.

    Attributes:
        source: its name.
        targets: names in OUT.
        how: "unchanged", "split by rows", "split by columns", or "shared" (each target holds all of it).
        sha256: of its values as stored.
    """

    source: str
    targets: tuple[str, ...]
    how: str
    sha256: str


@dataclass(frozen=True)
class ConvertResult:
    """What a finished conversion did and what was proved. Bytes, seconds and counts as named.

    Attributes:
        kind: of the source: "16-bit", "32-bit", "gptq 4 bit" and so on.
        tensors: every tensor of the source that was moved.
        dropped: the others, with the reason.
        source_tensors, output_tensors: counts; parameters: weights of either model, counted on both sides.
        exact_up_to_tokens: length up to which OUT computes what MODEL computes; None: any length.
        lost_beyond: what MODEL does past that length and OUT does not.
        logits: both models on the same tokens.
        left_behind: files of MODEL that are not in OUT.
        warnings: everything a user of OUT should know.
    """

    out: Path
    to: str
    kind: str
    tensors: tuple[TensorRecord, ...]
    dropped: dict[str, str]
    source_tensors: int
    output_tensors: int
    parameters: int
    exact_up_to_tokens: int | None
    lost_beyond: tuple[str, ...]
    logits: LogitsEquality
    left_behind: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Ready:
    """A job with everything that was read, checked and planned before any work."""

    job: ConvertJob
    source: WeightSource
    plan: Relabelling
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    lost: tuple[str, ...]
    parameters: int
    shards: tuple[PlannedShard, ...]
    work: WorkFolder

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def _check_source(job: ConvertJob) -> WeightSource:
    """The weights of a first-generation folder (InputError for any other)."""
    model_type = read_config(job.model).get("model_type")
    if model_type == "qwen2":
        raise InputError(f"{job.model} is a qwen2 checkpoint already", "there is nothing to do", "use it as it is")
    if model_type != "qwen":
        raise InputError(
            f"{job.model} has model_type {model_type!r}",
            "only first-generation Qwen (model_type 'qwen') can be written as Qwen2",
            "give a folder of Qwen-1.8B, 7B, 14B or 72B",
        )
    source = WeightSource(job.model)
    if source.is_quantized and source.packed is None:
        raise InputError(
            f"{job.model} is {source.kind}",
            "its blocks of scales belong to the fused c_attn as a whole and cannot be split without quantizing again",
            "convert the 16-bit checkpoint, then make the bitsandbytes folder from the result",
        )
    return source


def _quantization_settings(source: WeightSource) -> dict[str, Any] | None:
    """The GPTQ settings as published, in Qwen2's words; None for a 16-bit folder."""
    if source.packed is None:
        return None
    settings = source.spec.config.get("quantization_config")
    if not isinstance(settings, dict):
        settings = json.loads((source.folder / QUANTIZE_CONFIG_FILE).read_text(encoding="utf-8"))
    return qwen2_quantization(settings)


def _prepare(job: ConvertJob) -> _Ready:
    """Read and check everything; nothing is written."""
    check_output(job.out, force=job.run.force, source=job.model)
    source = _check_source(job)
    model = meta_model(source.spec)
    check_convertible(model.config, source.spec.config)
    _check_vocabulary(job.model, model.config.vocab_size)
    expected = expected_tensors(model)
    plan = plan_moves(source.reader, expected, None if source.packed is None else source.packed.bits)
    dtype = source.reader.info(source.spec.family.embedding + ".weight").dtype
    config = qwen2_config(model.config, source.spec.config, dtype)
    parameters = sum(torch.Size(shape).numel() for shape in expected.values())
    _check_targets(plan, config, parameters)
    planned = [PlannedTensor(name, m.source.dtype, m.target_shape) for m in plan.moves for name in m.targets]
    shards = plan_shards(planned, job.run.max_shard_size_bytes)
    lost, work = lost_beyond_length(model.config), WorkFolder(job.out.absolute())
    return _Ready(job, source, plan, config, _quantization_settings(source), lost, parameters, shards, work)


def _check_vocabulary(folder: Path, rows: int) -> None:
    """Every token has a row (InputError otherwise); rows beyond the tokens are padding and are kept."""
    if (folder / VOCABULARY_FILE).is_file() and len(load_qwen1_tokenizer(folder)) > rows:
        raise InputError(
            f"{folder / VOCABULARY_FILE} does not belong to these weights",
            f"it has more ids than the embedding has rows ({rows})",
            "put the checkpoint's own tokenizer files beside it",
        )


def _check_targets(plan: Relabelling, config: dict[str, Any], parameters: int) -> None:
    """The planned tensors are those of transformers' Qwen2, each once, with as many parameters (AuditError)."""
    expected = expected_tensors(meta_model(model_spec(config, "the converted config.json")))
    planned = [(name, move.target_shape) for move in plan.moves for name in move.targets]
    shapes = dict(planned)
    if len(shapes) != len(planned):
        raise AuditError("two tensors of the source would get the same name")
    for name, shape in expected.items():
        base = name.removesuffix(".weight")
        packed = [f"{base}.{suffix}" for suffix in SUFFIXES]
        if shapes.pop(name, None) != shape and any(shapes.pop(part, None) is None for part in packed):
            raise AuditError(f"Qwen2 needs '{name}' of shape {shape}", "no tensor of the source becomes it")
    if shapes:
        raise AuditError(f"Qwen2 has no place for '{next(iter(shapes))}'")
    if sum(torch.Size(shape).numel() for shape in expected.values()) != parameters:
        raise AuditError("the two models have different numbers of parameters")


def _write_companions(ready: _Ready) -> tuple[list[str], tuple[str, ...]]:
    """Licence and the like, and the tokenizer as the Qwen2 family has it; returns (left behind, warnings)."""
    folder, model = ready.work.artifact, ready.job.model
    copied, left = copy_companions(model, folder)
    drop = [n for n in copied if n.endswith(_KERNEL_SOURCES) or n in (VOCABULARY_FILE, EXTRA_VOCABULARY_FILE)]
    warnings: tuple[str, ...] = ()
    if (model / VOCABULARY_FILE).is_file():
        write_fast_tokenizer(model, folder)
    elif not (folder / "tokenizer.json").is_file():
        drop += [name for name in copied if name == "tokenizer_config.json"]
        warnings = (f"MODEL has neither {VOCABULARY_FILE} nor tokenizer.json: OUT has no tokenizer",)
    for name in drop:
        (folder / name).unlink(missing_ok=True)
    return sorted({*left, *drop} - {"config.json", QUANTIZE_CONFIG_FILE}), warnings


def _write_configs(ready: _Ready) -> None:
    """config.json (its end token is the first of generation_config.json's) and, packed, quantize_config.json."""
    folder, config = ready.work.artifact, dict(ready.config)
    if (ready.job.model / VOCABULARY_FILE).is_file():
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        eos = generation["eos_token_id"]
        config["bos_token_id"] = generation["bos_token_id"]
        config["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    if ready.quantization is not None:
        config["quantization_config"] = ready.quantization
        names = {"model_name_or_path": None, "model_file_base_name": "model"}
        write_json_atomically(folder / QUANTIZE_CONFIG_FILE, {**names, **ready.quantization})
    write_json_atomically(folder / "config.json", config)


def _copy_all(ready: _Ready, state: dict[str, Any], progress: ProgressFn) -> dict[str, str]:
    """Copy what `state` does not say is done already; returns source name -> sha256."""
    moves, done = ready.plan.moves, int(state.get("moves_done", 0))
    hashes: dict[str, str] = dict(state.get("sha256", {}))
    writer = PlannedWriter(ready.work.artifact, ready.shards)
    pending = 0
    try:
        writer.mark_written(name for move in moves[:done] for name in move.targets)
        for k, move in enumerate(moves[done:], done):
            progress("copying tensors", k, len(moves))
            hashes[move.source.name] = copy_tensor(ready.source.reader, writer, move)
            pending += move.source.nbytes
            if pending >= COMMIT_BYTES:
                writer.sync()
                ready.work.commit({"moves_done": k + 1, "sha256": hashes})
                pending = 0
        writer.finish()
    finally:
        writer.close()
    return hashes


def _audit(ready: _Ready, hashes: dict[str, str], progress: ProgressFn) -> tuple[TensorRecord, ...]:
    """Read OUT back and compare it with the plan and, tensor by tensor, with the source (AuditError)."""
    artifact = CheckpointReader(ready.work.artifact)
    check_written(ready.shards, artifact)
    records = []
    for k, move in enumerate(ready.plan.moves):
        progress("reading back", k, len(ready.plan.moves))
        name = move.source.name
        if joined_sha256(artifact, move) != {hashes[name]}:
            raise AuditError(f"'{name}' reads back from OUT as other bytes than were copied")
        records.append(TensorRecord(name, move.targets, move.how, hashes[name]))
    return tuple(records)


def _prove_logits(ready: _Ready, progress: ProgressFn) -> LogitsEquality:
    target = WeightSource(ready.work.artifact)
    ids = sample_ids(ready.config["vocab_size"], min(PROOF_TOKENS, ready.config["max_position_embeddings"]))
    total, done = 3 * ready.source.spec.num_layers, 0

    def on_block() -> None:
        nonlocal done
        done += 1
        progress("comparing logits", done, total)

    return require_equal_logits(ready.source, target, ids, on_block)


def limit_text(length: int | None, lost: tuple[str, ...]) -> str:
    """Up to where the copy is exact, in words."""
    if length is None:
        return "exact at any length: this model uses neither dynamic NTK nor LogN"
    return (
        f"EXACT UP TO {length} TOKENS ONLY. Past that MODEL uses {' and '.join(lost)}, which Qwen2 does not have: OUT "
        f"says max_position_embeddings {length}; longer contexts need MODEL itself"
    )


def _identity(ready: _Ready, hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    return {
        "convert": "qwen2",
        "source": hashes,
        "source_id": ready.job.source_id,
        "revision": ready.job.revision,
        "max_shard_size_bytes": ready.job.run.max_shard_size_bytes,
        "versions": versions(),
    }


def _manifest(ready: _Ready, identity: dict[str, Any], result: ConvertResult) -> dict[str, Any]:
    proof = to_json(result)
    measured = {key: proof.pop(key) for key in ("seconds", "peak_memory_bytes")}
    limit = {"up_to_tokens": result.exact_up_to_tokens, "lost_beyond": proof.pop("lost_beyond")}
    limit["statement"] = limit_text(result.exact_up_to_tokens, result.lost_beyond)
    return {
        "schema": "qwen-quant/1",
        "method": "convert",
        "to": "qwen2",
        "source": {
            "id": ready.job.source_id,
            "revision": ready.job.revision,
            "sha256": identity["source"],
            **provenance(ready.job.model),
        },
        "exact": limit,
        "proof": {key: proof[key] for key in ("logits", "parameters", "source_tensors", "output_tensors", "dropped")},
        "tensors": proof["tensors"],
        "versions": identity["versions"],
        "warnings": proof["warnings"],
        "companions": {"left_behind": proof["left_behind"]},
        "measured": measured,
    }


def convert_to_qwen2(job: ConvertJob, progress: ProgressFn) -> ConvertResult:
    """Run (or resume) a conversion to its end.

    Errors: InputError for anything wrong with the input, the machine or the output; AuditError when what was written is
    not the source's numbers, or not the same model. Nothing appears at OUT then.
    """
    started = time.perf_counter()
    ready = _prepare(job)
    ready.work.check_disk(ready.output_bytes)
    progress("hashing the source", 0, 1)
    identity = _identity(ready, source_hashes(job.model))
    state = ready.work.open(identity, resume=job.run.resume)
    left, warnings = _write_companions(ready)
    hashes = _copy_all(ready, state, progress)
    _write_configs(ready)
    records = _audit(ready, hashes, progress)
    logits = _prove_logits(ready, progress)
    length = ready.config["max_position_embeddings"] if ready.lost else None
    if length is not None:
        warnings = (limit_text(length, ready.lost), *warnings)
    result = ConvertResult(
        out=job.out,
        to="qwen2",
        kind=ready.source.kind,
        tensors=records,
        dropped=ready.plan.dropped,
        source_tensors=len(ready.source.reader.names),
        output_tensors=sum(len(record.targets) for record in records),
        parameters=ready.parameters,
        exact_up_to_tokens=length,
        lost_beyond=ready.lost,
        logits=logits,
        left_behind=tuple(left),
        source_bytes=sum(path.stat().st_size for path in ready.source.reader.files),
        output_bytes=ready.output_bytes,
        peak_memory_bytes=peak_rss_bytes(),
        seconds=time.perf_counter() - started,
        warnings=warnings,
    )
    write_manifest(ready.work.artifact, _manifest(ready, identity, result))
    ready.work.publish(force=job.run.force)
    return result
