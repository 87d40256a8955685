"""The `profile` stage: speed and memory of one or several models on this machine, each figure in a fresh process.

The parts are in `profiling/`: the protocol, the process that measures (child.py), how it is started (parent.py). Run
this by `qwen-quant profile` or `python -m qwen_quant`: a script in this folder would hide the standard `profile`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.families import ModelSpec, read_model_spec
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.environment import inspect_environment, package_versions
from qwen_quant.errors import InputError
from qwen_quant.profiling.journal import Ask, Journal
from qwen_quant.profiling.parent import ask
from qwen_quant.profiling.protocol import Cell, ProfileConfig, planned_cells
from qwen_quant.profiling.published import matching, published_figures
from qwen_quant.profiling.results import (
    MEASURED,
    OOM,
    Measurement,
    Memory,
    ModelFacts,
    ProfileResult,
    Published,
    Ratio,
    Speed,
)
from qwen_quant.profiling.roofline import MeanCache, roofline
from qwen_quant.profiling.timing import Timing, latency_curve, percentile, spread, total_seconds
from qwen_quant.progress import ProgressFn, no_progress


@dataclass(frozen=True)
class Subject:
    """A model to profile: what to call it, and its folder."""

    name: str
    folder: Path


def profile_models(
    subjects: Sequence[Subject],
    config: ProfileConfig,
    progress: ProgressFn = no_progress,
    *,
    ask_child: Ask = ask,
    unfinished: Path | None = None,
) -> ProfileResult:
    """Measure every cell of every model; the first model is what the others are compared with.

    A cell that runs out of memory, or fails, says so and the next one is measured. Measurements are kept in the folder
    `unfinished` until the caller, who has written the result, removes it: an interrupted run continues from there.

    Errors: InputError for a folder that is no checkpoint of a known family, two models of one name, or no such device.
    """
    started = time.monotonic()
    specs = {subject.name: read_model_spec(subject.folder) for subject in subjects}
    if len(specs) < len(subjects):
        raise InputError("two models have the same name", next_step="give each once, or rename a folder")
    facts = tuple(_facts(subject) for subject in subjects)
    cells = planned_cells(config)
    steps, done = 1 + len(cells) * len(subjects), 1
    progress("memory bandwidth", 0, steps)
    settings = asdict(config)
    machine = ask_child({"task": "bandwidth", "settings": settings})
    measure = Journal(ask_child, unfinished, _identity(facts))
    rate = float(machine.get("bytes_per_second", 0.0))
    measurements = []
    for subject in subjects:
        for cell in cells:
            progress(f"{subject.name}: {cell.label}, {cell.kv_cache} cache", done, steps)
            request = {"task": "measure", "folder": str(subject.folder), "cell": asdict(cell), "settings": settings}
            measurements.append(measurement(subject.name, cell, measure(request), rate))
            done += 1
    progress("done", steps, steps)
    return ProfileResult(
        models=facts,
        measurements=tuple(measurements),
        ratios=ratios(measurements, [subject.name for subject in subjects]),
        published=_published(facts, specs, cells),
        device=machine.get("device", "unknown"),
        device_name=machine.get("name") or inspect_environment(Path.cwd()).cpu_name,
        threads=machine.get("threads", 0),
        bandwidth_bytes_per_second=rate,
        config=config,
        warnings=(*_warnings(machine, specs, measurements), *_reused(measure.reused, len(measurements))),
        versions=package_versions(),
        seconds=time.monotonic() - started,
    )


def measurement(model: str, cell: Cell, answer: dict[str, Any], bandwidth: float) -> Measurement:
    """The figures of one child's answer; `bandwidth` is in bytes per second (0: unknown, no roofline)."""
    status, kernel = answer["status"], answer.get("kernel", "")
    if status != MEASURED:
        return Measurement(model, cell, kernel, status, answer["reason"], 0, None, None, None)
    runs = answer["runs"]
    timings = [
        Timing(r["timing"]["first_token_seconds"], tuple(r["timing"]["step_seconds"]), r["timing"]["wanted_tokens"])
        for r in runs
    ]
    speed = _speed(cell, timings, [run["joules"] for run in runs], answer["energy_source"])
    first = runs[0]
    fixed = first["cache_fixed_bytes"]
    token_bytes = (first["cache_bytes"] - fixed) / max(1, first["cache_capacity"])
    steps = [timing.tokens - 1 for timing in timings]
    seen = cell.context_tokens + sum(count**2 / 2 for count in steps) / max(1, sum(steps))
    whole = cell.context_tokens + (cell.new_tokens - 1) / 2
    cache = MeanCache(fixed + token_bytes * whole, fixed + token_bytes * seen)
    line = roofline(cell, answer["step_weights_bytes"], cache, bandwidth, speed.inter_token_p50_seconds)
    tokens = min(timing.tokens for timing in timings)
    missing = max(0.0, fixed + token_bytes * (cell.context_tokens + cell.new_tokens - 1) - first["cache_bytes"])
    memory = _memory(answer, round(missing))
    compiling, dtype = answer["compile_seconds"], answer["cache_dtype"]
    return Measurement(model, cell, kernel, status, "", tokens, speed, memory, line, compiling, dtype)


