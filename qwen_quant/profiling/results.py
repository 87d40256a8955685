"""Results of `profile` and their file, profile.json (schema `qwen-quant/profile/2`). Sizes are bytes, times seconds.

profile.json is {"schema": "qwen-quant/profile/2", ...the fields of ProfileResult...}: dataclasses become objects with
the field names below, tuples arrays, None null. A figure that is not finite does not occur.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.profiling.protocol import Cell, ProfileConfig
from qwen_quant.results import to_json

SCHEMA = "qwen-quant/profile/2"
MEASURED, OOM, FAILED = "measured", "oom", "failed"
DEQUANTIZED = "dequantized at load"  # in `kernel`: packed weights that ran, and were counted, as dense ones


@dataclass(frozen=True)
class Spread:
    """The median of several runs with the least and the largest of them."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Speed:
    """How fast one cell ran.

    Attributes:
        tokens_per_second: batch_size x new_tokens over the time of the whole generation, first token included.
        seconds: that time.
        time_to_first_token_seconds: from the call to the first new token: the prefill.
        inter_token_p50_seconds, inter_token_p99_seconds: between two tokens of a row, in all runs; None for one token.
        prefill_tokens_per_second: context tokens of all rows over the time to the first token; None for one context
            token, which is no prefill.
        joules_per_token: of all runs, idle power included; None where no counter is read.
        energy_source: what counted ("NVML", "RAPL package"), or why nothing did.
        latency_curve: (new tokens so far, median seconds of a token) at up to 64 equal stretches of a run.
    """

    tokens_per_second: Spread
    seconds: Spread
    time_to_first_token_seconds: Spread
    inter_token_p50_seconds: float | None
    inter_token_p99_seconds: float | None
    prefill_tokens_per_second: float | None
    joules_per_token: float | None
    energy_source: str
    latency_curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Memory:
    """Peaks of one process that loaded the model and generated.

    Attributes:
        peak_bytes: of the whole process, model load included: resident set on the CPU, allocator on a GPU.
        generation_peak_bytes: the same from the end of the load to the end of the first run; it splits into
            process_bytes (interpreter and libraries before the model; 0 on a GPU), weights_bytes (parameters, buffers
            and packed weights), kv_cache_bytes (allocated by the cache at its end) and rest_bytes (activations, what
            kernels keep, allocator slack; a little below 0 where libraries gave pages back).
        device_peak_bytes: what the whole GPU had in use beyond what was used before; None on the CPU.
        extrapolated: a run was cut; the cache's missing bytes are added to kv_cache_bytes and both peaks.
    """

    peak_bytes: int
    generation_peak_bytes: int
    process_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    rest_bytes: int
    device_peak_bytes: int | None
    extrapolated: bool


@dataclass(frozen=True)
class Roofline:
    """The speed that memory bandwidth allows.

    Attributes:
        bytes_per_step: what one decoding step reads at least: every weight that decoding multiplies with, as it lies in
            memory, once for all rows, and the cache at the mean length of the generation.
        tokens_per_second: batch_size x bandwidth / bytes_per_step.
        share: of the allowed speed that was reached, from the median time between tokens; where a generation was cut,
            of the speed allowed at the lengths that were seen. Caches of the processor can push a small model above 1.
    """

    bytes_per_step: int
    bandwidth_bytes_per_second: float
    tokens_per_second: float
    share: float


def cache_name(kv_cache: str, dtype: str) -> str:
    """What a table calls a cache of `dtype` ("": not known)."""
    plain = kv_cache == "bf16" and dtype not in ("", "bfloat16")
    return f"{kv_cache} (held in {dtype})" if plain else kv_cache


@dataclass(frozen=True)
class Measurement:
    """One cell of one model.

    Attributes:
        model: its name in ProfileResult.models. kernel: what multiplied the weights, in words.
        status: "measured", "oom" (a result: the figures are None) or "failed"; reason says why.
        compile_seconds: what torch.compile took before anything was timed; None without it.
        cache_dtype: what the cache held its keys and values (or their codes) in: "bfloat16", "int8" and so on; "" where
            nothing was measured.
        measured_tokens: new tokens a row of the shortest run; fewer than cell.new_tokens: figures are extrapolated.
    """

    model: str
    cell: Cell
    kernel: str
    status: str
    reason: str
    measured_tokens: int
    speed: Speed | None
    memory: Memory | None
    roofline: Roofline | None
    compile_seconds: float | None = None
    cache_dtype: str = ""

    @property
    def extrapolated(self) -> bool:
        """Whether time ran out before the last token."""
        return self.status == MEASURED and self.measured_tokens < self.cell.new_tokens

    @property
    def dequantized(self) -> bool:
        """Whether packed weights ran as dense ones."""
        return DEQUANTIZED in self.kernel

    @property
    def cache_name(self) -> str:
        """The cell's cache; the plain one with the dtype that it really had: "bf16", "bf16 (held in float32)"."""
        return cache_name(self.cell.kv_cache, self.cache_dtype)


@dataclass(frozen=True)
class Ratio:
    """`model` over `baseline` (the first model) in the same cell; None where either has no figure."""

    model: str
    baseline: str
    cell: Cell
    tokens_per_second: float | None
    generation_peak_bytes: float | None


@dataclass(frozen=True)
class Published:
    """A figure that the maintainers of the model published; `value` is None where they wrote "oom".

    Attributes:
        model, weights: whose figure it is. beside: the profiled model of its sizes and kind, which it stands beside.
        quantity: "tokens_per_second" or "peak_memory". unit: as printed.
    """

    model: str
    weights: str
    quantity: str
    cell: Cell
    value: float | None
    unit: str
    hardware: str
    beside: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """One profiled model: name in this result, folder, what it is ("16-bit", "gptq 4 bit", ...), bytes on disk.

    sha256 is checkpoint.identity.weights_sha256 of the folder: the same in a report.json about the same weights.
    """

    name: str
    folder: str
    kind: str
    stored_bytes: int
    sha256: str


@dataclass(frozen=True)
class ProfileResult:
    """profile.json.

    Attributes:
        models, measurements: every cell of every model. ratios: each later model over the first.
        published: figures of the same models for the same cells, from elsewhere.
        device, device_name, threads: where it ran; threads 0 on a GPU.
        bandwidth_bytes_per_second: measured read bandwidth of that device's memory.
        config: as asked. warnings: what a reader should know before trusting the figures.
    """

    models: tuple[ModelFacts, ...]
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]
    published: tuple[Published, ...]
    device: str
    device_name: str
    threads: int
    bandwidth_bytes_per_second: float
    config: ProfileConfig
    warnings: tuple[str, ...]
    versions: dict[str, str]
    seconds: float


def write_profile(result: ProfileResult, path: Path) -> None:
    """Write profile.json (to a temporary place, then renamed)."""
    text = json.dumps({"schema": SCHEMA, **to_json(result)}, indent=2, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_profile(path: Path) -> dict[str, Any]:
    """The document of a profile.json. Errors: InputError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", str(error), "give the profile.json of a profile run") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a profile", f"its schema is not {SCHEMA}", "give a profile.json")
    return document
