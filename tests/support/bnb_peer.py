"""Loads a bitsandbytes folder where bitsandbytes is installed, and compares it with what the test dequantized.

    python bnb_peer.py FOLDER EXPECTED.safetensors [--stock] [--near]

EXPECTED holds the dense weight of every linear by its name on disk, `ids`, and the logits of the dequantized model.
4-bit weights and logits must be equal (FP32 arithmetic), Int8 weights too; Int8 logits only resemble, since
bitsandbytes rounds activations to 8 bit. `--stock` loads without this package; with `--near` logits only resemble, for
folders that compute in 16 bit.
"""

from __future__ import annotations

import argparse
import copy

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

INT8_STEP = 7.874015718698502e-3


def dense(module: torch.nn.Module) -> torch.Tensor | None:
    """FP32 weight of a loaded bitsandbytes linear, by bitsandbytes' own state; None for any other module."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32  # a folder that computes in 16 bit asks for a rounded product
        return functional.dequantize_4bit(module.weight.data, state)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        codes = module.weight.data if module.weight.CB is None else module.weight.CB
        return codes.float() * module.weight.SCB[:, None] * INT8_STEP
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("expected")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--near", action="store_true")
    arguments = parser.parse_args()
    if not arguments.stock:
        import qwen_quant  # noqa: F401 (lets transformers load separate experts)
    expected = load_file(arguments.expected)
    ids, logits = expected.pop("ids"), expected.pop("logits")
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    found = {name: dense(module) for name, module in model.named_modules()}
    found = {name: weight for name, weight in found.items() if weight is not None}
    names = {name.replace("model.language_model.", "model."): name for name in expected}
    assert set(found) == set(names), sorted(set(found) ^ set(names))[:5]
    for name, weight in found.items():
        assert torch.equal(weight, expected[names[name]]), name
    with torch.no_grad():
        ours = model(ids).logits
    if arguments.near:
        near = torch.nn.functional.cosine_similarity(ours.float(), logits, dim=-1)
        assert near.min() > 0.99, near.min()
    elif any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()):
        assert (ours - logits).abs().max() <= 1e-5 * logits.abs().max(), (ours - logits).abs().max()
    else:
        near = torch.nn.functional.cosine_similarity(ours, logits, dim=-1)
        assert near.median() > 0.9, near.median()
    print(f"{len(found)} linears, largest difference of logits {float((ours - logits).abs().max()):.2g}")


if __name__ == "__main__":
    main()
