"""What the graph formats (OpenVINO, ONNX) share: facts of a decoder, which models they refuse, packing.

What a block may hold beside attention and one MLP (linear attention, routed experts) is described in `graph_parts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_quant.errors import InputError
from qwen_quant.export.folder import REST_DTYPES, write_config
from qwen_quant.export.formats import Inexact
from qwen_quant.export.rows import row_pieces
from qwen_quant.models.qwen1_rope import inverse_frequencies
from qwen_quant.models.skeleton import meta_model
from qwen_quant.qwen1_fast import write_fast_tokenizer
from qwen_quant.qwen1_to_qwen2 import check_convertible, lost_beyond_length, qwen2_config
from qwen_quant.qwen1_tokenizer import VOCABULARY_FILE
from qwen_quant.resume import write_json_atomically

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

DENSE_FAMILIES = ("qwen", "qwen2", "qwen3")
# What a block has -> its name in the block. The first generation keeps q, k and v in one linear.
ROLES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
FIRST_ROLES = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "gate": "mlp.w2",
    "up": "mlp.w1",
    "down": "mlp.c_proj",
}
_CHANGING = ("dynamic", "longrope")  # rotations that depend on the length of the text


@dataclass(frozen=True)
class Decoder:
    """Sizes and tables of a decoder; every name in the graph is the tensor's name on disk.

    Attributes:
        blocks, embedding, final_norm, head: names of the modules, e.g. "model.layers", without ".weight".
        roles: what a block has -> its name in the block (ROLES or FIRST_ROLES).
        model_type: whose function the graph computes: that of config.json (of its text part), for the first generation
            "qwen2".
        layers, hidden, heads, kv_heads, head_dim: counts and widths.
        eps: of RMSNorm.
        inv_freq: FP32 [rotated / 2], radians per position of the first `rotated` values of a head; rope_scale: factor
            of cosine and sine.
        tied: the head is the embedding.
        vocabulary, context: rows of the embedding, longest text in tokens.
    """

    blocks: str
    embedding: str
    final_norm: str
    head: str
    roles: Mapping[str, str]
    model_type: str
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

    def name(self, index: int, role: str) -> str:
        """Name of the module that has `role` in block `index`; "" when the family has none."""
        return f"{self.blocks}.{index}.{self.roles[role]}" if role in self.roles else ""


def read_decoder(source: ExportSource) -> Decoder:
    """The decoder of a source that `refusals` lets pass; rotation tables are transformers' own."""
    spec, model = source.spec, meta_model(source.spec)
    family, first = spec.family, spec.family.model_type == "qwen"
    if first:
        config: dict[str, Any] = qwen2_config(model.config, spec.config, torch.float32)
        inv_freq, scale = inverse_frequencies(model.config.rotary_dim, model.config.rotary_emb_base, 1.0), 1.0
    else:
        inner: Any = model.get_decoder()
        config = inner.config.to_dict()
        rotary = type(inner.rotary_emb)(config=inner.config)
        inv_freq, scale = rotary.inv_freq, float(rotary.attention_scaling)
    heads = int(config["num_attention_heads"])
    return Decoder(
        blocks=family.layers_prefix,
        embedding=family.embedding,
        final_norm=family.final_norm,
        head=family.head,
        roles=FIRST_ROLES if first else ROLES,
        model_type=str(config["model_type"]),
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or spec.hidden_size // heads),
        eps=float(config["rms_norm_eps"]),
        inv_freq=inv_freq.to(torch.float32),
        rope_scale=scale,
        tied=spec.tied_head,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
    )


def write_companions(source: ExportSource, folder: Path, rest: str | None) -> None:
    """config.json, and for the first generation, which the graph computes as Qwen2, also its tokenizer.json."""
    if source.spec.family.model_type != "qwen":
        write_config(source, folder, None, rest)
        return
    dtype = REST_DTYPES[rest] if rest else source.reader.info(f"{source.spec.family.embedding}.weight").dtype
    config: Any = meta_model(source.spec).config
    write_json_atomically(folder / "config.json", qwen2_config(config, source.spec.config, dtype))
    if (source.folder / VOCABULARY_FILE).is_file():
        write_fast_tokenizer(source.folder, folder)
        (folder / VOCABULARY_FILE).unlink(missing_ok=True)


def notes_of(source: ExportSource) -> list[str]:
    """What the graph loses of a first-generation model past its trained length."""
    if source.spec.family.model_type != "qwen":
        return []
    config: Any = meta_model(source.spec).config
    lost = lost_beyond_length(config)
    return [f"exact up to {config.seq_length} tokens; past them the graph lacks {' and '.join(lost)}"] if lost else []


def refusals(source: ExportSource, runtime: str, families: Sequence[str]) -> list[Inexact]:
    """Why the graph of this model is not one of those that are written for `runtime` (empty when it is)."""
    config, family = source.spec.text_config, source.spec.family.model_type
    near = "--format gptq, awq or compressed-tensors"
    if family not in families:
        return [Inexact(f"family {family}", f"{runtime} graphs are written for {', '.join(families)}", near)]
    if family == "qwen":
        return _first_refusals(source, near)
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


def _first_refusals(source: ExportSource, near: str) -> list[Inexact]:
    """Why a first-generation model is not Qwen2 under other names (empty when it is)."""
    config: Any = meta_model(source.spec).config
    try:
        check_convertible(config, source.spec.config)
    except InputError as error:
        return [Inexact(error.what, error.why or "the graph computes Qwen2", near)]
    return []


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
