"""From a job to everything that can be read, checked and planned before any work is done."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen_quant.calibration import CalibrationSet, load_calibration
from qwen_quant.checkpoint.audit import Accounting, account
from qwen_quant.checkpoint.families import ModelSpec, read_model_spec
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, QUANTIZE_CONFIG_FILE
from qwen_quant.checkpoint.reader import CheckpointReader, natural_order
from qwen_quant.checkpoint.writer import PlannedShard, PlannedTensor, plan_shards
from qwen_quant.errors import InputError
from qwen_quant.memory import Footprint, check_fits, footprint, stream_rows
from qwen_quant.models.skeleton import Skeleton, compute_dtype, expected_tensors
from qwen_quant.packing import SUFFIXES, packed_specs
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.resume import WorkFolder
from qwen_quant.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeJob:
    """One `gptq` run: `model` (a local folder) to `out`, with where the source came from for the record."""

    model: Path
    out: Path
    gptq: GPTQConfig
    calibration: CalibrationConfig
    run: RunConfig
    source_id: str
    revision: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A job with everything that was read and checked before any work."""

    job: QuantizeJob
    spec: ModelSpec
    reader: CheckpointReader
    skeleton: Skeleton
    accounting: Accounting
    shards: tuple[PlannedShard, ...]
    calibration: CalibrationSet
    footprint: Footprint
    work: WorkFolder

    @property
    def stream_rows(self) -> tuple[int, ...]:
        """Calibration rows of the quantized stream and, with asymmetric calibration, of the full-precision one."""
        return stream_rows(self.job.gptq, *self.calibration.input_ids.shape)


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu" or "cuda" (InputError when CUDA is asked for and absent)."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "no CUDA device is available", next_step="use --device cpu, or check the driver: qwen-quant doctor"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_output(out: Path, *, force: bool, source: Path | None = None) -> None:
    """OUT may be built: absent or to be replaced, not around `source`, its parent writable (else InputError).

    What --force replaces is a model folder or an empty one; nobody's other files go with a mistyped OUT.
    """
    if out.is_symlink():
        step = f"give {out.resolve()} itself as OUT"
        raise InputError(f"{out} is a link", "the link would be replaced, not what it names", step)
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"OUT {out} holds MODEL", "replacing it would delete the source", "give another OUT")
    if out.exists() and not force:
        raise InputError(
            f"{out} exists",
            "nothing is overwritten",
            "give another OUT, or add --force to replace it when the new one is complete",
        )
    if out.exists() and not _is_model_folder(out):
        raise InputError(
            f"{out} is no model folder", "--force replaces nothing else", "move it away, or give another OUT"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} does not exist", next_step=f"make it first: mkdir -p {parent}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".qwen-quant-", dir=parent))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{parent} is not writable", reason, "give an OUT in a folder you may write to") from error


def _is_model_folder(out: Path) -> bool:
    """Whether it is a folder with a checkpoint, an artifact or an export in it, or an empty one."""
    known = ("config.json", MANIFEST_FILE)
    return out.is_dir() and (any((out / name).is_file() for name in known) or not any(out.iterdir()))


def plan_tensors(reader: CheckpointReader, accounting: Accounting, config: GPTQConfig) -> list[PlannedTensor]:
    """Every tensor of the artifact in the source's order: kept ones as they are, linears as their packed four."""
    quantized = set(accounting.quantized)
    planned = []
    for name in sorted(reader.names, key=natural_order):
        info = reader.info(name)
        if name in quantized:
            base = name.removesuffix(".weight")
            specs = packed_specs(info.shape[1], info.shape[0], config.bits, config.group_size)
            planned += [PlannedTensor(f"{base}.{suffix}", *specs[suffix]) for suffix in SUFFIXES]
        elif name in accounting.kept:
            planned.append(PlannedTensor(name, info.dtype, info.shape))
    return planned


def _calibration(job: QuantizeJob, spec: ModelSpec) -> CalibrationSet:
    """The calibration set, with a warning where its rows are longer than the model was made for."""
    found, limit = load_calibration(job.calibration, load_tokenizer(job.model)), spec.trained_length
    if limit is None or found.input_ids.shape[1] <= limit:
        return found
    line = f"rows of {found.input_ids.shape[1]} calibration tokens are longer than the {limit} of config.json"
    logger.warning("%s", line)
    return dataclasses.replace(found, warnings=(*found.warnings, line))


def prepare(job: QuantizeJob, *, writing: bool = True) -> Prepared:
    """Read and check everything a run needs; nothing is written. `writing` is False for a mere plan."""
    if writing:
        check_output(job.out, force=job.run.force, source=job.model)
    spec = read_model_spec(job.model)
    if "quantization_config" in spec.config or (job.model / QUANTIZE_CONFIG_FILE).is_file():
        raise InputError(
            f"{job.model} is already quantized", next_step="give the BF16 checkpoint that it was made from"
        )
    reader = CheckpointReader(job.model)
    device = resolve_device(job.run.device)
    skeleton = Skeleton(spec, device, compute_dtype(device))
    accounting = account(spec, reader, expected_tensors(skeleton.model))
    shards = plan_shards(plan_tensors(reader, accounting, job.gptq), job.run.max_shard_size_bytes)
    calibration = _calibration(job, spec)
    need = footprint(spec, reader, job.gptq, (calibration.input_ids.shape[0], calibration.input_ids.shape[1]))
    if writing:
        check_fits(need)
    return Prepared(job, spec, reader, skeleton, accounting, shards, calibration, need, WorkFolder(job.out.absolute()))


def finite(name: str, values: Tensor) -> Tensor:
    """`values` unchanged (InputError naming the tensor when one is NaN or Inf)."""
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"'{name}' holds NaN or Inf", "a quantized copy would spread it", "fetch the checkpoint again")
    return values


def shared_fetch(ready: Prepared) -> Callable[[str], Tensor]:
    """fetch() for one block that reads and checks each tensor once, so that two streams share its memory."""
    read: dict[str, Tensor] = {}

    def fetch(name: str) -> Tensor:
        if name not in read:
            read[name] = finite(name, ready.reader.read(name)).to(ready.skeleton.device)
        return read[name]

    return fetch
