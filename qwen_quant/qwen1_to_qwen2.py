"""First-generation Qwen in Qwen2's words: names, which parts of the fused c_attn are q, k and v, and the settings.

Both architectures compute the same function of the same numbers up to the trained length (`seq_length`): RMSNorm,
half-split RoPE, silu(gate) * up, biases on q, k and v only, no shared key heads.  What Qwen2 has no place for is
refused here, or named by `lost_beyond_length`: dynamic NTK and LogN, which act past that length.

A linear is [out, in], and c_attn's rows are q, k and v, a third each.  Packed (see `packing.py`), rows are columns of
qweight, qzeros and scales, and the three share g_idx.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen_quant.checkpoint.moves import Move
from qwen_quant.checkpoint.reader import CheckpointReader, TensorInfo, natural_order
from qwen_quant.errors import AuditError, InputError
from qwen_quant.packing import SUFFIXES, packed_specs

if TYPE_CHECKING:
    from qwen_quant.models.qwen1_config import QWenConfig

SOURCE_BLOCK, TARGET_BLOCK = "transformer.h", "model.layers"
NAMES: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.h.{}.ln_1": ("model.layers.{}.input_layernorm",),
    "transformer.h.{}.attn.c_attn": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "transformer.h.{}.attn.c_proj": ("model.layers.{}.self_attn.o_proj",),
    "transformer.h.{}.ln_2": ("model.layers.{}.post_attention_layernorm",),
    "transformer.h.{}.mlp.w1": ("model.layers.{}.mlp.up_proj",),
    "transformer.h.{}.mlp.w2": ("model.layers.{}.mlp.gate_proj",),  # the branch under silu
    "transformer.h.{}.mlp.c_proj": ("model.layers.{}.mlp.down_proj",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
# Buffers that old versions of the model code saved; every runtime computes them anew.
BUFFERS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".logn_tensor")
ZERO_BIAS = "all zero: old AutoGPTQ gave every linear a bias"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLD_NAMES = re.compile(r"\b(transformer\.|c_attn\b|c_proj\b|mlp\.w[12]\b|ln_[12f]\b|wte\b)")
_FETCH = "fetch the checkpoint again"


@dataclass(frozen=True)
class Relabelling:
    """Every tensor of the source, once: `moves`, and `dropped` with the reason."""

    moves: tuple[Move, ...]
    dropped: dict[str, str]


def target_bases(base: str) -> tuple[str, ...]:
    """Names in Qwen2 of the module `base` ("transformer.h.3.mlp.w1"), empty when it has none."""
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", base)
    pattern = base if found is None else f"{SOURCE_BLOCK}.{{}}.{found[2]}"
    number = "" if found is None else found[1]
    return tuple(name.replace("{}", number) for name in NAMES.get(pattern, ()))


def plan_moves(reader: CheckpointReader, expected: dict[str, tuple[int, ...]], bits: int | None) -> Relabelling:
    """Where every tensor of a first-generation folder goes.

    Args:
        reader: the folder.
        expected: name -> shape of the 16-bit model's parameters (`models.skeleton.expected_tensors`).
        bits: of packed linears, None for a 16-bit folder.

    Errors: InputError for a missing, misshapen or unexpected tensor; AuditError for one without a name in Qwen2.
    """
    moves: list[Move] = []
    zero_biases: list[str] = []
    for name, shape in expected.items():
        base, _, leaf = name.rpartition(".")
        targets = target_bases(base)
        if not targets:
            raise AuditError(f"'{name}' has no name in Qwen2")
        if bits is not None and leaf == "weight" and any(f"{base}.{suffix}" in reader for suffix in SUFFIXES):
            moves += _packed_moves(reader, base, (shape[0], shape[1]), bits)
            zero_biases += [f"{base}.bias"] if f"{base}.bias" not in expected else []
        else:
            moves.append(_plain_move(reader, name, shape, targets))
    used = {move.source.name for move in moves}
    dropped = {name: _drop_reason(reader, name, zero_biases) for name in reader.names if name not in used}
    return Relabelling(tuple(sorted(moves, key=lambda move: natural_order(move.targets[0]))), dropped)


def _checked(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> TensorInfo:
    """The place of tensor `name` (InputError when it is missing, or has another shape or dtype)."""
    if name not in reader:
        raise InputError(f"{reader.folder} lacks the tensor '{name}'", "config.json asks for it", _FETCH)
    info = reader.info(name)
    if info.shape != shape:
        raise InputError(f"'{name}' has shape {info.shape}", f"config.json asks for {shape}", _FETCH)
    if info.dtype not in dtypes:
        raise InputError(f"'{name}' is {info.dtype}", f"{' or '.join(map(str, dtypes))} is needed", _FETCH)
    return info


def _plain_move(reader: CheckpointReader, name: str, shape: tuple[int, ...], targets: tuple[str, ...]) -> Move:
    leaf = name.rpartition(".")[2]
    info = _checked(reader, name, shape, FLOAT_DTYPES)
    return Move(info, tuple(f"{target}.{leaf}" for target in targets), 0 if len(targets) > 1 else None)


def _packed_moves(reader: CheckpointReader, base: str, size: tuple[int, int], bits: int) -> list[Move]:
    """The four tensors of a packed linear of `size` (out, in)."""
    if f"{base}.weight" in reader:
        raise InputError(f"{reader.folder} holds '{base}.weight' both packed and plain", next_step=_FETCH)
    targets = target_bases(base)
    packed_specs(size[1], size[0] // len(targets), bits, -1)  # each part must fill whole words
    groups = reader.info(f"{base}.scales").shape[0] if f"{base}.scales" in reader else 1
    moves = []
    for suffix, (dtype, shape) in packed_specs(size[1], size[0], bits, -1).items():
        expected = (groups, *shape[1:]) if suffix in ("qzeros", "scales") else shape
        info = _checked(reader, f"{base}.{suffix}", expected, FLOAT_DTYPES if suffix == "scales" else (dtype,))
        split = len(targets) > 1 and suffix != "g_idx"
        moves.append(Move(info, tuple(f"{target}.{suffix}" for target in targets), 1 if split else None))
    return moves


def _drop_reason(reader: CheckpointReader, name: str, zero_biases: list[str]) -> str:
    """Why a tensor that no parameter needs may stay behind (InputError when it may not)."""
    if name.endswith(BUFFERS):
        return "a buffer that runtimes compute"
    if name not in zero_biases:
        raise InputError(
            f"{reader.folder} holds the unexpected tensor '{name}'",
            "config.json has no place for it, and nothing is left behind unexplained",
            "check that config.json belongs to these weights",
        )
    if bool(reader.read(name).any()):
        raise InputError(
            f"'{name}' is not zero", "Qwen2 has biases on q, k and v only", "this checkpoint cannot be written as Qwen2"
        )
    return ZERO_BIAS


def check_convertible(config: QWenConfig, raw: dict[str, Any]) -> None:
    """Refuse what Qwen2 cannot express (InputError naming the key); `raw` is config.json as read."""
    wanted: dict[str, Any] = {
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "attention_windows": None,
    }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise InputError(
                f"config.json has {key} {getattr(config, key)!r}",
                f"only {value!r} can be written as Qwen2; no published checkpoint has another",
                "check config.json",
            )
    if "seq_length" not in raw:
        raise InputError(
            "config.json lacks seq_length", "the trained length decides up to where the copy is exact", _FETCH
        )


def lost_beyond_length(config: QWenConfig) -> tuple[str, ...]:
    """What the source does past seq_length and Qwen2 does not; empty: the copy is exact at any length."""
    switches = (("use_dynamic_ntk", "dynamic NTK"), ("use_logn_attn", "LogN"))
    return tuple(words for key, words in switches if getattr(config, key))


def qwen2_config(config: QWenConfig, raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the Qwen2 model; `dtype` is what the embedding is stored in."""
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": config.attn_dropout_prob,
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size // 2,
        "max_position_embeddings": config.seq_length,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": float(config.rotary_emb_base),
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    return {key: value for key, value in values.items() if value is not None}