def _speed(cell: Cell, timings: list[Timing], joules: list[float | None], source: str) -> Speed:
    totals = [total_seconds(timing) for timing in timings]
    firsts = [timing.first_token_seconds for timing in timings]
    steps = [seconds for timing in timings for seconds in timing.step_seconds]
    counted = [joule for joule in joules if joule is not None]
    tokens = cell.batch_size * sum(timing.tokens for timing in timings)
    longest = max(timings, key=lambda timing: timing.tokens)
    first = spread(firsts)
    prefilled = cell.batch_size * cell.context_tokens
    return Speed(
        tokens_per_second=spread([cell.batch_size * cell.new_tokens / total for total in totals]),
        seconds=spread(totals),
        time_to_first_token_seconds=first,
        inter_token_p50_seconds=percentile(steps, 0.5) if steps else None,
        inter_token_p99_seconds=percentile(steps, 0.99) if steps else None,
        prefill_tokens_per_second=prefilled / first.median if cell.context_tokens > 1 else None,
        joules_per_token=sum(counted) / tokens if len(counted) == len(joules) else None,
        energy_source=source,
        latency_curve=latency_curve(longest),
    )


def _memory(answer: dict[str, Any], missing_bytes: int) -> Memory:
    """The peaks of an answer; a cut run would have had `missing_bytes` more in its cache."""
    cache = answer["runs"][0]["cache_bytes"] + missing_bytes
    generation = answer["generation_peak_bytes"] + missing_bytes
    device = answer["device_peak_bytes"]
    return Memory(
        peak_bytes=max(answer["peak_bytes"], generation),
        generation_peak_bytes=generation,
        process_bytes=answer["process_bytes"],
        weights_bytes=answer["weights_bytes"],
        kv_cache_bytes=cache,
        rest_bytes=generation - cache - answer["weights_bytes"] - answer["process_bytes"],
        device_peak_bytes=None if device is None else device + missing_bytes,
        extrapolated=missing_bytes > 0,
    )


def ratios(measurements: Sequence[Measurement], names: Sequence[str]) -> tuple[Ratio, ...]:
    """Every later model over the first, cell by cell."""
    found = {(m.model, m.cell): m for m in measurements}
    rows = []
    for name in names[1:]:
        for cell in dict.fromkeys(m.cell for m in measurements):
            ours, base = found[name, cell], found[names[0], cell]
            speed = memory = None
            if ours.speed and base.speed:
                speed = ours.speed.tokens_per_second.median / base.speed.tokens_per_second.median
            if ours.memory and base.memory:
                memory = ours.memory.generation_peak_bytes / base.memory.generation_peak_bytes
            rows.append(Ratio(name, names[0], cell, speed, memory))
    return tuple(rows)


def _facts(subject: Subject) -> ModelFacts:
    # Imported here: it loads torch and transformers, which reading a command line does not need.
    from qwen_quant.runtime.loading import WeightSource

    source = WeightSource(subject.folder)
    return ModelFacts(subject.name, str(subject.folder), source.kind, source.nbytes, weights_sha256(subject.folder))


def _identity(facts: Sequence[ModelFacts]) -> dict[str, Any]:
    return {"versions": package_versions(), "weights": {fact.folder: fact.sha256 for fact in facts}}


def _reused(count: int, total: int) -> list[str]:
    return [f"{count} of {total} measurements are of an earlier run that was interrupted"] if count else []


def _published(
    facts: Sequence[ModelFacts], specs: dict[str, ModelSpec], cells: tuple[Cell, ...]
) -> tuple[Published, ...]:
    rows: list[Published] = []
    for fact in facts:
        spec = specs[fact.name]
        known = published_figures(spec.family.model_type, spec.hidden_size, spec.num_layers, fact.kind)
        rows += [replace(row, beside=fact.name) for row in matching(known, cells)]
    return tuple(rows)


def _warnings(machine: dict[str, Any], specs: dict[str, ModelSpec], measurements: Sequence[Measurement]) -> list[str]:
    found = []
    if machine["status"] != MEASURED:
        found.append(f"the memory bandwidth could not be measured ({machine['reason']}): there is no roofline")
    for m in measurements:
        where = f"{m.model}, {m.cell.label}, {m.cell.kv_cache} cache"
        if m.status not in (MEASURED, OOM):
            found.append(f"{where}: {m.reason}")
        if m.extrapolated:
            found.append(f"{where}: stopped by --max-seconds, extrapolated from {m.measured_tokens} tokens")
    for name, spec in specs.items():
        most = spec.trained_length
        longest = max((m.cell.context_tokens + m.cell.new_tokens - 1 for m in measurements), default=0)
        if most is not None and longest > most:
            found.append(f"{name}: {longest} tokens are more than its {most} positions: speed only, the text is no use")
    return found
