"""transformers reads a gptq folder through optimum and gptqmodel; FP32 activations, GPTQModel's plain torch kernel."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common import Runner, main
from run_transformers import answers

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def load(folder: Path) -> Runner:
    """The folder as AutoModelForCausalLM loads it, in FP32, with the kernel named (auto takes ones that round more)."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = GPTQConfig(bits=settings["bits"], backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, quantization_config=config
    ).eval()
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    if not packed:
        raise RuntimeError(f"{folder} loaded without one quantized linear")
    return answers(model, facts={"quantized_linears": packed})


if __name__ == "__main__":
    main(load, ("transformers", "optimum", "gptqmodel", "torch"))
