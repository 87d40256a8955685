"""What our own runtime computes from an artifact: FP32, and with the arithmetic of consumers that round.

`fp32`: the plain dequantized weights, everything in FP32. Two consumers round on the way, by documented rules, and what
their rounding alone does to the logits is computed here, so that a difference of theirs can be told from a defect:

- `fp16_weights` (GPTQModel's torch kernels): scale * (code - zero) is rounded to FP16.
- `int8_activations` (llama.cpp on a CPU for Q4_0, Q5_0 and Q8_0 weights): the input of a quantized linear is rounded to
  blocks of 32 int8 with one FP16 scale, d = max|x| / 127 (ggml's Q8_0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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


def _quantized_linears(folder: Path, model: torch.nn.Module) -> list[torch.nn.Linear]:
    source = WeightSource(folder)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and source.base_of(f"{name}.weight") is not None:
            found.append(module)
    return found


def make_reference(folder: Path) -> Reference:
    """Compute everything that consumers of `folder` are compared with."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = tokenizer.encode(TEXT)[:PROMPT_TOKENS]
    texts = golden_texts()
    tokens = [list(tokenizer.encode(text)) for text in texts]
    linears = _quantized_linears(folder, model)
    with torch.inference_mode():
        logits = {"fp32": _logits(model, ids)}
        greedy = _greedy(model, ids)
        hooks = [m.register_forward_pre_hook(lambda _m, inputs: (round_to_q8_0(inputs[0]),)) for m in linears]
        logits["int8_activations"] = _logits(model, ids)
        for hook in hooks:
            hook.remove()
        for module in linears:
            module.weight.data = module.weight.data.half().float()
        logits["fp16_weights"] = _logits(model, ids)
    return Reference(ids, logits, greedy, texts, tokens)


def _logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy())


def _greedy(model: Any, ids: list[int]) -> list[int]:
    row = list(ids)
    for _ in range(NEW_TOKENS):
        row.append(int(_logits(model, row)[-1].argmax()))
    return row[len(ids) :]
