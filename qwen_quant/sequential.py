"""The main job: stream a checkpoint block by block through the solver and write the Int4 artifact.

Order of a run: check everything that can be checked, account for every parameter, plan every byte, copy what is kept,
then per block: read, quantize, write, make durable, move the hidden states on; at the end configs, manifest, the audit
of what was written, and one rename.  Progress is durable after every block.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.activations import ActivationStore
from qwen_quant.block import quantize_block
from qwen_quant.block_solver import BlockRun, SolvedLinear, Stream, embed
from qwen_quant.checkpoint.audit import check_kept, check_written, content_sha256
from qwen_quant.checkpoint.manifest import copy_companions, source_hashes, versions, write_configs, write_manifest
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.checkpoint.writer import PlannedWriter
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import AuditError
from qwen_quant.experts import ROUTED
from qwen_quant.packing import SUFFIXES, pack_weight, unpack_weight
from qwen_quant.plan import PlanEstimate, estimate
from qwen_quant.preparation import Prepared, QuantizeJob, finite, prepare, shared_fetch
from qwen_quant.progress import ProgressFn
from qwen_quant.results import LayerStats, to_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeResult:
    """What a finished run did. Bytes, seconds and counts as named; `predicted_*` is what was said at its start."""

    out: Path
    layers: tuple[LayerStats, ...]
    tokens: int
    calibration_sha256: str
    source_bytes: int
    output_bytes: int
    quantized_parameters: int
    kept_parameters: int
    predicted: PlanEstimate
    hidden_state_bytes: int
    peak_memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def _settings(ready: Prepared) -> dict[str, Any]:
    """The solver's settings; those about experts only where there are some."""
    settings = dataclasses.asdict(ready.job.gptq)
    return {k: v for k, v in settings.items() if ready.spec.expert_count or not k.startswith("expert_")}


