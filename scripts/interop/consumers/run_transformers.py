"""transformers reads a folder: dense (f32, bf16), or compressed-tensors through its own integration; FP32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import Runner, main


def answers(model: Any, tokenize: Any = None, facts: dict[str, Any] | None = None) -> Runner:
    """A Runner around any transformers model."""
    import torch

    def logits(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    def greedy(ids: list[int], count: int) -> list[int]:
        row = torch.tensor([ids])
        with torch.inference_mode():
            found = model.generate(row, max_new_tokens=count, eos_token_id=-1, do_sample=False, repetition_penalty=1.0)
        return list(found[0, len(ids) :].tolist())

    return Runner(logits, greedy, tokenize, facts or {})


def load(folder: Path) -> Runner:
    """The folder as AutoModelForCausalLM loads it, in FP32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed = sum(
        hasattr(module, "weight_packed") or hasattr(module, "quantization_scheme") for module in model.modules()
    )
    if "quantization_config" in config and not packed:
        raise RuntimeError(f"{folder} loaded without one quantized linear")
    return answers(model, facts={"quantized_linears": packed})


if __name__ == "__main__":
    main(load, ("transformers", "torch", "compressed-tensors"))
