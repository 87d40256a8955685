"""onnxruntime-genai on a CPU reads an onnx folder; logits after each prefix of the row, tokens by its own generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main


def load(folder: Path) -> Runner:
    """genai_config.json and model.onnx of the folder."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def started(ids: list[int], length: int) -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return generator

    def logits(ids: list[int]) -> Any:
        rows = [np.asarray(started(ids[:n], len(ids) + 1).get_logits()).reshape(-1) for n in range(1, len(ids) + 1)]
        return np.stack(rows)

    def greedy(ids: list[int], count: int) -> list[int]:
        generator, found = started(ids, len(ids) + count), []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    return Runner(logits, greedy)


if __name__ == "__main__":
    main(load, ("onnxruntime-genai", "onnxruntime"))
