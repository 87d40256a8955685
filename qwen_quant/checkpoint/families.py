"""config.json -> ModelSpec: one table of families, one reader for it.

A family says, in its checkpoint's own names, which linears of a block share an input and which linear ends each
sub-block; everything else about the model comes from transformers' definition of it.  To add a family: one row in
FAMILIES, plus whatever is truly new in its block.  Blocks of one model may differ: linear attention instead of
attention, routed experts instead of one MLP; `ModelSpec.sub_blocks(layer)` says what stands where.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.halves import Family, Half, KeepRules, SparseBlock, SubBlock
from qwen_quant.errors import InputError

__all__ = [
    "FAMILIES",
    "FIRST_RELEASE_KEYS",
    "Family",
    "Half",
    "ModelSpec",
    "SparseBlock",
    "SubBlock",
    "model_spec",
    "read_config",
    "read_model_spec",
]


_LENGTH_KEYS = ("max_position_embeddings", "seq_length", "n_positions")


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's architecture: the family row and its config.json (both as read), and what stands in each block."""

    family: Family
    config: dict[str, Any]
    num_layers: int
    hidden_size: int
    tied_head: bool
    blocks: tuple[tuple[Half, ...], ...]

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the text decoder."""
        return _text_config(self.config)

    @property
    def trained_length(self) -> int | None:
        """The context length that config.json promises, in tokens (None: it promises none)."""
        return next((value for key in _LENGTH_KEYS if isinstance(value := self.text_config.get(key), int)), None)

    @property
    def stream_copies(self) -> int:
        """How many hidden states wide the residual stream is; each starts as the embedding."""
        return int(self.text_config.get("hc_count") or 4) if self.family.hyper else 1

    @property
    def stream_width(self) -> int:
        """Values per token between blocks."""
        return self.hidden_size * self.stream_copies

    def is_table(self, name: str) -> bool:
        """Whether tensor `name` is a table that is read by rows and never whole."""
        return any(re.fullmatch(pattern, name) for pattern in self.family.tables)

    def layer_prefix(self, layer: int) -> str:
        """Disk prefix of block `layer`, with its closing dot."""
        return f"{self.family.layers_prefix}.{layer}."

    def linear_names(self) -> tuple[str, ...]:
        """Full names (without ".weight") of every linear to quantize, in solving order."""
        return tuple(
            self.layer_prefix(i) + name
            for i in range(self.num_layers)
            for half in self.blocks[i]
            for name in half.linears()
        )

    def kinds(self) -> dict[tuple[Half, ...], tuple[int, ...]]:
        """The different kinds of block, each with the numbers of its blocks."""
        found: dict[tuple[Half, ...], list[int]] = {}
        for layer, halves in enumerate(self.blocks):
            found.setdefault(halves, []).append(layer)
        return {halves: tuple(layers) for halves, layers in found.items()}

    def row_parallel(self) -> frozenset[str]:
        """Names in a block of the linears whose inputs a tensor-parallel split cuts: those that end a half."""
        halves = [half for halves in self.kinds() for half in halves]
        outputs = {half.output for half in halves if isinstance(half, SubBlock)}
        for half in halves:
            if isinstance(half, SparseBlock):
                outputs |= {half.expert(k).output for k in range(half.count)}
                outputs |= {half.shared.output} if half.shared else set()
        return frozenset(outputs)

    @property
    def expert_count(self) -> int:
        """Routed experts of a sparse block (0 where no block is sparse)."""
        return max((h.count for halves in self.kinds() for h in halves if isinstance(h, SparseBlock)), default=0)

    def is_passenger(self, name: str) -> bool:
        """Whether `name` is carried through although the model has no module for it."""
        return any(re.fullmatch(pattern, name) for pattern in self.family.passengers)

    def keep_reason(self, name: str) -> str | None:
        """The rule by which parameter `name` stays 16-bit, or None when no rule covers it."""
        return next((reason for pattern, reason in self.family.keep_rules if re.fullmatch(pattern, name)), None)


_DENSE_BLOCK = (
    SubBlock(
        "input_layernorm",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        takes_context=True,
    ),
    SubBlock("post_attention_layernorm", "mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)
_DENSE_KEEP: KeepRules = (
    (r"model\.embed_tokens\.weight", "embeddings stay 16-bit"),
    (r"lm_head\.weight", "the output head stays 16-bit"),
    (r".*norm\.weight", "normalization weights stay 16-bit"),
    (r".*\.bias", "biases stay 16-bit"),
)


def _dense(model_type: str) -> Family:
    return Family(model_type, _DENSE_BLOCK, "model.layers", "model.embed_tokens", "model.norm", "lm_head", _DENSE_KEEP)


# First generation: config.json keys of the release of August 2023 and what they are called since.
FIRST_RELEASE_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}
_FIRST_GENERATION = Family(
    model_type="qwen",
    sub_blocks=(  # the solving order of the published Int4 artifacts
        SubBlock("ln_1", "attn", ("attn.c_attn",), "attn.c_proj", takes_context=True),
        SubBlock("ln_2", "mlp", ("mlp.w1", "mlp.w2"), "mlp.c_proj"),
    ),
    layers_prefix="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    keep_rules=(
        (r"transformer\.wte\.weight", "embeddings stay 16-bit"),
        (r"lm_head\.weight", "the output head stays 16-bit"),
        (r"transformer\.(h\.\d+\.)?ln_\w+\.weight", "normalization weights stay 16-bit"),
        (r".*\.bias", "biases stay 16-bit"),
    ),
    key_aliases=tuple(FIRST_RELEASE_KEYS.items()),
)

_SHARED_EXPERT = SubBlock(
    "post_attention_layernorm",
    "mlp.shared_expert",
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_expert.down_proj",
    joins_residual=False,
)
_ROUTER_KEEP: KeepRules = ((r".*\.mlp\.gate\.weight", "routers stay 16-bit: a changed choice of experts costs most"),)
_SHARED_KEEP: KeepRules = ((r".*\.mlp\.shared_expert_gate\.weight", "the shared expert's gate has one output"),)
_LINEAR_KEEP: KeepRules = (
    (r".*\.linear_attn\.conv1d\.weight", "convolutions stay 16-bit"),
    (r".*\.linear_attn\.(A_log|dt_bias)", "decay rates of linear attention stay 16-bit"),
    (r".*\.linear_attn\.in_proj_(ba|a|b)\.weight", "small projections of linear attention stay 16-bit"),
    (r"mtp\..*", "multi-token prediction is carried through unchanged"),
)
_VISION_KEEP: KeepRules = (
    (r"model\.visual\..*", "the vision tower stays 16-bit"),
    (r"model\.language_model\.embed_tokens\.weight", "embeddings stay 16-bit"),
)
_ROUTER_SKIPS = (r".*\.mlp\.gate$",)
_SHARED_SKIPS = (r".*shared_expert_gate.*",)
_LINEAR_SKIPS = (r".*\.in_proj_(ba|a|b)$", r".*mtp.*")
_HASH_CONSTANTS = r".*\.ple\.ple_embedding\.(layer_multipliers|ngram_heads_\w+)"  # computed from config.json
_HYPER_KEEP: KeepRules = (
    (r".*hyper_connection(_mixer)?\..*", "hyper-connections stay 16-bit: every block reads through them"),
    (r".*\.self_attn\.indexer\..*", "the indexer stays 16-bit: it chooses what attention sees"),
    (_HASH_CONSTANTS, "constants of the n-gram hash, not weights"),
    (r".*\.ple\..*", "n-gram tables and their projections stay 16-bit"),
)
_HYPER_SKIPS = (r".*hyper_connection.*", r".*\.indexer\..*", r".*\.ple\..*")
_NOT_FOR_HYPER_LINEAR = ("position_embeddings", "attention_mask", "past_key_values", "conv_mask", "ple_input_ids")
# Arguments of a block that transformers' own blocks keep from their linear attention.
_NOT_FOR_LINEAR = ("position_embeddings", "position_ids", "past_key_values")


def _linear_mixer(*inputs: str) -> SubBlock:
    """A linear-attention half with these large input projections."""
    names = tuple(f"linear_attn.{name}" for name in inputs)
    return SubBlock("input_layernorm", "linear_attn", names, "linear_attn.out_proj", True, _NOT_FOR_LINEAR)


def _sparse(row: Family, *, shared: bool) -> Family:
    """`row` with routed experts, and a shared one or not."""
    rules = (*row.keep_rules, *_ROUTER_KEEP, *(_SHARED_KEEP if shared else ()))
    skips = (*row.skips, *_ROUTER_SKIPS, *(_SHARED_SKIPS if shared else ()))
    return replace(row, sparse=True, shared=_SHARED_EXPERT if shared else None, keep_rules=rules, skips=skips)


def _hybrid(row: Family, mixer: SubBlock) -> Family:
    """`row` with linear attention in the blocks that layer_types names."""
    rules, skips = (*row.keep_rules, *_LINEAR_KEEP), (*row.skips, *_LINEAR_SKIPS)
    return replace(row, linear_mixer=mixer, keep_rules=rules, skips=skips, passengers=(r"mtp\..*",))


def _vision(row: Family, model_type: str) -> Family:
    """`row` as the text decoder of the vision model `model_type`."""
    return replace(
        row,
        model_type=model_type,
        layers_prefix="model.language_model.layers",
        embedding="model.language_model.embed_tokens",
        final_norm="model.language_model.norm",
        keep_rules=(*row.keep_rules, *_VISION_KEEP),
        skips=(*row.skips, r".*visual.*"),
        has_vision=True,
    )


def _hyper(row: Family) -> Family:
    """`row` with hyper-connections, a sparse-attention indexer, and n-gram tables in some blocks (qwen4_exp).

    `models/hyper.py` gives every block the modules that are named here: `attn_input` and `mlp_input` mix the streams
    into what the half reads, `attn_join` and `mlp_join` add its output to each of them.
    """
    mixer, mlp = row.sub_blocks
    assert row.linear_mixer is not None and row.shared is not None

    def attention(half: SubBlock, without: tuple[str, ...]) -> SubBlock:
        return replace(half, norm="attn_input", join="attn_join", joins_residual=False, without=without)

    prefix = row.final_norm.rpartition(".")[0]
    return replace(
        row,
        sub_blocks=(
            attention(mixer, ("conv_mask", "ple_input_ids")),
            replace(mlp, norm="mlp_input", join="mlp_join", joins_residual=False),
        ),
        linear_mixer=attention(row.linear_mixer, _NOT_FOR_HYPER_LINEAR),
        shared=replace(row.shared, norm="mlp_input"),
        final_norm=f"{prefix}.hyper_connection_mixer",
        keep_rules=(*row.keep_rules, *_HYPER_KEEP),
        skips=(*row.skips, *_HYPER_SKIPS),
        passengers=(*row.passengers, _HASH_CONSTANTS),
        hyper=True,
        lookup="ple",
        tables=(r".*\.ngram_embedding\.shard_\d+\.weight",),
    )


_QWEN3_5 = _hybrid(_dense("qwen3_5_text"), _linear_mixer("in_proj_qkv", "in_proj_z"))
_QWEN3_5_MOE = _sparse(replace(_QWEN3_5, model_type="qwen3_5_moe_text"), shared=True)
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _FIRST_GENERATION,
        _dense("qwen2"),
        _dense("qwen3"),
        _sparse(_dense("qwen2_moe"), shared=True),
        _sparse(_dense("qwen3_moe"), shared=False),
        _sparse(_hybrid(_dense("qwen3_next"), _linear_mixer("in_proj_qkvz")), shared=True),
        _QWEN3_5,
        _QWEN3_5_MOE,
        _vision(_QWEN3_5, "qwen3_5"),
        _vision(_QWEN3_5_MOE, "qwen3_5_moe"),
        _hyper(replace(_QWEN3_5_MOE, model_type="qwen4_exp_text")),
        _hyper(_vision(_QWEN3_5_MOE, "qwen4_exp")),
    )
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Errors: InputError when it is absent or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a checkpoint",
            "it holds no config.json",
            "give a folder with config.json and *.safetensors",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", str(error), "fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object", next_step="fetch the checkpoint again")
    return config


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the text decoder (vision models keep it in an object of its own)."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _experts(text: dict[str, Any]) -> int:
    """Routed experts of a sparse block (KeyError where config.json does not say)."""
    return int(text["num_local_experts"] if "num_local_experts" in text else text["num_experts"])


def _is_sparse(family: Family, text: dict[str, Any], layer: int) -> bool:
    """Whether block `layer` has routed experts, by transformers' rule for the family."""
    if not family.sparse or _experts(text) == 0:
        return False
    dense = text.get("mlp_only_layers") or ()
    return layer not in dense and (layer + 1) % int(text.get("decoder_sparse_step") or 1) == 0


