"""GPTQModel reads a gptq, gptq_v2 or awq folder with its plain torch kernels on a CPU; activations are FP32.

It refuses FP32 when loading, so the model is loaded in FP16 and its parameters widened; those that are not
quantized are then read again in their own dtype. Its kernels round scale * (code - zero) to FP16.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from common import Runner, main
from run_transformers import answers

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # a compiler's start-up time tells nothing about the folder
KERNELS = {"gptq": "gptq_torch", "awq": "awq_torch"}


def load(folder: Path) -> Runner:
    """The folder as GPTQModel.load reads it."""
    import torch
    from gptqmodel import GPTQModel
    from safetensors import safe_open

    method = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    model = GPTQModel.load(str(folder), device="cpu", backend=KERNELS[method], dtype=torch.float16).model.eval()
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    if not packed:
        raise RuntimeError(f"{folder} loaded without one quantized linear")
    own = dict(model.named_parameters())
    for parameter in own.values():
        parameter.data = parameter.data.float()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in set(stored.keys()) & set(own):
                own[name].data.copy_(stored.get_tensor(name).float())
    kernel = next(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    return answers(model, facts={"quantized_linears": packed, "kernel": kernel})


if __name__ == "__main__":
    main(load, ("gptqmodel", "transformers", "torch"))
