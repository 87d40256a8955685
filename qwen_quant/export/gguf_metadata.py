"""What llama.cpp must know beside the tensors: architecture, sizes, rotation, and the tokenizer."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import InputError
from qwen_quant.export.hybrid import full_attention_interval, is_hybrid

if TYPE_CHECKING:
    from qwen_quant.export.source import ExportSource

ARCHITECTURES = {
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
}
ROTATIONS = ("default", "linear", "yarn")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp
# What splits text before merging, by the regular expression that tokenizer.json holds -> llama.cpp's name for it.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_QWEN3_5_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_QWEN2_SPLIT: "qwen2", _QWEN3_5_SPLIT: "qwen35"}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as GGUF stores it.

    Attributes:
        tokens: byte-level token texts, one for every row of the embedding; rows without a token are "[PAD{id}]".
        types: of each token.
        merges: "left right", best first.
        pre: llama.cpp's name of the splitting rule; "" where it has none for this tokenizer.
        special: "bos_token_id" and the like -> id. chat_template: "" when there is none.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    special: dict[str, int]
    chat_template: str


def architecture_facts(source: ExportSource) -> dict[str, Any]:
    """Keys without the architecture's prefix -> values (int, float, str or a list of int)."""
    config = source.spec.text_config
    if source.spec.config["model_type"] == "qwen":
        return _first_generation(config, source)
    return _later(config, source) | _linear_attention(config, source)


def _first_generation(config: dict[str, Any], source: ExportSource) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "block_count": source.spec.num_layers,
        "context_length": config.get("max_position_embeddings") or config["seq_length"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],  # llama.cpp halves it, as the original does
        "attention.head_count": heads,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "rope.dimension_count": config["hidden_size"] // heads,
        "rope.freq_base": float(config["rotary_emb_base"]),
        "vocab_size": config["vocab_size"],
    }


def _later(config: dict[str, Any], source: ExportSource) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    width = config.get("head_dim") or config["hidden_size"] // heads
    found = {
        "block_count": source.spec.num_layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size") or config["moe_intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    return found | _scaled_rotation(rope) | _experts(config, source)


def _linear_attention(config: dict[str, Any], source: ExportSource) -> dict[str, Any]:
    """Sizes of linear attention and of the part of a head that is rotated; nothing for other families."""
    interval = full_attention_interval(source.spec) if is_hybrid(source.spec) else None
    if interval is None:
        return {}
    rope = config.get("rope_parameters") or config
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": interval,
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 0.25)),
    }
    if source.spec.family.model_type != "qwen3_next":  # rotations by time, height and width, which text has equal
        found["rope.dimension_sections"] = [*(rope.get("mrope_section") or (11, 11, 10)), 0][:4]
    return found


def _scaled_rotation(rope: dict[str, Any]) -> dict[str, Any]:
    """YaRN's keys; nothing for a plain rotation (others than ROTATIONS were refused before)."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    found: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope:
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found


def _experts(config: dict[str, Any], source: ExportSource) -> dict[str, Any]:
    if not source.spec.expert_count:
        return {}
    found = {
        "expert_count": source.spec.expert_count,
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    if config.get("shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def read_vocabulary(folder: Path, rows: int) -> Vocabulary | None:
    """The tokenizer of `folder` for an embedding of `rows` rows; None when it has none.

    First-generation vocabularies come from their tiktoken ranks. Errors: InputError when it has more ids than rows, or
    is no byte-level BPE.
    """
    document = _document(folder)
    if document is None:
        return None
    model = document["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{folder}: its tokenizer is {model.get('type')}", "GGUF takes byte-level BPE here")
    texts = {index: text for text, index in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for token in document.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if texts and max(texts) >= rows:
        raise InputError(
            f"{folder}: its tokenizer has id {max(texts)}",
            f"the embedding has {rows} rows",
            "put the checkpoint's own tokenizer files beside it",
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    settings = _settings(folder)
    by_text = {text: index for index, text in texts.items()}
    return Vocabulary(
        tokens=tuple(texts.get(index, f"[PAD{index}]") for index in range(rows)),
        types=tuple(types.get(index, UNUSED) for index in range(rows)),
        merges=tuple(merges),
        pre=splitting_rule(document.get("pre_tokenizer") or {}),
        special=_special_ids(settings, by_text),
        chat_template=_chat_template(folder, settings),
    )


def _document(folder: Path) -> dict[str, Any] | None:
    """The tokenizer as a tokenizer.json, as transformers runs it: some of its classes replace what the file says.

    First-generation vocabularies are generated from their tiktoken ranks.
    """
    from qwen_quant.qwen1_fast import write_fast_tokenizer
    from qwen_quant.qwen1_tokenizer import VOCABULARY_FILE
    from qwen_quant.tokenizer import VOCABULARY_FILES, load_tokenizer

    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    if not (folder / VOCABULARY_FILE).is_file():
        loaded: dict[str, Any] = json.loads(load_tokenizer(folder).backend_text())
        return loaded
    with tempfile.TemporaryDirectory() as place:
        write_fast_tokenizer(folder, Path(place))
        generated: dict[str, Any] = json.loads((Path(place) / "tokenizer.json").read_text(encoding="utf-8"))
    return generated


def splitting_rule(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of tokenizer.json's pre-tokenizer, "" when it is none that is known here to be the same."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(str((steps[0].get("pattern") or {}).get("Regex")), "")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    return ""


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _special_ids(settings: dict[str, Any], by_text: dict[str, int]) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names."""
    found = {}
    for key in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in by_text:
            found[f"{key}_token_id"] = by_text[text]
    if "eos_token_id" not in found:
        for text in ("<|im_end|>", "<|endoftext|>"):
            if text in by_text:
                found["eos_token_id"] = by_text[text]
                break
    return found


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""
