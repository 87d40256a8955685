"""What our own runtime computes from an artifact: FP32, and with the arithmetic of consumers that round.

`fp32`: the plain dequantized weights, everything in FP32. Two consumers round on the way, by documented rules, and what
their rounding alone does to the logits is computed here, so that a difference of theirs can be told from a defect:

- `fp16_experts` (transformers with compressed-tensors): it turns routed experts into FP16 and multiplies
  them in it: weights, inputs and products are rounded.
- `fp16_weights` (GPTQModel's torch kernel for gptq): scale * (code - zero) is rounded to FP16.
- `fp16_linears` (its torch kernel for awq): besides, the input, the product and the bias of a quantized linear are.
- `int8_activations` (llama.cpp on a CPU for Q4_0, Q5_0 and Q8_0 weights): the input of a quantized linear is rounded to
  blocks of 32 int8 with one FP16 scale, d = max|x| / 127 (ggml's Q8_0), and that of a BF16 linear (the head) to BF16.

Rounding makes a model discontinuous: a sum in another order, off by 1e-6, falls on the other side of a step now and
then, and the blocks after it carry that on. `NOISE` of each arithmetic says how much: the same arithmetic again with
the embeddings moved by that relative amount. Two programs with the same rounding differ by about as much.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_quant.runtime.loading import WeightSource, load_model
from qwen_quant.tokenizer import load_tokenizer

TEXT = "The capital of France is Paris. In 1931 the old bridge over the river was closed, and 27 people had to walk."
PROMPT_TOKENS = 20  # with NEW_TOKENS within the seq_length of 32 of the tiny first-generation model
NEW_TOKENS = 10
BLOCK = 32
NOISE = "_with_noise"  # suffix of an arithmetic's name: the draw on slightly moved embeddings that differs most
NOISE_SIZE, NOISE_DRAWS = 1e-6, 5
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "qwen1" / "tokenizer_golden.json"


@dataclass(frozen=True)
class Reference:
    """Logits float32 [T, V] by arithmetic, the greedy continuation of `ids` in FP32, and the tokens of the texts."""

    ids: list[int]
    logits: dict[str, np.ndarray[Any, Any]]
    greedy: list[int]
    texts: list[str]
    tokens: list[list[int]]


def golden_texts() -> list[str]:
    """The 300 strings of the tokenizer's golden file."""
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return [case["text"] for case in cases]


def round_to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """FP32 [..., n] as ggml's Q8_0 would hold it."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, blocks / step, torch.zeros(())).round()
    return (codes * step.half().float()).flatten(-2)


def _linears(folder: Path, model: torch.nn.Module) -> tuple[list[torch.nn.Linear], list[torch.nn.Linear]]:
    """(quantized linears, all others with more than one output: GGUF holds the others as FP32 vectors)."""
    source = WeightSource(folder)
    packed: list[torch.nn.Linear] = []
    others: list[torch.nn.Linear] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.out_features > 1:
            (others if source.base_of(f"{name}.weight") is None else packed).append(module)
    return packed, others


def make_reference(folder: Path) -> Reference:
    """Compute everything that consumers of `folder` are compared with."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = tokenizer.encode(TEXT)[:PROMPT_TOKENS]
    texts = golden_texts()
    tokens = [list(tokenizer.encode(text)) for text in texts]
    packed, others = _linears(folder, model)
    with torch.inference_mode():
        logits, greedy = {"fp32": _logits(model, ids)}, _greedy(model, ids)
        hooks = [m.register_forward_pre_hook(lambda _m, inputs: (round_to_q8_0(inputs[0]),)) for m in packed]
        hooks += [m.register_forward_pre_hook(lambda _m, inputs: (inputs[0].bfloat16().float(),)) for m in others]
        logits |= _with_and_without_noise("int8_activations", model, ids)
        for hook in hooks:
            hook.remove()
        experts = [m for name, m in model.named_modules() if m in packed and ".experts." in name]
        for arithmetic, weights, products in (
            ("fp16_experts", experts, experts),
            ("fp16_weights", packed, []),
            ("fp16_linears", packed, packed),
        ):
            _round_to_fp16(weights, products)
            logits |= _with_and_without_noise(arithmetic, model, ids)
            for module in products:
                del module.forward
    return Reference(ids, logits, greedy, texts, tokens)


def _round_to_fp16(weights: list[torch.nn.Linear], products: list[torch.nn.Linear]) -> None:
    for module in weights:
        module.weight.data = module.weight.data.half().float()
    for module in products:
        module.forward = partial(_fp16_linear, module)  # type: ignore[method-assign]


def _fp16_linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product = torch.nn.functional.linear(x.half().float(), module.weight).half()
    return (product if module.bias is None else product + module.bias.half()).float()


def _with_and_without_noise(arithmetic: str, model: Any, ids: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    plain = _logits(model, ids)
    generator = torch.Generator().manual_seed(0)

    def moved(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + NOISE_SIZE * torch.randn(output.shape, generator=generator))

    hook = model.get_input_embeddings().register_forward_hook(moved)
    draws = [_logits(model, ids) for _ in range(NOISE_DRAWS)]
    hook.remove()
    return {arithmetic: plain, arithmetic + NOISE: max(draws, key=lambda draw: float(np.abs(draw - plain).max()))}


def _logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy())


def _greedy(model: Any, ids: list[int]) -> list[int]:
    row = list(ids)
    for _ in range(NEW_TOKENS):
        row.append(int(_logits(model, row)[-1].argmax()))
    return row[len(ids) :]
