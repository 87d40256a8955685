#!/usr/bin/env python3
"""Greedy decoding by llama.cpp, told what to do line by line; benchmarks/int4.py runs it with llama-cpp-python's venv.

    VENV/bin/python llama_decode.py FILE.gguf THREADS CONTEXT

Prints one JSON object when the model is loaded, then reads {"first": token, "count": n} lines and answers each with
{"tokens": [n ids], "seconds": [n - 1 times between them]}: n passes of one token each, nothing but the argmax between.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def load(path: str, threads: int, context: int):  # noqa: ANN201 (ctypes handles)
    """(model, context of `context` tokens, vocabulary size), all layers on the CPU."""
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    running = llama_cpp.llama_context_default_params()
    running.n_ctx, running.n_threads, running.n_threads_batch = context, threads, threads
    handle = llama_cpp.llama_init_from_model(model, running)
    if not handle:
        raise SystemExit("llama.cpp cannot make a context")
    return model, handle, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


def decode(handle, vocabulary: int, first: int, count: int) -> dict[str, list]:  # noqa: ANN001
    """`count` greedy tokens after `first`, from an empty cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
    token, tokens, times = first, [], []
    for _ in range(count):
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        if llama_cpp.llama_decode(handle, batch):
            raise SystemExit("llama_decode failed")
        logits = ctypes.cast(llama_cpp.llama_get_logits(handle), ctypes.POINTER(ctypes.c_float))
        token = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())
        times.append(time.perf_counter())
        tokens.append(token)
    return {"tokens": tokens, "seconds": np.diff(times).tolist()}


def main() -> None:
    """Load, then answer until the input ends."""
    _, handle, vocabulary = load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    facts = {
        "version": llama_cpp.__version__,
        "vocabulary": vocabulary,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(decode(handle, vocabulary, asked["first"], asked["count"])), flush=True)


if __name__ == "__main__":
    main()
