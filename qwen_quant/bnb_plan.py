"""What a `bnb` run will write: which linears, which skip list, every tensor's dtype and shape.

The linears are those of the family's table that transformers replaces by bitsandbytes modules, found by its own rule on
its own model of the config (meta device).  A linear that it would replace but the table keeps in 16 bit (routers,
gates) goes to the skip list.  Routed experts, which transformers fuses into 3-D parameters that bitsandbytes cannot
hold, are taken apart here and written one by one; transformers reads them where `qwen_quant` is imported
(`runtime/hf_bnb.py`) and stops while loading elsewhere.  Two bounds must hold, or the run stops before it writes:

    weights that nobody asked to skip   at least 90% become codes    (MIN_SUPPORTED_SHARE)
    all weights, --skip included        at least 50% become codes    (MIN_QUANTIZED_SHARE)

"Weights" are the matrices of the decoder's blocks, experts included; tables of embeddings are none.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qwen_quant.bnb import NESTED_BLOCKSIZE, STATE_SUFFIX, blocks_of, int8_shape, is_expert, quant_state
from qwen_quant.checkpoint.audit import FLOAT_DTYPES, Accounting, account
from qwen_quant.checkpoint.families import ModelSpec, read_model_spec
from qwen_quant.checkpoint.manifest import QUANTIZE_CONFIG_FILE
from qwen_quant.checkpoint.reader import DTYPE_NAMES, CheckpointReader, natural_order
from qwen_quant.checkpoint.writer import PlannedShard, PlannedTensor, plan_shards
from qwen_quant.errors import AuditError, InputError
from qwen_quant.models.skeleton import expected_tensors, meta_model
from qwen_quant.preparation import check_output
from qwen_quant.recipe import BnbConfig, RunConfig
from qwen_quant.resume import WorkFolder

MIN_SUPPORTED_SHARE = 0.9
MIN_QUANTIZED_SHARE = 0.5
# bitsandbytes' kernel for CPUs with AVX512-BF16 needs these multiples.
CPU_OUT_MULTIPLE, CPU_IN_MULTIPLE = 32, 64
EXPERTS_WARNING = (
    "the experts are quantized one by one: AutoModelForCausalLM loads them after `import qwen_quant` (with "
    "bitsandbytes installed); without that import it stops with a size mismatch"
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BnbJob:
    """One `bnb` run: `model` (a local folder) to `out`, with where the source came from for the record."""

    model: Path
    out: Path
    bnb: BnbConfig
    run: RunConfig
    source_id: str
    revision: str | None = None


@dataclass(frozen=True)
class Ready:
    """A job with everything that was read and checked before any work.

    Attributes:
        order: names of the source's tensors to write, in the order of the plan.
        accounting: what becomes of each.
        dtype: what transformers loads the model in; tensors stored otherwise are cast to it first.
        settings: quantization_config of the artifact.
        quantized_share: of the weights, 0 to 1.
        warnings: what a user of the artifact should know.
    """

    job: BnbJob
    spec: ModelSpec
    reader: CheckpointReader
    order: tuple[str, ...]
    accounting: Accounting
    dtype: torch.dtype
    settings: dict[str, Any]
    quantized_share: float
    warnings: tuple[str, ...]
    work: WorkFolder


@dataclass(frozen=True)
class _Linears:
    """Module names: all linears of the model, those a loader replaces, tables and linears it skips by default.

    Routed experts are linears here (`models.experts` takes transformers' fused ones apart, and so does our loader).
    """

    every: tuple[str, ...]
    replaced: frozenset[str]
    default_skip: tuple[str, ...]


def _linears(model: PreTrainedModel) -> _Linears:
    every = tuple(name for name, module in model.named_modules() if type(module) is nn.Linear)
    fixed = getattr(model, "_keep_in_fp32_modules", None)
    skip = HfQuantizer.get_modules_to_not_convert(model, None, fixed)
    replaced = frozenset(name for name in every if should_convert_module(name, skip))
    modules = dict(model.named_modules())
    matrices = sorted(name for name in skip if isinstance(modules.get(name), nn.Linear | nn.Embedding))
    return _Linears(every, replaced, tuple(matrices))


def _check_skip(patterns: tuple[str, ...], linears: _Linears) -> None:
    """Every --skip pattern is a regular expression and matches a linear (InputError naming the nearest)."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"--skip {pattern!r} is not a pattern", str(error), "give a module name, e.g. o_proj"
            ) from None
        if not pattern or all(should_convert_module(name, [pattern]) for name in linears.every):
            tails = {name.split(".", depth)[-1] for name in linears.every for depth in range(name.count(".") + 1)}
            near = difflib.get_close_matches(pattern, sorted(tails), n=1, cutoff=0.0)
            raise InputError(
                f"--skip {pattern!r} matches no linear of the model",
                f"the nearest name is '{near[0]}'" if near else "it has none",
                "a pattern is the end of a module's name, its beginning up to a dot, or a regular expression",
            )


