"""Reasons why a source does not fit a format, each with the nearest choice that is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen_quant.export.formats import Inexact
from qwen_quant.packing import WORD_BITS
from qwen_quant.recipe import GROUP_SIZES

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

_ROUNDED_UP = 1 + 2**-20  # bounds are computed in FP32


def bits(source: ExportSource, known: tuple[int, ...], why: str) -> list[Inexact]:
    """The format has no such width."""
    if source.facts.bits in known:
        return []
    near = "--format gptq" if source.facts.bits != 8 else "--format gptq or compressed-tensors"
    return [Inexact(f"{source.facts.bits} bit codes", why, near, linears=len(source.linears))]


def group_size(source: ExportSource, known: tuple[int, ...] = GROUP_SIZES) -> list[Inexact]:
    """The format's runtimes lack this group size."""
    size = source.facts.group_size
    if size in known:
        return []
    sizes = ", ".join(str(k) for k in known)
    return [Inexact(f"group_size {size}", f"its runtimes have {sizes}", "--format f32", linears=len(source.linears))]


def act_order(source: ExportSource, why: str) -> list[Inexact]:
    """Groups that are not consecutive columns."""
    linears = source.facts.act_order
    near = "--format gptq_v2, or quantize with --no-desc-act, whose groups every format takes"
    return [Inexact("act-order (desc_act)", why, near, linears=len(linears))] if linears else []


def ragged(source: ExportSource, why: str) -> list[Inexact]:
    """A last group that is shorter than the others."""
    linears = source.facts.ragged
    if not linears:
        return []
    what = f"in_features that group_size {source.facts.group_size} does not divide"
    return [Inexact(what, why, "--format gptq_v2", linears=len(linears))]


def outputs_fill_words(source: ExportSource) -> list[Inexact]:
    """Outputs that do not fill whole words where codes or zeros are packed along them."""
    odd = [name for name in source.linears if source.shape(name)[0] * source.layout.bits % WORD_BITS]
    why = f"zeros are packed along the outputs in {WORD_BITS}-bit words"
    return [Inexact("out_features that do not fill words", why, "--format f32", linears=len(odd))] if odd else []


def fp16_scales(source: ExportSource) -> list[Inexact]:
    """Scales that FP16, which the format stores, cannot hold."""
    facts = source.facts
    if not facts.wide_scales:
        return []
    error = facts.wide_scale_error * _ROUNDED_UP if facts.largest_scale <= 65504 else None
    what, why = f"{str(facts.scale_dtype).removeprefix('torch.')} scales beyond FP16", "the format stores FP16 scales"
    return [Inexact(what, why, "--format compressed-tensors or f32", error, len(facts.wide_scales))]


def rotation_kind(config: dict[str, Any]) -> str:
    """The kind of rotation of positions that a text config asks for: "default", "yarn", "linear", "dynamic", ..."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def zero_zeros(source: ExportSource) -> list[Inexact]:
    """Zeros of 0 in a layout that stores zero - 1."""
    linears = source.facts.zero_zeros
    why = "gptq stores zero - 1, and readers disagree on what 0 - 1 means"
    return [Inexact("zeros of 0", why, "--format gptq_v2", linears=len(linears))] if linears else []
