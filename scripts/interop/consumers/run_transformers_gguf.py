"""transformers reads a GGUF file through gguf_file: dequantized by its own code, FP32 on a CPU; and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from common import Runner, main
from run_transformers import answers


def load(folder: Path) -> Runner:
    """The one .gguf file of the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except Exception as error:  # noqa: BLE001 (fails in ways of its own; the weights are still compared)
        return answers(model, facts={"tokenizer": f"{type(error).__name__}: {error}"})
    return answers(model, lambda text: tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    main(load, ("transformers", "torch", "gguf"))
