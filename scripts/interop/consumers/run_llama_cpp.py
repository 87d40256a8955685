"""llama.cpp (llama-cpp-python) reads a GGUF file; its cache is FP32, its products are what the types give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main

GGML_TYPE_F32 = 0


def load(folder: Path) -> Runner:
    """The one .gguf file of the folder."""
    from llama_cpp import Llama

    path = next(folder.glob("*.gguf"))
    options = {"n_ctx": 256, "n_batch": 256, "logits_all": True, "verbose": True, "n_threads": 1}
    model = Llama(str(path), type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, n_gpu_layers=0, **options)

    def logits(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    def greedy(ids: list[int], count: int) -> list[int]:
        model.reset()
        model.eval(ids)
        found: list[int] = []
        for _ in range(count):
            found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(found[-1:])
        return found

    return Runner(logits, greedy, lambda text: model.tokenize(text.encode(), add_bos=False, special=True))


if __name__ == "__main__":
    main(load, ("llama-cpp-python",))
