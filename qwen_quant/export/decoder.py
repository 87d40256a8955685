"""What the graph formats (OpenVINO, ONNX) share: facts of a plain dense decoder, which models they refuse, packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.export.formats import Inexact
from qwen_quant.export.rows import row_pieces
from qwen_quant.models.skeleton import meta_model

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

FAMILIES = ("qwen2", "qwen3")
_CHANGING = ("dynamic", "longrope")  # rotations that depend on the length of the text


@dataclass(frozen=True)
class Decoder:
    """Sizes and tables of a decoder; every name in the graph is the tensor's name on disk.

    Attributes:
        prefix: of the decoder's tensors, e.g. "model."; head: name of the head's linear.
        layers, hidden, heads, kv_heads, head_dim: counts and widths.
        eps: of RMSNorm.
        inv_freq: FP32 [head_dim / 2], radians per position; rope_scale: factor of cosine and sine.
        tied: the head is the embedding.
        vocabulary, context: rows of the embedding, longest text in tokens.
    """

    prefix: str
    head: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inv_freq: Tensor
    rope_scale: float
    tied: bool
    vocabulary: int
    context: int

    def layer(self, index: int) -> str:
        """Prefix of block `index`."""
        return f"{self.prefix}layers.{index}."


def read_decoder(source: ExportSource) -> Decoder:
    """The decoder of a source of one of FAMILIES; rotation tables are transformers' own."""
    spec, config = source.spec, source.spec.config
    heads = int(config["num_attention_heads"])
    inner: Any = meta_model(spec).get_decoder()
    rotary = type(inner.rotary_emb)(config=inner.config)
    return Decoder(
        prefix=spec.family.layers_prefix.removesuffix("layers"),
        head=spec.family.head,
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or spec.hidden_size // heads),
        eps=float(config["rms_norm_eps"]),
        inv_freq=rotary.inv_freq.to(torch.float32),
        rope_scale=float(rotary.attention_scaling),
        tied=spec.tied_head,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
    )


def refusals(source: ExportSource, runtime: str) -> list[Inexact]:
    """Why the graph of this model is not one of those written here (empty when it is)."""
    config = source.spec.config
    family, near = str(config.get("model_type", "")), "--format gptq, awq or compressed-tensors"
    if family not in FAMILIES:
        return [Inexact(f"family {family}", f"{runtime} graphs are written for {' and '.join(FAMILIES)}", near)]
    found = []
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in _CHANGING:
        found.append(Inexact(f"rope type {kind}", "its rotation changes with the length of the text", near))
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    if config.get("use_sliding_window") or sliding:
        found.append(Inexact("a sliding window", "the graph attends to the whole text", near))
    if config.get("hidden_act", "silu") != "silu":
        found.append(Inexact(f"hidden_act {config['hidden_act']}", "the graph computes silu", near))
    return found


def kept_parts(source: ExportSource, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of a kept tensor in `dtype`, about 32 MiB at a time (InputError when a value would become infinite)."""
    for start, stop in row_pieces(source.reader.info(name)):
        rows = source.kept_rows(name, start, stop)
        values = rows.to(dtype)
        if values.dtype != rows.dtype and bool((values.isinf() & ~rows.isinf()).any()):
            raise InputError(
                f"'{name}' has values that {dtype} cannot hold", "they would become infinite", "use --rest bf16 or f32"
            )
        yield values


def packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """uint8 [out, G] -> [out, ceil(G * bits / 8)]; an odd nibble at the end of a row is 0."""
    if bits == 8:
        return zeros.contiguous()
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    return (even[:, 0::2] | even[:, 1::2] << 4).contiguous()


def unpacked_zeros(packed: Tensor, groups: int, bits: int) -> Tensor:
    """The inverse of `packed_zeros`: uint8 [out, G]."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :groups].contiguous()