def _select(ready: Accounting, linears: _Linears, config: BnbConfig) -> tuple[Accounting, list[str] | None, set[str]]:
    """(what becomes codes, the skip list to save, weights that --skip keeps).

    The skip list is None where transformers' default gives this very selection.
    """
    table = {name.removesuffix(".weight") for name in ready.quantized}
    asked = {name for name in table & linears.replaced if not should_convert_module(name, list(config.skip))}
    chosen = (table & linears.replaced) - asked
    kept = dict(ready.kept)
    for name in sorted(table - chosen):
        kept[f"{name}.weight"] = (
            "kept by --skip" if name in asked else "the model holds it in another form than a linear"
        )
    skip: list[str] | None = None
    if chosen != linears.replaced:
        # A vision checkpoint may be loaded as its text model alone, whose names lack the decoder's own prefix.
        also = {re.sub(r"^(.*\.\d+\.|model\.language_model\.)", "", name) for name in linears.replaced - table}
        skip = [*linears.default_skip, *sorted(also), *config.skip]
        if chosen != {name for name in linears.every if should_convert_module(name, skip)}:
            raise AuditError("no skip list makes transformers replace exactly the linears to quantize", str(skip))
    quantized = tuple(name for name in ready.quantized if name.removesuffix(".weight") in chosen)
    return Accounting(quantized, kept, ready.dropped), skip, {f"{name}.weight" for name in asked}


def _check_share(spec: ModelSpec, reader: CheckpointReader, chosen: Accounting, asked: set[str]) -> float:
    """The share of the weights that become codes (InputError when a bound of the module's docstring is not kept)."""
    matrices = {
        name: math.prod(reader.info(name).shape)
        for name in (*chosen.quantized, *chosen.kept)
        if name.startswith(f"{spec.family.layers_prefix}.")
        and len(reader.info(name).shape) >= 2
        and not spec.is_table(name)
    }
    codes, total = sum(matrices[name] for name in chosen.quantized), sum(matrices.values())
    supported = total - sum(matrices[name] for name in asked)
    if codes < MIN_SUPPORTED_SHARE * supported:
        largest = max(chosen.kept.keys() & matrices.keys() - asked, key=lambda name: matrices[name])
        raise InputError(
            f"{1 - codes / supported:.0%} of the weights would stay in 16 bit, among them '{largest}'",
            "the model does not hold them as linears, and bitsandbytes quantizes linears only",
            "use qwen-quant gptq for this model",
        )
    if codes < MIN_QUANTIZED_SHARE * total:
        raise InputError(
            f"--skip leaves {1 - codes / total:.0%} of the weights in 16 bit",
            f"an artifact must have at least {MIN_QUANTIZED_SHARE:.0%} of its weights quantized",
            "skip fewer modules",
        )
    return codes / total


def _model_dtype(spec: ModelSpec, reader: CheckpointReader) -> torch.dtype:
    """What transformers loads the model in: config.json's dtype, else the embedding's."""
    said = {**spec.text_config, **spec.config}
    name = said.get("dtype") or said.get("torch_dtype")
    stored = reader.info(f"{spec.family.embedding}.weight").dtype
    found = getattr(torch, str(name).removeprefix("torch."), None) if name else stored
    return found if found in FLOAT_DTYPES else stored


def settings_of(config: BnbConfig, skip: list[str] | None) -> dict[str, Any]:
    """quantization_config as transformers writes it for these settings."""
    four = config.quant_type != "int8"
    values: dict[str, Any] = {"load_in_4bit": four, "load_in_8bit": not four, "llm_int8_skip_modules": skip}
    if four:
        compute = _DTYPES["bf16" if config.compute_dtype == "auto" else config.compute_dtype]
        values |= {"bnb_4bit_quant_type": config.quant_type, "bnb_4bit_compute_dtype": compute}
        values |= {"bnb_4bit_use_double_quant": config.double_quant}
    saved = BitsAndBytesConfig(**values, llm_int8_threshold=float(config.int8_threshold)).to_dict()
    return {**dict(sorted(saved.items())), "quant_method": "bitsandbytes"}


