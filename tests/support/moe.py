"""Tiny random checkpoints of the families with routed experts or linear attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.checkpoints import write_tokenizer

EXPERTS, TOP_K, LAYERS = 8, 2, 4
TEXT = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
SPARSE = {
    "moe_intermediate_size": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "shared_expert_intermediate_size": 96,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
HYPER = {
    "hc_count": 3,
    "hc_lowrank": 4,
    "ple_layer_ids": [2],
    "ple_embed_dim": 64,
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 16,
    "split_ngram_parts": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "eos_token_id": 257,
}
_QWEN4 = {key: value for key, value in {**TEXT, **SPARSE, **LINEAR, **HYPER}.items() if key != "intermediate_size"}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**TEXT, **SPARSE, "mlp_only_layers": [1]},
    "qwen3_moe": {**TEXT, **SPARSE, "norm_topk_prob": True, "decoder_sparse_step": 2},
    "qwen3_next": {**TEXT, **SPARSE, **LINEAR},
    "qwen3_5_text": {**TEXT, **LINEAR},
    "qwen3_5_moe_text": {**TEXT, **SPARSE, **LINEAR},
    "qwen3_5": {"text_config": {**TEXT, **LINEAR}, "vision_config": VISION},
    "qwen3_5_moe": {"text_config": {**TEXT, **SPARSE, **LINEAR}, "vision_config": VISION},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4, "vision_config": VISION},
}
SPARSE_FAMILIES = tuple(name for name in FAMILY_CONFIGS if "moe" in name or "next" in name or "qwen4" in name)


def random_weights(model: PreTrainedModel) -> None:
    """Weights with the spread of trained ones: unequal columns, norms off their start, routers that choose."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and "conv1d" not in name:
                parameter.mul_(3).mul_(torch.exp(0.5 * torch.randn(parameter.shape[-1])))
            elif "proj" in name and parameter.dim() == 2:
                parameter.mul_(3).mul_(torch.exp(0.5 * torch.randn(parameter.shape[1])))
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.3)
            elif "conv1d" in name and not bool(parameter.any()):  # qwen4_exp starts its n-gram convolution at zero
                parameter.normal_(0, 0.3)
            elif "ngram_embedding" in name:
                parameter.normal_(0, 1)
            elif "norm" in name and parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias") and "dt_bias" not in name:
                parameter.normal_(0, 0.1)


def make_family_checkpoint(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """Write a checkpoint folder of `family` as transformers saves it; `changes` go into its text config."""
    values = json.loads(json.dumps(FAMILY_CONFIGS[family]))
    values.get("text_config", values).update(changes)
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if "vision_config" in values else AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[family](**values))
    random_weights(model)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false}\n')
    return folder


def fuse_experts(folder: Path) -> None:
    """Store the experts of model.safetensors as stacks, gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    tensors = load_file(folder / "model.safetensors")
    starts = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for start in starts:
        own = {
            p: [tensors.pop(f"{start}.experts.{k}.{p}_proj.weight") for k in range(EXPERTS)]
            for p in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(own["gate"], own["up"], strict=True)]
        tensors[f"{start}.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{start}.experts.down_proj"] = torch.stack(own["down"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
