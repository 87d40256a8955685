"""config.json -> ModelSpec: one table of families, one reader for it.

A family says, in its checkpoint's own names, which linears of a block share an input and which linear ends each
sub-block; everything else about the model comes from transformers' definition of it.  To add a family: one row in
FAMILIES, plus whatever is truly new in its block.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
    """

    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str
    takes_context: bool = False


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: `model_type` of config.json.
        sub_blocks: the halves of a block in execution order.
        layers_prefix: disk name in front of the block number.
        embedding, final_norm, head: disk names (without ".weight").
        keep_rules: (pattern, reason) for parameters that stay 16-bit on purpose; matched with re.fullmatch.
        key_aliases: (older name, name) of keys of config.json.
    """

    model_type: str
    sub_blocks: tuple[SubBlock, ...]
    layers_prefix: str
    embedding: str
    final_norm: str
    head: str
    keep_rules: KeepRules
    key_aliases: tuple[tuple[str, str], ...] = ()

    def linears(self) -> tuple[str, ...]:
        """Names in a block of the linears to quantize, in solving order."""
        return tuple(name for sub in self.sub_blocks for name in (*sub.inputs, sub.output))


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's architecture: the family row and its config.json (both as read)."""

    family: Family
    config: dict[str, Any]
    num_layers: int
    hidden_size: int
    tied_head: bool

    def layer_prefix(self, layer: int) -> str:
        """Disk prefix of block `layer`, with its closing dot."""
        return f"{self.family.layers_prefix}.{layer}."

    def linear_names(self) -> tuple[str, ...]:
        """Full names (without ".weight") of every linear to quantize, in solving order."""
        return tuple(self.layer_prefix(i) + name for i in range(self.num_layers) for name in self.family.linears())

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

FAMILIES: dict[str, Family] = {row.model_type: row for row in (_FIRST_GENERATION, _dense("qwen2"), _dense("qwen3"))}


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
    values = {**{new: config[old] for old, new in family.key_aliases if old in config}, **config}
    try:
        layers, hidden = int(values["num_hidden_layers"]), int(values["hidden_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{origin}: config.json lacks {error}", next_step="fetch the checkpoint again") from error
    return ModelSpec(family, config, layers, hidden, bool(config.get("tie_word_embeddings", False)))


def read_model_spec(folder: Path) -> ModelSpec:
    """Read config.json of `folder` and find its family (InputError when it is none of ours)."""
    return model_spec(read_config(folder), str(folder))