def _warnings(reader: CheckpointReader, chosen: Accounting, config: BnbConfig, dtype: torch.dtype) -> tuple[str, ...]:
    found = []
    cast = [name for name in (*chosen.quantized, *chosen.kept) if reader.info(name).dtype not in (dtype, torch.int64)]
    if cast:
        target = DTYPE_NAMES[dtype]
        found.append(f"{len(cast)} tensors are cast to {target} first, config.json's dtype ('{cast[0]}' and so on)")
    if any(is_expert(name) for name in chosen.quantized):
        found.append(EXPERTS_WARNING)
    shapes = {re.sub(r"^.*\.\d+\.", "", name): reader.info(name).shape for name in chosen.quantized}
    odd = [
        f"{n.removesuffix('.weight')} {s[0]} x {s[1]}"
        for n, s in shapes.items()
        if s[0] % CPU_OUT_MULTIPLE or s[1] % CPU_IN_MULTIPLE
    ]
    if odd and config.quant_type != "int8":
        found.append(
            f"bitsandbytes cannot run these on CPUs with AVX512-BF16, which need multiples of {CPU_OUT_MULTIPLE} x "
            f"{CPU_IN_MULTIPLE}: {', '.join(odd)}"
        )
    return tuple(found)


def prepare(job: BnbJob) -> Ready:
    """Read and check everything; nothing is written.

    Errors: InputError for anything wrong with MODEL, OUT or the settings.
    """
    check_output(job.out, force=job.run.force, source=job.model)
    spec = read_model_spec(job.model)
    if "quantization_config" in spec.config or (job.model / QUANTIZE_CONFIG_FILE).is_file():
        raise InputError(
            f"{job.model} is already quantized", next_step="give the BF16 checkpoint that it was made from"
        )
    reader, model = CheckpointReader(job.model), meta_model(spec)
    linears = _linears(model)
    _check_skip(job.bnb.skip, linears)
    chosen, skip, asked = _select(account(spec, reader, expected_tensors(model)), linears, job.bnb)
    share = _check_share(spec, reader, chosen, asked)
    dtype = _model_dtype(spec, reader)
    written = {*chosen.quantized, *chosen.kept}
    return Ready(
        job=job,
        spec=spec,
        reader=reader,
        order=tuple(sorted(written, key=natural_order)),
        accounting=chosen,
        dtype=dtype,
        settings=settings_of(job.bnb, skip),
        quantized_share=share,
        warnings=_warnings(reader, chosen, job.bnb, dtype),
        work=WorkFolder(job.out.absolute()),
    )


def kept_dtype(ready: Ready, name: str) -> torch.dtype:
    """What kept tensor `name` is stored in: the model's dtype, and integers as they are."""
    stored = ready.reader.info(name).dtype
    return ready.dtype if stored in FLOAT_DTYPES else stored


def planned_tensors(ready: Ready, name: str, offset: float | None) -> list[PlannedTensor]:
    """What source tensor `name` becomes; `offset` is its nested_offset with double quantization."""
    config, shape = ready.job.bnb, ready.reader.info(name).shape
    if name in ready.accounting.kept:
        return [PlannedTensor(name, kept_dtype(ready, name), shape)]
    base = name.removesuffix(".weight")
    if config.quant_type == "int8":
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, int8_shape(base, shape)),
            "SCB": (torch.float32, shape[:1]),
            "weight_format": (torch.uint8, ()),
        }
        return [PlannedTensor(f"{base}.{suffix}", *spec) for suffix, spec in parts.items()]
    matrix = (shape[0], shape[1])
    blocks = blocks_of(matrix, config.block_size)
    state = quant_state(config.quant_type, config.block_size, matrix, ready.dtype, offset)
    parts = {
        "weight": (torch.uint8, ((math.prod(shape) + 1) // 2, 1)),
        "weight.absmax": (torch.float32 if offset is None else torch.uint8, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        f"weight.{STATE_SUFFIX}{config.quant_type}": (torch.uint8, tuple(state.shape)),
    }
    if offset is not None:
        parts["weight.nested_absmax"] = (torch.float32, (math.ceil(blocks / NESTED_BLOCKSIZE),))
        parts["weight.nested_quant_map"] = (torch.float32, (256,))
    return [PlannedTensor(f"{base}.{suffix}", *spec) for suffix, spec in parts.items()]


def plan(ready: Ready, offsets: dict[str, float]) -> tuple[PlannedShard, ...]:
    """Every file of the artifact; `offsets` by weight name (double quantization only)."""
    planned = [tensor for name in ready.order for tensor in planned_tensors(ready, name, offsets.get(name))]
    return plan_shards(planned, ready.job.run.max_shard_size_bytes)
