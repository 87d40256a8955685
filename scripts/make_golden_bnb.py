#!/usr/bin/env python3
"""Make tests/golden/bnb: tiny qwen2 folders as transformers + bitsandbytes save them, and their dense weights.

Runs where bitsandbytes, accelerate and transformers are installed (a CPU is enough); imports nothing from
``qwen_quant``, so the files are an outside witness for ``bnb.py`` and ``runtime/bnb_folder.py``. What they hold is in
tests/golden/README.md.

    python scripts/make_golden_bnb.py tests/golden/bnb
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import pathlib
import shutil
import tempfile

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

SEED = 20261121
CASES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
# A block of double quantization is 256 absmax values of 64 weights: 64 x 320 weights need a second, short one.
WIDE = {"nf4_double": 320}
KEPT_WHOLE = "model.layers.0.self_attn.k_proj"


def make_source(folder: pathlib.Path, intermediate_size: int) -> None:
    """Write a BF16 qwen2 checkpoint of one block with weights whose rows and columns differ in size."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(torch.exp(0.5 * torch.randn(parameter.shape[0], 1)))
                parameter.mul_(torch.exp(0.5 * torch.randn(1, parameter.shape[1])))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def dequantized(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own dense weight [out, in] of a loaded linear, in `dtype`."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = dtype
        # The FP4 kernel writes code 8 as -0.0 where its own table, which is saved, says 0.0: + 0.0 makes both 0.0.
        return functional.dequantize_4bit(module.weight.data, state) + 0.0
    return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(dtype)


def sha256(tensor: torch.Tensor) -> str:
    """Digest of a tensor's bytes in row order."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def make_case(name: str, out: pathlib.Path) -> tuple[dict[str, dict[str, str]], torch.Tensor]:
    """Save one folder, load it again, and return the digests of its dense weights and one of them whole."""
    settings = BitsAndBytesConfig(**CASES[name])
    with tempfile.TemporaryDirectory() as source:
        make_source(pathlib.Path(source), WIDE.get(name, 64))
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    path = out / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})  # one order and no other metadata
    loaded = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    linears = {key: module for key, module in loaded.named_modules() if isinstance(module, kinds)}
    assert len(linears) == 7, f"{name}: {sorted(linears)}"
    digests = {
        key: {"fp32": sha256(dequantized(module, torch.float32)), "bf16": sha256(dequantized(module, torch.bfloat16))}
        for key, module in linears.items()
    }
    return digests, dequantized(linears[KEPT_WHOLE], torch.float32).contiguous()


def main() -> None:
    """Write every case, the digests and the dense weights kept whole."""
    parser = argparse.ArgumentParser(description="Write golden bitsandbytes folders.")
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    digests, whole = {}, {}
    for name in CASES:
        digests[name], whole[name] = make_case(name, out / name)
    versions = (
        f"bitsandbytes {bitsandbytes.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    document = {"made_by": f"{versions}, seed {SEED}", "sha256": digests}
    (out / "dequantized.json").write_text(json.dumps(document, indent=1) + "\n")
    save_file(whole, out / "k_proj_fp32.safetensors", metadata={"format": "pt"})
    files = [file for file in out.rglob("*") if file.is_file()]
    print(f"{versions}: {len(files)} files, {sum(file.stat().st_size for file in files)} bytes")


if __name__ == "__main__":
    main()
