"""One measurement in a process of its own: `python -m qwen_quant.profiling.child REQUEST.json ANSWER.json`.

The request is {"task": "bandwidth"} or {"task": "measure", "folder", "cell"} with "settings", the fields of a
ProfileConfig. The answer is an object with "status": "measured" and the figures, "oom" or "failed" with "reason", or
"error" with the fields of an InputError. A process that ends without an answer was ended by the system.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, StaticCache

from qwen_quant.environment import memory_bytes
from qwen_quant.errors import QwenQuantError
from qwen_quant.kv_cache import PLAIN, STORED, make_cache
from qwen_quant.models.skeleton import compute_dtype
from qwen_quant.process import end_with_parent, tune_process
from qwen_quant.profiling.cache_size import CacheSize, cache_dtype, cache_size
from qwen_quant.profiling.energy import energy_meter, joules_between
from qwen_quant.profiling.memory import (
    Peak,
    limit_memory,
    out_of_memory_reason,
    read_peak,
    reset_peak,
    resident_bytes,
    weights_nbytes,
)
from qwen_quant.profiling.protocol import Cell
from qwen_quant.profiling.results import DEQUANTIZED, FAILED, MEASURED, OOM
from qwen_quant.profiling.roofline import read_bandwidth, synchronize
from qwen_quant.profiling.timing import Timing, time_generation
from qwen_quant.results import to_json
from qwen_quant.runtime.decode import compiled_step, decoding_cache, filled_storage, next_token
from qwen_quant.runtime.loading import WeightSource, load_model
from qwen_quant.runtime.native_step import NativeStep, refusal
from qwen_quant.runtime.quantized_model import bytes_per_token, load_quantized

Step = Callable[..., Any]
ERROR = "error"
_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SEED = 0


@dataclass(frozen=True)
class Run:
    """One timed generation: its times, joules (None: not counted), and its cache at the end.

    Attributes:
        cache_bytes, cache_capacity: bytes that it holds allocated, and the tokens a row that fit into them.
        cache_fixed_bytes: of these, what does not grow with the tokens (states of linear attention).
        cache_tokens: tokens a row in it.
        cache_dtype: of its keys, or of their codes.
    """

    timing: Timing
    joules: float | None
    cache_bytes: int
    cache_capacity: int
    cache_fixed_bytes: int
    cache_tokens: int
    cache_dtype: str


class Generation:
    """Greedy decoding of one batch, one call a token; every call returns when the device is done.

    Models and caches that the native step takes run through it, as in `runtime.decode`; `compiled` is the
    compiled step to take instead, made for a static cache of this batch and length, which is in the model's dtype.
    Otherwise the bf16 cache holds BF16 also for a model that computes in FP32.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, kv_cache: str, new_tokens: int, compiled: Step | None = None
    ) -> None:
        self.model, self.next, self.compiled = model, ids, compiled
        kv_cache = STORED if kv_cache == PLAIN and model.config.dtype == torch.float32 else kv_cache
        self.takes_native = compiled is None and not refusal(model, ids.shape[0], kv_cache)
        capacity = ids.shape[1] + new_tokens
        self.cache: Cache
        if compiled is not None:
            self.cache = StaticCache(model.config, max_cache_len=capacity)
        elif self.takes_native:
            self.cache = decoding_cache(model, capacity, kv_cache)
        else:
            self.cache = make_cache(model.config, kv_cache)
        self.native: NativeStep | None = None
        self.position = 0

    def step(self) -> None:
        """Feed what is new, take the most likely token of each row; no stop token ends it."""
        start, self.position = self.position, self.position + self.next.shape[1]
        if self.takes_native and start:
            if self.native is None:
                self.native = NativeStep(self.model, filled_storage(self.cache))
            self.next = torch.tensor([[self.native(int(self.next), start)]])
            return
        with torch.inference_mode():
            if self.compiled is not None:
                self.next = next_token(self.compiled if start else self.model.forward, self.next, self.cache, start)
                return
            logits = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.next = logits[:, -1].argmax(-1, keepdim=True)
        synchronize(self.next.device)