def qwen2_quantization(settings: dict[str, Any]) -> dict[str, Any]:
    """GPTQ settings with every module name in Qwen2's words.

    Errors: InputError when a first-generation name is left that has no counterpart.
    """
    renamed = {key: _renamed(value) for key, value in settings.items()}
    for key, value in renamed.items():
        if _OLD_NAMES.search(f"{key} {value}"):
            raise InputError(
                f"quantization_config: '{key}' names modules that Qwen2 does not have", str(value), "remove that key"
            )
    return {"quant_method": "gptq", **renamed}


def _renamed(value: Any) -> Any:
    """A setting with the module names in it replaced; a fused one in a list becomes three entries."""
    if isinstance(value, list):
        flat: list[Any] = []
        for item in value:
            flat += _renamed_name(item) if isinstance(item, str) else [_renamed(item)]
        return flat
    if isinstance(value, str):
        names = _renamed_name(value)
        return names[0] if len(names) == 1 else value
    return {key: _renamed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _renamed_name(text: str) -> list[str]:
    """A module's name, in full or inside a block, in Qwen2's words; any other text as it is."""
    if text == SOURCE_BLOCK:
        return [TARGET_BLOCK]
    inside = NAMES.get(f"{SOURCE_BLOCK}.{{}}.{text}", ())
    names = target_bases(text) or tuple(name.removeprefix(f"{TARGET_BLOCK}.{{}}.") for name in inside)
    return list(names) or [text]