def _layer_types(family: Family, text: dict[str, Any], layers: int) -> tuple[str, ...]:
    """ "linear_attention" or "full_attention" per block; every full_attention_interval-th is full by default."""
    if family.linear_mixer is None:
        return ("full_attention",) * layers
    if text.get("layer_types"):
        return tuple(text["layer_types"])
    interval = int(text.get("full_attention_interval") or 4)
    return tuple("linear_attention" if (k + 1) % interval else "full_attention" for k in range(layers))


def _blocks(family: Family, text: dict[str, Any], layers: int) -> tuple[tuple[Half, ...], ...]:
    """What stands in each block."""
    kinds = _layer_types(family, text, layers)
    found = []
    for layer in range(layers):
        mixer, mlp = family.sub_blocks
        if family.linear_mixer is not None and kinds[layer] == "linear_attention":
            mixer = family.linear_mixer
        if family.lookup and layer + 1 in (text.get("ple_layer_ids") or ()):
            mixer = replace(mixer, lookup=family.lookup)
        half: Half = mlp
        if _is_sparse(family, text, layer):
            half = SparseBlock(mlp.norm, mlp.module, _experts(text), family.shared, mlp.join)
        found.append((mixer, half))
    return tuple(found)


def model_spec(config: dict[str, Any], origin: str) -> ModelSpec:
    """The ModelSpec of a parsed config.json; `origin` names it in errors (InputError for an unknown family)."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{origin}: model_type {model_type!r} is not a Qwen family of this version",
            f"known families: {known}",
            "give a checkpoint of one of them",
        )
    text = _text_config(config)
    values = {**{new: text[old] for old, new in family.key_aliases if old in text}, **text}
    try:
        layers, hidden = int(values["num_hidden_layers"]), int(values["hidden_size"])
        blocks = _blocks(family, text, layers)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{origin}: config.json lacks {error}", next_step="fetch the checkpoint again") from error
    return ModelSpec(family, config, layers, hidden, bool(config.get("tie_word_embeddings", False)), blocks)


def read_model_spec(folder: Path) -> ModelSpec:
    """Read config.json of `folder` and find its family (InputError when it is none of ours)."""
    return model_spec(read_config(folder), str(folder))
