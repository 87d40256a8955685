"""mlx-lm reads an mlx or dense folder on the CPU; every float is widened to FP32 after loading (values unchanged)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main


def load(folder: Path) -> Runner:
    """The folder as mlx_lm.load reads it, without its tokenizer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    packed = sum(isinstance(module, nn.QuantizedLinear) for module in model.modules())

    def logits(ids: list[int]) -> Any:
        return np.array(model(mx.array([ids]))[0].astype(mx.float32))

    def greedy(ids: list[int], count: int) -> list[int]:
        cache, row, found = make_prompt_cache(model), list(ids), []
        for _ in range(count):
            row = [int(mx.argmax(model(mx.array([row]), cache=cache)[0, -1]).item())]
            found += row
        return found

    return Runner(logits, greedy, facts={"quantized_linears": packed})


if __name__ == "__main__":
    main(load, ("mlx-lm", "mlx", "transformers"))