def pick_device(wanted: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda" (QwenQuantError when there is no GPU and one is wanted)."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise QwenQuantError("there is no CUDA device", "torch finds none", "use --device cpu")
    return torch.device("cuda", 0) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_for_profile(folder: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[PreTrainedModel, str]:
    """The model as it would be served, and what multiplies its weights: packed for GPTQ, bitsandbytes' modules where
    it is installed, dense for everything else.

    Without a dtype packed models compute in what the hardware multiplies (FP32 on a CPU without BF16), dense in BF16.
    """
    source = WeightSource(folder)
    if source.packed is not None:
        model = load_quantized(folder, device, dtype)
        step = refusal(model, 1)
        steps = (
            f"steps by transformers: {step}" if step else f"steps of one row with the caches {PLAIN} and int8: native"
        )
        return model, f"{model.kernel_report.summary()}; activations {_name(model.config.dtype)}; {steps}"
    dtype = dtype or torch.bfloat16
    if source.is_quantized and importlib.util.find_spec("bitsandbytes") is not None:
        return _load_with_bitsandbytes(folder, device, dtype), f"{source.kind} modules; activations {_name(dtype)}"
    said = f"dense {_name(dtype)}"
    if source.is_quantized:
        said += f" ({source.kind} {DEQUANTIZED}: bitsandbytes is not installed)"
    if dtype == torch.bfloat16 and compute_dtype(device) != dtype:
        said += "; this processor has no BF16 products, see --dtype fp32"
    return load_model(folder, device, dtype), said


def _load_with_bitsandbytes(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model as a user of transformers gets it: bitsandbytes' own modules multiply."""
    for module in ("models.qwen1", "runtime.hf_bnb"):  # what `import qwen_quant` registers, but not in our own command
        importlib.import_module(f"qwen_quant.{module}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": str(device)}, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    return model.requires_grad_(False).eval()


def measure(folder: Path, cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, and time the runs of one cell; the peaks are those of the load and the first run."""
    device = pick_device(settings["device"])
    used_before, process_bytes = _device_used(device), 0 if device.type == "cuda" else resident_bytes()
    model, kernel = load_for_profile(folder, device, _DTYPES[settings["dtype"]])
    load_peak = read_peak(device)
    reset_peak(device)
    ids = torch.randint(
        0,
        model.config.get_text_config().vocab_size,
        (cell.batch_size, cell.context_tokens),
        generator=torch.Generator().manual_seed(_SEED),
    ).to(device)
    compiled, compile_seconds = None, None
    if settings["compile"]:
        with torch.inference_mode():
            compiled, compile_seconds = compiled_step(model, ids, cell.context_tokens + cell.new_tokens)
        kernel += "; steps by torch.compile"
    elif settings["warmup_tokens"]:
        warm_up(model, ids, cell, settings["warmup_tokens"])
    seconds, started = settings["max_seconds"], time.monotonic()
    share = None if seconds is None else seconds / settings["runs"]
    runs = [run(model, ids, cell, share, compiled)]
    run_peak = read_peak(device)
    # A prefill is one call that cannot be cut: when it has used up the time, there are fewer runs.
    while len(runs) < settings["runs"] and (seconds is None or time.monotonic() - started < seconds):
        runs.append(run(model, ids, cell, share, compiled))
    return {
        "status": MEASURED,
        "reason": "",
        "kernel": kernel,
        "cache_dtype": runs[0].cache_dtype,
        "compile_seconds": compile_seconds,
        "runs": to_json(runs),
        "energy_source": energy_meter(device).source,
        "process_bytes": process_bytes,
        "weights_bytes": weights_nbytes(model),
        "step_weights_bytes": bytes_per_token(model, cell.batch_size),
        **_peaks(load_peak, run_peak, used_before),
    }


def warm_up(model: PreTrainedModel, ids: Tensor, cell: Cell, tokens: int) -> None:
    """One short generation of the same shape: a short context where there is one, so that no peak comes from here."""
    generation = Generation(model, ids[:, : max(1, min(ids.shape[1], tokens))], cell.kv_cache, tokens)
    for _ in range(min(tokens, cell.new_tokens)):
        generation.step()


def run(
    model: PreTrainedModel, ids: Tensor, cell: Cell, max_seconds: float | None, compiled: Step | None = None
) -> Run:
    """One timed generation with a new cache."""
    generation, meter = Generation(model, ids, cell.kv_cache, cell.new_tokens, compiled), energy_meter(ids.device)
    before = meter.read()
    timing = time_generation(generation.step, generation.step, cell.new_tokens, time.perf_counter, max_seconds)
    joules = joules_between(before, meter.read())
    held = held_cache(generation)
    dtype = _name(cache_dtype(generation.cache))
    return Run(timing, joules, held.nbytes, held.capacity, held.fixed_bytes, generation.position, dtype)


def held_cache(generation: Generation) -> CacheSize:
    """What a generation's cache takes at its end.

    Room that was asked for in advance and never written to takes no memory on the CPU: there a cache that a cut
    generation left half empty counts as the half, which is what the resident set saw.
    """
    size = cache_size(generation.cache)
    in_advance = generation.takes_native or generation.compiled is not None
    if not in_advance or generation.next.device.type != "cpu" or generation.position >= size.capacity:
        return size
    return size.filled(generation.position)


def _device_used(device: torch.device) -> int:
    """Bytes of a GPU that others use (0 on the CPU)."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _peaks(load: Peak, run: Peak, used_before: int) -> dict[str, Any]:
    both = (load.device_bytes, run.device_bytes)
    device = None if both[0] is None or both[1] is None else max(both[0], both[1]) - used_before
    return {
        "peak_bytes": max(load.process_bytes, run.process_bytes),
        "generation_peak_bytes": run.process_bytes,
        "device_peak_bytes": device,
    }


def bandwidth(settings: dict[str, Any]) -> dict[str, Any]:
    """The device, its name, threads and read bandwidth."""
    device = pick_device(settings["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    rate = read_bandwidth(device)
    return {"status": MEASURED, "device": device.type, "name": name, "threads": threads, "bytes_per_second": rate}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks; a lack of memory and bad input are answers, and so is any other failure."""
    settings = request["settings"]
    try:
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        if request["task"] == "bandwidth":  # of the machine, whatever a model may take of its memory
            return bandwidth(settings)
        if settings["device"] != "cuda" and not torch.cuda.is_available():
            limit_memory(settings["memory_limit_bytes"] or memory_bytes()[1] or sys.maxsize)
        elif settings["memory_limit_bytes"]:
            device = pick_device(settings["device"])
            share = settings["memory_limit_bytes"] / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return measure(Path(request["folder"]), Cell(**request["cell"]), settings)
    except QwenQuantError as error:
        return {"status": ERROR, "what": error.what, "why": error.why, "next_step": error.next_step}
    except Exception as error:  # noqa: BLE001 (a measurement that fails is reported in its cell; the sweep goes on)
        reason = out_of_memory_reason(error)
        if reason is not None:
            return {"status": OOM, "reason": reason}
        if os.environ.get("QWEN_QUANT_DEBUG"):
            raise
        said = next(iter(str(error).strip().splitlines()), "")  # torch's go on with C++ frames
        return {"status": FAILED, "reason": f"{type(error).__name__}: {said}"}


def main(arguments: list[str]) -> None:
    """Read the request, answer it, write the answer (renamed into place: half an answer is none)."""
    request_path, answer_path = map(Path, arguments)
    end_with_parent()
    tune_process()
    text = json.dumps(answer(json.loads(request_path.read_text(encoding="utf-8"))))
    partial = answer_path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, answer_path)


if __name__ == "__main__":
    main(sys.argv[1:])