def _run_identity(ready: Prepared, hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    return {
        "settings": _settings(ready),
        "calibration": {"sha256": ready.calibration.sha256, "shape": list(ready.calibration.input_ids.shape)},
        "seed": ready.job.calibration.seed,
        "source": hashes,
        "source_id": ready.job.source_id,
        "revision": ready.job.revision,
        "device": ready.skeleton.device.type,
        "compute_dtype": str(ready.skeleton.dtype).removeprefix("torch."),
        "max_shard_size_bytes": ready.job.run.max_shard_size_bytes,
        "versions": versions(),
    }


def _copy_kept(ready: Prepared, writer: PlannedWriter) -> None:
    for name in ready.accounting.kept:
        for start, part in ready.reader.parts(name):
            writer.write_bytes(name, start, finite(name, part))
        writer.finish_parts(name)


def _stores(ready: Prepared, blocks_done: int) -> list[ActivationStore]:
    """One store per stream for the hidden states after `blocks_done` blocks."""
    tokens, width = ready.calibration.input_ids.shape[1], ready.spec.stream_width
    in_memory = ready.footprint.hidden_in_memory
    return [
        ActivationStore((rows, tokens, width), None if in_memory else ready.work.hidden_file(k, blocks_done))
        for k, rows in enumerate(ready.stream_rows)
    ]


def _first_states(ready: Prepared) -> list[ActivationStore]:
    """Embeddings of the calibration set, one store per stream."""
    ids = ready.calibration.input_ids
    stores = _stores(ready, 0)
    embed(ready.reader, ready.spec.family.embedding + ".weight", ids, stores)
    return stores


def _restored_states(ready: Prepared, blocks_done: int) -> list[ActivationStore]:
    stores = _stores(ready, blocks_done)
    for k, store in enumerate(stores):
        store.restore(ready.work.hidden_file(k, blocks_done))
    return stores


def _quantize_layer(
    ready: Prepared, layer: int, states: list[ActivationStore]
) -> tuple[list[SolvedLinear], list[ActivationStore]]:
    """Solve block `layer`; returns its linears and the stores of the next hidden states."""
    fetch = shared_fetch(ready)
    skeleton, ids = ready.skeleton, ready.calibration.input_ids
    streams = [Stream(skeleton.block(layer, fetch, ready.reader.gather_rows), store) for store in states]
    context = skeleton.context(layer, ids.shape[1])
    last = layer == ready.spec.num_layers - 1
    prefix, config = ready.spec.layer_prefix(layer), ready.job.gptq
    run = BlockRun(prefix, context, skeleton.device, skeleton.dtype, config, last, ids=ids)
    outputs = states if ready.footprint.hidden_in_memory else _stores(ready, layer + 1)
    del fetch
    return quantize_block(run, ready.spec.blocks[layer], streams, outputs), outputs


def _write_layer(ready: Prepared, writer: PlannedWriter, solved: list[SolvedLinear]) -> dict[str, str]:
    """Write one block's packed tensors; returns name -> sha256 of the pivot tensors that were solved."""
    hashes = {}
    config = ready.job.gptq
    for linear in solved:
        for suffix, tensor in pack_weight(linear.weight, config.bits, config.checkpoint_format).items():
            writer.write(f"{linear.name}.{suffix}", tensor)
        weight = linear.weight
        hashes[linear.name] = content_sha256((weight.codes, weight.scales, weight.zeros, weight.g_idx))
    return hashes


def _run_blocks(ready: Prepared, writer: PlannedWriter, state: dict[str, Any], progress: ProgressFn) -> dict[str, Any]:
    """Blocks from where `state` stands to the last; returns the final progress record."""
    done = int(state["blocks_done"])
    if done == ready.spec.num_layers:
        return state
    states = _restored_states(ready, done) if done else _first_states(ready)
    for layer in range(done, ready.spec.num_layers):
        progress("quantizing blocks", layer, ready.spec.num_layers)
        started = time.perf_counter()
        solved, outputs = _quantize_layer(ready, layer, states)
        hashes = _write_layer(ready, writer, solved)
        writer.sync()
        last = layer == ready.spec.num_layers - 1
        for k, store in enumerate([] if last else outputs):
            store.dump(ready.work.hidden_file(k, layer + 1))
        if outputs is not states:
            for store in states:
                store.close()
        states = outputs
        state = {
            "blocks_done": layer + 1,
            "layers": state["layers"] + [to_json(s.stats) for s in solved],
            "solved_sha256": {**state.get("solved_sha256", {}), **hashes},
            "seconds": state["seconds"] + time.perf_counter() - started,
            "peak_memory_bytes": max(state.get("peak_memory_bytes", 0), peak_rss_bytes()),
        }
        ready.work.commit(state)
    for store in states:
        store.close()
    progress("quantizing blocks", ready.spec.num_layers, ready.spec.num_layers)
    return state


def audit_artifact(ready: Prepared, folder: Path, solved_sha256: dict[str, str], progress: ProgressFn) -> None:
    """Read the artifact back and compare it with the plan, the source and the solver (AuditError otherwise)."""
    artifact = CheckpointReader(folder)
    check_written(ready.shards, artifact)
    check_kept(ready.accounting, ready.reader, artifact)
    config = ready.job.gptq
    for k, weight_name in enumerate(ready.accounting.quantized):
        progress("auditing", k, len(ready.accounting.quantized))
        name = weight_name.removesuffix(".weight")
        if name not in solved_sha256:
            raise AuditError(f"'{name}' should have been quantized and was not")
        packed = {suffix: artifact.read(f"{name}.{suffix}") for suffix in SUFFIXES}
        back = unpack_weight(packed, config.bits, config.checkpoint_format)
        if content_sha256((back.codes, back.scales, back.zeros, back.g_idx)) != solved_sha256[name]:
            raise AuditError(f"'{name}' reads back as other codes or scales than were solved")


def expert_summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of finished layers' statistics: experts by what calibrated them, and the fewest tokens that one was sent."""
    experts = [row for row in layers if row.get("routed_tokens") is not None and row["name"].endswith("down_proj")]
    return {
        "calibrated_by": dict(Counter(str(row["calibrated_by"]) for row in experts)),
        "fewest_routed_tokens": min((int(row["routed_tokens"]) for row in experts), default=0),
    }


def _warnings(ready: Prepared, state: dict[str, Any]) -> tuple[str, ...]:
    """What the calibration set and the experts have to say."""
    found = expert_summary(state["layers"])
    counts = {how: count for how, count in found["calibrated_by"].items() if how != ROUTED}
    lines = tuple(
        f"{count} of {sum(found['calibrated_by'].values())} experts got too few calibration tokens "
        f"(the fewest {found['fewest_routed_tokens']}) and were handled by --expert-policy {how}"
        for how, count in counts.items()
    )
    return (*ready.calibration.warnings, *lines)


def _manifest(
    ready: Prepared, state: dict[str, Any], identity: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    layers = [
        {key: value for key, value in layer.items() if key != "seconds" and value is not None}
        for layer in state["layers"]
    ]
    experts = {"experts": expert_summary(state["layers"])} if ready.spec.expert_count else {}
    return {
        "schema": "qwen-quant/1",
        "method": "gptq" if not ready.job.gptq.rounding_only else "rounding",
        "source": {"id": ready.job.source_id, "revision": ready.job.revision, "sha256": identity["source"]},
        "settings": identity["settings"],
        "calibration": {
            "source": Path(ready.calibration.source).name,  # it is published: no folders of this machine
            "sha256": ready.calibration.sha256,
            "tokens": ready.calibration.tokens,
            "shape": identity["calibration"]["shape"],
            "seed": ready.job.calibration.seed,
        },
        "compute": {"device": identity["device"], "dtype": identity["compute_dtype"]},
        "max_shard_size_bytes": identity["max_shard_size_bytes"],
        "versions": identity["versions"],
        "audit": {
            "quantized": len(ready.accounting.quantized),
            "kept": ready.accounting.kept,
            "dropped_buffers": list(ready.accounting.dropped),
        },
        "warnings": list(_warnings(ready, state)),
        **experts,
        "layers": layers,
        "measured": {**measured, "layer_seconds": {layer["name"]: layer["seconds"] for layer in state["layers"]}},
    }


def quantize_checkpoint(
    job: QuantizeJob, progress: ProgressFn, announce: Callable[[PlanEstimate], None] = lambda estimate: None
) -> QuantizeResult:
    """Run (or resume) a job to its end; `announce` gets the predicted cost before the work starts.

    Errors: InputError for anything wrong with the input, the machine or the output; AuditError (our bug) when the
    written artifact is not what was solved. An interrupted run leaves its work folder; the same command continues it.
    """
    started = time.perf_counter()
    ready = prepare(job)
    ready.work.check_disk(ready.footprint.disk_bytes)
    predicted = estimate(ready)
    announce(predicted)
    progress("hashing the source", 0, 1)
    identity = _run_identity(ready, source_hashes(job.model))
    state = ready.work.open(identity, resume=job.run.resume)
    if state["blocks_done"]:
        logger.info("resuming after block %d of %d", state["blocks_done"], ready.spec.num_layers)
    writer = PlannedWriter(ready.work.artifact, ready.shards)
    try:
        _copy_kept(ready, writer)
        writer.mark_written(f"{layer['name']}.{suffix}" for layer in state["layers"] for suffix in SUFFIXES)
        state = _run_blocks(ready, writer, state, progress)
        writer.finish()
    finally:
        writer.close()
    return _finish(ready, state, identity, (started, progress, predicted))


def _finish(
    ready: Prepared, state: dict[str, Any], identity: dict[str, Any], run: tuple[float, ProgressFn, PlanEstimate]
) -> QuantizeResult:
    """Configs, audit, manifest, rename."""
    folder, job = ready.work.artifact, ready.job
    copied, left = copy_companions(job.model, folder)
    write_configs(folder, ready.spec, job.gptq)
    audit_artifact(ready, folder, state["solved_sha256"], run[1])
    layers = tuple(LayerStats(**layer) for layer in state["layers"])
    peak, seconds = max(state["peak_memory_bytes"], peak_rss_bytes()), time.perf_counter() - run[0]
    measured = {"wall_seconds": seconds, "block_seconds": state["seconds"], "peak_memory_bytes": peak}
    manifest = _manifest(ready, state, identity, measured)
    write_manifest(folder, {**manifest, "companions": {"copied": copied, "left_behind": left}})
    ready.work.publish(force=job.run.force)
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    return QuantizeResult(
        out=job.out,
        layers=layers,
        tokens=ready.calibration.tokens,
        calibration_sha256=ready.calibration.sha256,
        source_bytes=sum(p.stat().st_size for p in ready.reader.files),
        output_bytes=sum(shard.nbytes for shard in ready.shards),
        quantized_parameters=quantized,
        kept_parameters=sum(
            ready.reader.info(n).nbytes // ready.reader.info(n).dtype.itemsize for n in ready.accounting.kept
        ),
        predicted=run[2],
        hidden_state_bytes=ready.footprint.hidden_state_bytes,
        peak_memory_bytes=peak,
        seconds=seconds,
        warnings=_warnings(ready, state),
    )
