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

from qwen_quant.errors import InputError

KeepRules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SubBlock:
    """One pre-norm residual half of a decoder block: x + output(module_body(norm(x))).

    Attributes:
        norm: name in the block of the normalization in front.
        module: name in the block of the mixer or MLP.
        inputs: linears (names in the block) that all read the normalized input.
        output: the linear (name in the block) that is the module's last operation.
        takes_context: whether the module takes the block's keyword arguments (mask, positions).
        without: keyword arguments of the block that the module does not take all the same.
        joins_residual: whether `output` is added to the residual stream as it is (a shared expert's is scaled first).
    """

    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str
    takes_context: bool = False
    without: tuple[str, ...] = ()
    joins_residual: bool = True

    def linears(self) -> tuple[str, ...]:
        """Names in a block of the linears to quantize, in solving order."""
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class SparseBlock:
    """The half of a block whose MLP is a router and `count` experts (gate+up -> down), with or without a shared one.

    Attributes:
        norm: name in the block of the normalization in front.
        module: name of the MLP; it holds `gate` (the router) and `experts`.
        count: routed experts.
        shared: the expert that every token passes, as an ordinary half of the same norm.
    """

    norm: str
    module: str
    count: int
    shared: SubBlock | None = None

    def expert(self, index: int) -> SubBlock:
        """Expert `index` as a half that reads the tokens routed to it."""
        name = f"{self.module}.experts.{index}"
        inputs = (f"{name}.gate_proj", f"{name}.up_proj")
        return SubBlock(self.norm, name, inputs, f"{name}.down_proj", joins_residual=False)

    def linears(self) -> tuple[str, ...]:
        """Names in a block of the linears to quantize, in solving order."""
        shared = self.shared.linears() if self.shared else ()
        return (*shared, *(name for k in range(self.count) for name in self.expert(k).linears()))


Half = SubBlock | SparseBlock


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: `model_type` of config.json.
        sub_blocks: the halves of an ordinary block in execution order: mixer, MLP.
        layers_prefix: disk name in front of the block number.
        embedding, final_norm, head: disk names (without ".weight").
        keep_rules: (pattern, reason) for parameters that stay 16-bit on purpose; matched with re.fullmatch.
        key_aliases: (older name, name) of keys of config.json.
        linear_mixer: the mixer of a block whose entry in layer_types is "linear_attention".
        sparse: whether blocks have routed experts where config.json says so.
        shared: the shared expert of such a block.
        passengers: patterns of tensors that the model has no module for and that are carried through unchanged.
        skips: GPTQModel's negative `dynamic` patterns (without "-:") for modules that stay 16-bit.
        has_vision: whether the checkpoint is a vision model's, whose text decoder this is.
    """

    model_type: str
    sub_blocks: tuple[SubBlock, ...]
    layers_prefix: str
    embedding: str
    final_norm: str
    head: str
    keep_rules: KeepRules
    key_aliases: tuple[tuple[str, str], ...] = ()
    linear_mixer: SubBlock | None = None
    sparse: bool = False
    shared: SubBlock | None = None
    passengers: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    has_vision: bool = False


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
        half: Half = mlp
        if _is_sparse(family, text, layer):
            half = SparseBlock(mlp.norm, mlp.module, _experts(text), family.shared)
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
