"""MLX folders ("affine" quantization): the same codes and groups, with FP32 scales and biases.

Tensors of one linear [out, in] with G groups of consecutive columns:

    weight  uint32 [out, in * bits / 32]   exactly `PackedRows.stream` as 32-bit words
    scales  FP32   [out, G]
    biases  FP32   [out, G]                -zero * scale

MLX computes code * scale + bias. In FP32 both terms and their sum are exact for FP16 and BF16 scales, so the weights
are those of the source, bit for bit.  mlx-lm keeps the routed experts of a block in stacks, `mlp.switch_mlp.*`
[experts, ...], and looks for quantized experts only under those names.

Families with linear attention are written as mlx-lm's own conversion leaves them: norms as FP32 1 + weight (which is
what the model computes; in BF16 it would be rounded), convolutions as [channels, width, 1], text decoder only.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint.halves import SubBlock
from qwen_quant.checkpoint.writer import PlannedShard, PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.export import checks
from qwen_quant.export.behind import Behind, write_part, write_tensor
from qwen_quant.export.folder import REST_DTYPES, Steps, items, kept_dtype, write_items, write_kept
from qwen_quant.export.formats import ExportOptions, ExportPlan, Format, Inexact, Piece, Target, require
from qwen_quant.export.hybrid import adds_one, full_attention_interval, is_hybrid, is_vision, one_plus
from qwen_quant.export.stacks import Place, place_of
from qwen_quant.progress import ProgressFn
from qwen_quant.resume import write_json_atomically

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

SUFFIXES = ("weight", "scales", "biases")
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 8)
# Families by what mlx-lm calls them.
MODEL_TYPES = {
    **{name: name for name in ("qwen", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next")},
    **{name: name.removesuffix("_text") for name in ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")},
}
_ALL_SPARSE = ("qwen2_moe", "qwen3_5_moe")  # of mlx-lm's models, those that have experts in every block
_ROTATIONS = ("default", "linear", "yarn", "llama3")  # those that do not change with the length of the text
_ROUNDING = 2.0**-20  # of the largest scale times code: FP32 products of FP32 scales are rounded


def _place(source: ExportSource, name: str) -> Place:
    return place_of(source.spec, name, "switch_mlp")


def _specs(source: ExportSource, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of one linear, without a stack."""
    (out, width), groups = source.shape(name), source.groups(name)
    words = (out, width * source.facts.bits // 32)
    return dict(
        zip(
            SUFFIXES,
            ((torch.uint32, words), (torch.float32, (out, groups)), (torch.float32, (out, groups))),
            strict=True,
        )
    )


def tensors_of(source: ExportSource, name: str) -> dict[str, Tensor]:
    """Suffix -> tensor of one linear."""
    packed = source.packed(name)
    scales = packed.grid.scales.float()
    return {
        "weight": packed.stream.view(torch.uint32),
        "scales": scales.contiguous(),
        "biases": (-packed.grid.zeros.float() * scales).contiguous(),
    }


def _check(source: ExportSource) -> list[Inexact]:
    facts, family = source.facts, source.spec.config.get("model_type", "")
    found = [
        *checks.bits(source, BITS, "MLX has no such width"),
        *checks.group_size(source, GROUP_SIZES),
        *checks.act_order(source, "MLX groups are consecutive columns"),
        *checks.ragged(source, "MLX groups are equal"),
    ]
    if facts.wide_scales and facts.scale_dtype == torch.float32:
        error = facts.largest_scale * 2**facts.bits * _ROUNDING
        found.append(
            Inexact("FP32 scales", "code * scale is rounded in FP32", "--format f32", error, len(facts.wide_scales))
        )
    return [*found, *_model_refusals(source, family)]


def _model_refusals(source: ExportSource, family: str) -> list[Inexact]:
    """Why mlx-lm's model of this family is not the source's (empty when it is)."""
    spec, near = source.spec, "--format gptq, awq or compressed-tensors"
    if family not in MODEL_TYPES:
        return [Inexact(f"family {family}", "mlx-lm has no such model", near)]
    found = []
    dense = [k for k, halves in enumerate(spec.blocks) if isinstance(halves[1], SubBlock)]
    if spec.expert_count and dense and MODEL_TYPES[family] in _ALL_SPARSE:
        why = f"mlx-lm's {MODEL_TYPES[family]} has experts in every block"
        found.append(Inexact("blocks without experts", why, near, linears=3 * len(dense)))
    if is_hybrid(spec) and full_attention_interval(spec) is None:
        why = "mlx-lm has full attention in every n-th block"
        found.append(Inexact("the order of attention kinds", why, near))
    kind = checks.rotation_kind(spec.text_config)
    known = (*_ROTATIONS[:2],) if MODEL_TYPES[family] == "qwen2_moe" else _ROTATIONS
    if kind not in known:
        found.append(Inexact(f"the rotation {kind!r}", f"mlx-lm's {MODEL_TYPES[family]} has {', '.join(known)}", near))
    if family == "qwen2_moe" and (spec.tied_head or spec.config.get("norm_topk_prob")):
        why = "mlx-lm's qwen2_moe has a head of its own and takes routing weights as they are"
        found.append(Inexact("a tied head or norm_topk_prob", why, near))
    return found


def _is_left_out(source: ExportSource, name: str) -> bool:
    """Kept tensors that mlx-lm's model has no place for."""
    return source.spec.is_passenger(name) or is_vision(source.spec, name)


def _kept_spec(source: ExportSource, name: str, options: ExportOptions) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of a kept tensor in the file."""
    shape = source.reader.info(name).shape
    if adds_one(source.spec, name):
        return torch.float32, shape
    if name.endswith("conv1d.weight"):  # [channels, 1, width]: the same bytes in the other order of dimensions
        shape = (shape[0], shape[2], 1)
    return kept_dtype(source, name, options), shape


def _written(source: ExportSource) -> list[str]:
    """Linears and kept tensors of the file, in order."""
    return [name for name in items(source) if not _is_left_out(source, name)]


def _shards(source: ExportSource, options: ExportOptions) -> tuple[PlannedShard, ...]:
    linears, planned = set(source.linears), []
    for name in _written(source):
        if name not in linears:
            planned.append(PlannedTensor(name, *_kept_spec(source, name, options)))
            continue
        place = _place(source, name)
        if place.index == 0:
            for suffix, (dtype, shape) in _specs(source, name).items():
                stacked = (place.stack, *shape) if place.stack else shape
                planned.append(PlannedTensor(f"{place.module}.{suffix}", dtype, stacked))
    return plan_shards(planned, options.max_shard_size_bytes)


def _plan(source: ExportSource, options: ExportOptions) -> ExportPlan:
    shards = _shards(source, options)
    notes: tuple[str, ...] = ()
    if source.spec.config.get("model_type") == "qwen":
        notes = ("mlx-lm has no dynamic NTK and no LogN: the model is exact up to its seq_length",)
    why = "mlx-lm runs the text decoder, without multi-token prediction"
    dropped = {**source.dropped, **{name: why for name in source.kept if _is_left_out(source, name)}}
    return ExportPlan(sum(shard.nbytes for shard in shards), len(shards), dropped, notes)


def _write(source: ExportSource, options: ExportOptions, target: Target, progress: ProgressFn) -> None:
    """Write every linear and kept tensor; continues after the item that `target.state` counts last."""
    linears, names = set(source.linears), _written(source)
    done, writer = int(target.state.get("items_done", 0)), PlannedWriter(target.folder, _shards(source, options))
    for name in names[:done]:
        place = _place(source, name)
        if name not in linears:
            writer.mark_written([name])
        elif place.index + 1 >= place.stack:
            writer.mark_written([f"{place.module}.{suffix}" for suffix in SUFFIXES])

    def write_item(name: str, behind: Behind) -> int:
        if name in linears:
            return _write_linear(source, writer, behind, name)
        if adds_one(source.spec, name):
            return write_tensor(writer, behind, name, one_plus(source.reader.read(name)))
        return write_kept(source, writer, behind, name, kept_dtype(source, name, options))

    write_items(writer, target, names[done:], write_item, Steps(progress, done, len(names)))
    _write_config(source, target.folder, options)


def _write_linear(source: ExportSource, writer: PlannedWriter, behind: Behind, name: str) -> int:
    """Write one linear to its place; returns its bytes."""
    place, count = _place(source, name), 0
    for suffix, tensor in tensors_of(source, name).items():
        count += write_part(writer, behind, f"{place.module}.{suffix}", place.index * tensor.nbytes, tensor)
    if place.index + 1 >= place.stack:
        for suffix in SUFFIXES:
            writer.finish_parts(f"{place.module}.{suffix}")
    return count


def _write_config(source: ExportSource, folder: Path, options: ExportOptions) -> None:
    """config.json as mlx-lm writes it. `rope_theta` stands at the top, or mlx-lm takes 1e6 in silence."""
    facts, spec = source.facts, source.spec
    settings: dict[str, Any] = {"group_size": facts.group_size, "bits": facts.bits, "mode": "affine"}
    config = {key: value for key, value in spec.config.items() if key not in ("auto_map", "quantization_config")}
    config["model_type"] = MODEL_TYPES[config["model_type"]]
    text = config
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"] = {**config["text_config"], "tie_word_embeddings": spec.tied_head}
    rope = text.get("rope_parameters") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            text.setdefault(key, rope[key])
    if checks.rotation_kind(text) != "default" and not text.get("rope_scaling"):  # where most models of mlx-lm look
        text["rope_scaling"] = {**rope, "type": checks.rotation_kind(text)}
    if is_hybrid(spec):
        text["full_attention_interval"] = full_attention_interval(spec)
    if spec.expert_count:  # what transformers takes where these are not said
        plain = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": is_hybrid(spec)}
        for key, value in {"num_experts": spec.expert_count, **plain}.items():
            text.setdefault(key, value)
    if options.rest is not None:
        text["dtype" if "dtype" in text else "torch_dtype"] = str(REST_DTYPES[options.rest]).removeprefix("torch.")
    write_json_atomically(
        folder / "config.json", {**config, "quantization": settings, "quantization_config": {**settings}}
    )


def _as_torch(array: Any) -> Tensor:
    """An MLX array, bit for bit; numpy has no BF16, so it goes through 16-bit integers."""
    core = require("mlx.core", "mlx", "mlx")
    if array.dtype == core.bfloat16:
        return torch.from_numpy(np.array(array.view(core.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _read_back(folder: Path, source: ExportSource) -> Iterator[Piece]:
    core = require("mlx.core", "mlx", "mlx")
    facts, arrays = source.facts, {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays.update(core.load(str(path)))  # lazy: a tensor is read when it is needed
    with core.stream(core.cpu):
        for name in source.linears:
            place = _place(source, name)
            last = place.index + 1 >= place.stack  # what has been read stays in memory as long as it is held
            names = [f"{place.module}.{suffix}" for suffix in SUFFIXES]
            parts = [arrays.pop(part) if last else arrays[part] for part in names]
            parts = [part[place.index] for part in parts] if place.stack else parts
            yield Piece(name, _as_torch(core.dequantize(*parts, group_size=facts.group_size, bits=facts.bits)))
        for name in (name for name in source.kept if not _is_left_out(source, name)):
            values = _as_torch(arrays.pop(name)).view(source.reader.info(name).shape)
            yield Piece(name, values, meaning=one_plus if adds_one(source.spec, name) else None)


MLX = Format(
    name="mlx",
    summary="MLX affine: FP32 scales and biases, consecutive groups, symmetric or not",
    runtimes=("mlx-lm",),
    extra="mlx",
    check=_check,
    plan=_plan,
    write=_write,
    read_back=_read_back,
    read_with=lambda: f"mlx {metadata.version('mlx')}",
    rests=tuple(REST_DTYPES),
    packages=("mlx.core",),
)
