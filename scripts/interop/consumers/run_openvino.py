"""OpenVINO on a CPU reads an openvino folder: logits by the compiled graph, the tokens by openvino-genai; all FP32.

openvino-genai generates twice, with the graph as it is ("SDPA") and with the paged attention that it makes of it ("PA",
its default); where the two disagree, the row has no answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main

# The CPU plugin's defaults round: BF16 where it is fast, an int8 cache, int8 activations.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": 1,
}


def load(folder: Path) -> Runner:
    """openvino_model.xml of the folder."""
    import openvino
    import openvino_genai

    compiled = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", EXACT)

    def logits(ids: list[int]) -> Any:
        row, count = np.array([ids]), len(ids)
        feed = {"input_ids": row, "attention_mask": np.ones((1, count), np.int64)}
        feed |= {"position_ids": np.arange(count)[None], "beam_idx": np.zeros(1, np.int32)}
        return np.array(compiled.create_infer_request().infer(feed)["logits"])[0]

    def greedy(ids: list[int], count: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        config.apply_chat_template = False
        found = []
        for backend in ("SDPA", "PA"):
            pipe = openvino_genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **EXACT)
            found.append(list(pipe.generate(openvino.Tensor(np.array([ids])), config).tokens[0]))
        if found[0] != found[1]:
            raise RuntimeError(f"SDPA generates {found[0]}, paged attention {found[1]}")
        return found[0]

    return Runner(logits, greedy)


if __name__ == "__main__":
    main(load, ("openvino", "openvino-genai"))
