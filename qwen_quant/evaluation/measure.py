"""The whole of `validate`: smoke prompts and texts, then benchmark tasks, on both models."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from qwen_quant.environment import peak_rss_bytes
from qwen_quant.evaluation.presets import PRESETS
from qwen_quant.evaluation.sandbox import SandboxLimits, probe_isolation
from qwen_quant.evaluation.tasks import TaskRun, check_tasks, pair_tasks, run_tasks
from qwen_quant.evaluation.validate import validate_pair
from qwen_quant.preparation import resolve_device
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import ValidationConfig
from qwen_quant.results import ValidationResult


def measure(
    pair: tuple[Path, Path], config: ValidationConfig, run: TaskRun | None, progress: ProgressFn, *, work: Path
) -> ValidationResult:
    """validate_pair on (baseline, quantized) and then the tasks of `run`, which are checked before anything starts.

    A quantized model that fails a smoke prompt is not asked any task. Errors: InputError as in both.
    """
    started = time.perf_counter()
    if run is not None:
        check_tasks(run)
    result = validate_pair(*pair, config, progress, work=work)
    if run is None or any(case.failures for case in result.smoke):
        return result
    device = resolve_device(config.device)
    runs = (dataclasses.replace(run, kv_cache=""), run)
    first, second = (run_tasks(folder, each, device, progress) for folder, each in zip(pair, runs, strict=True))
    told = {text: None for scores in (first, second) for task in scores.values() for text in task.warnings}
    return dataclasses.replace(
        result,
        tasks=pair_tasks(first, second, config.seed),
        warnings=result.warnings + tuple(told) + _task_notes(run),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_rss_bytes(),
    )


def _task_notes(run: TaskRun) -> tuple[str, ...]:
    """How each task of the preset is scored, and what kept generated code in."""
    notes = [f"{task.name}: {task.note} ({task.source})" for task in PRESETS[run.preset]] if run.preset else []
    if run.allow_code_execution:
        held = probe_isolation(SandboxLimits())
        notes.append(
            f"generated code ran in a process of its own: network kept out by {held.network}, processes by "
            f"{held.processes}, files: {held.files}, user: {held.user}"
        )
    return tuple(notes)
