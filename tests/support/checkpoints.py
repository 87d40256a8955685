"""Tiny random checkpoints of the real layouts, with a real byte-level tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import NFC
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_tokenizer(folder: Path, *, chat_template: bool = True) -> None:
    """A byte-level tokenizer: ids 0-255 are bytes, then the specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_model(family: str, *, tied: bool, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A random model whose weights have the spread of trained ones: unequal columns and a few large values."""
    torch.manual_seed(seed)
    values = {**SIZES, **sizes, "tie_word_embeddings": tied}
    if family == "qwen3":
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**values, head_dim=32))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(3).mul_(torch.exp(0.5 * torch.randn(parameter.shape[1])))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif name.endswith("norm.weight"):
                parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)))
    return model.eval()


def make_checkpoint(
    folder: Path,
    family: str = "qwen2",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    **sizes: int,
) -> Path:
    """Write a checkpoint folder (weights, config, tokenizer, generation_config, licence) and return it."""
    model = random_model(family, tied=tied, **sizes).to(dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("made up for a test\n")
    (folder / "generation_config.json").write_text('{"do_sample": false}\n')
    if shards > 1:
        split(folder, shards)
    return folder


def split(folder: Path, shards: int) -> None:
    """Re-write model.safetensors as `shards` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for k in range(shards):
        part = {name: tensors[name] for name in names[k::shards]}
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None remove, or add) tensors of model.safetensors; dots are written as __ in the keywords."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def text_file(path: Path, size: int = 40000) -> Path:
    """Plain calibration text with some structure."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew dark tea near old stone towers".split()
    generator = torch.Generator().manual_seed(5)
    picks = torch.randint(0, len(words), (size // 5,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks)[:size])
    return path
