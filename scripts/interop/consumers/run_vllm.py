"""vLLM on a CPU reads a folder; FP16 throughout, because it takes nothing wider for gptq and awq.

Its packed product on a CPU exists in the AVX-512 build only. Where this CPU has none, a product in torch of the tensors
that vLLM loaded and repacked stands in for that one kernel; `facts` says so. Reading, merging and repacking are vLLM's.

vLLM gives log-probabilities of prompt tokens, not logits: both sides are compared as they are after our side's own
log-softmax, so `logits` here are log-probabilities and `facts` says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import Runner, main

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
DTYPE = "float16"


def product(input: Any, q_weight: Any, scales: Any, zeros: Any, bias: Any, pack_factor: int, isa_hint: str) -> Any:  # noqa: A002, PLR0913
    """vllm._custom_ops.cpu_gemm_wna16: q_weight [out / 16, in, 2] int32 has eight codes each, low nibble first."""
    import torch

    def unpacked(packed: Any) -> Any:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        return ((packed[..., None] >> shifts) & 15).flatten(-2).float()

    groups, width = scales.shape
    codes = unpacked(q_weight.reshape(width // 16, -1, 2).permute(1, 0, 2).reshape(-1, width // pack_factor))
    zero = 8.0 if zeros is None else unpacked(zeros).repeat_interleave(len(codes) // groups, 0)
    weight = (codes - zero) * scales.float().repeat_interleave(len(codes) // groups, 0)
    out = input.float() @ weight
    return (out if bias is None else out + bias.float()).to(input.dtype)


def stand_in() -> bool:
    """Put `product` in the place of a kernel that this CPU's build lacks; whether it did."""
    import torch
    from vllm import _custom_ops

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False
    _custom_ops.cpu_gemm_wna16 = product
    return True


def load(folder: Path) -> Runner:
    """The folder as vllm.LLM loads it, without tokenizer and without compilation."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "max_logprobs": -1, "seed": 0}
    packed = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    replaced = packed and stand_in()
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

    facts = {"log_probabilities": True, "dtype": DTYPE, "kernel_replaced": replaced}
    return Runner(logits, greedy, facts=facts)


if __name__ == "__main__":
    main(load, ("vllm-cpu", "torch", "transformers"))
