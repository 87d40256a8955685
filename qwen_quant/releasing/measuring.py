"""The stages that measure the artifact and decide on it: `validate`, `profile`, `gate`.

`validate` and `profile` write outside the artifact, so that measurements outlive it when it is made anew with the same
bytes; the card stage puts them into it.  The gates are a stage of their own: other limits measure nothing again.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint.manifest import versions
from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.data import bundled_path
from qwen_quant.errors import GateError, QwenQuantError
from qwen_quant.evaluation.gates import check_gates, remedy, with_gates
from qwen_quant.evaluation.measure import measure
from qwen_quant.evaluation.report import HTML_FILE, JSON_FILE, layers_of, read_report, write_report
from qwen_quant.evaluation.tasks import TaskRun
from qwen_quant.evaluation.texts import BUNDLED_TEXTS
from qwen_quant.profile import Subject, profile_models
from qwen_quant.profiling.journal import FOLDER
from qwen_quant.profiling.page import write_outputs
from qwen_quant.profiling.results import FAILED, ProfileResult
from qwen_quant.progress import ProgressFn
from qwen_quant.releasing.records import Made, inputs_sha256
from qwen_quant.releasing.stage import Context, Stage, always, artifact_name, plain, source_name, weights_stamp
from qwen_quant.results import GateOutcome, Interval, ValidationResult, to_json

MEASURED_FOLDER, REPORT_FOLDER, PROFILE_FOLDER = "measured", "report", "profile"
_UNFINISHED = ".validate-"


def quantizer(context: Context) -> str:
    """The stage that made the artifact: "gptq" or "bnb"."""
    return context.recipe.release.kind


def _text_hashes(texts: tuple[str, ...]) -> dict[str, str]:
    """sha256 of every text that lies in a file; a data set of the Hub is known by its name only."""
    found = {}
    for spec in texts:
        names = list(BUNDLED_TEXTS) if spec == "bundled" else [spec.removeprefix("bundled:")]
        paths = [bundled_path(BUNDLED_TEXTS[name]) for name in names if name in BUNDLED_TEXTS]
        if not spec.startswith("bundled"):
            paths = [path for path in (Path(spec), Path(spec.partition("#")[0])) if path.is_file()][:1]
        found[spec] = " ".join(file_sha256(path) for path in paths)
    return found


def _validate_inputs(context: Context) -> dict[str, Any]:
    config = dataclasses.asdict(context.recipe.base.validation)
    del config["resume"]
    return plain(
        validation=config,
        texts=_text_hashes(context.recipe.base.validation.texts),
        tasks=context.recipe.tasks,
        baseline=context.digest("download"),
        artifact=context.digest(quantizer(context)),
        versions=versions(),
    )


def _task_run(context: Context, work: Path) -> TaskRun | None:
    tasks = context.recipe.tasks
    if not tasks.wanted:
        return None
    return TaskRun(
        tasks=tasks.tasks,
        preset=tasks.preset or None,
        tasks_dirs=(),
        limit=tasks.limit,
        allow_code_execution=tasks.allow_code_execution,
        seed=context.recipe.base.validation.seed,
        work=work,
        data_dir=Path(tasks.data_dir),
        by_subject=tasks.by_subject,
        offline=tasks.offline,
    )


def _unfinished_folder(context: Context, inputs: dict[str, Any]) -> Path:
    """Where finished rounds of these inputs are kept."""
    stamp = weights_stamp([context.folder("download"), context.folder(quantizer(context))])
    return context.work / f"{_UNFINISHED}{inputs_sha256({**inputs, 'files': stamp})[:12]}"


def _validate(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    work, out = _unfinished_folder(context, inputs), context.work / MEASURED_FOLDER
    pair = (context.folder("download"), context.folder(quantizer(context)))
    config = dataclasses.replace(context.recipe.base.validation, resume=True)
    measured = measure(pair, config, _task_run(context, work), progress, work=work)
    # What is published says what was compared, not where it lay on this machine.
    result = dataclasses.replace(measured, baseline=source_name(context), quantized=artifact_name(context.recipe))
    write_report(result, out, layers_of(pair[1]))
    for folder in context.work.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder)
    return Made(out, (JSON_FILE,), figures=validation_figures(result), summary=_validation_summary(result))


def validation_figures(result: ValidationResult) -> dict[str, Any]:
    """The figures that decide: per text KL divergence, perplexity ratio, top-1; per task the two scores."""
    texts = {
        text.dataset: {
            "kl_mean": _interval(text.kl_mean),
            "perplexity_ratio": _interval(text.perplexity_ratio),
            "top1_agreement": _interval(text.top1_agreement),
            "tokens": text.tokens,
        }
        for text in result.texts
    }
    tasks = {f"{task.task}:{task.metric}": [task.baseline, task.quantized] for task in result.tasks}
    smoke = {"asked": len(result.smoke), "failed": sum(bool(case.failures) for case in result.smoke)}
    return {"texts": texts, "tasks": tasks, "smoke": smoke, "warnings": list(result.warnings)}


def _number(value: float) -> float | None:
    """JSON knows no NaN and no infinity: such a figure is None."""
    return value if math.isfinite(value) else None


def _interval(value: Interval) -> dict[str, float | None]:
    return {"estimate": _number(value.estimate), "low": _number(value.low), "high": _number(value.high)}


def _validation_summary(result: ValidationResult) -> str:
    if not result.texts:
        return "nothing was measured: a smoke prompt failed"
    rows = [
        f"{t.dataset}: KL {t.kl_mean.estimate:.4f}, top-1 {100 * t.top1_agreement.estimate:.1f}%" for t in result.texts
    ]
    return "; ".join(rows) + (f"; {len(result.tasks)} tasks" if result.tasks else "")


def _profile_left_out(context: Context) -> str:
    return "the recipe profiles nothing" if context.recipe.release.profile == "none" else ""


def _profile_inputs(context: Context) -> dict[str, Any]:
    both = context.recipe.release.profile == "both"
    return plain(
        profile=context.recipe.profile,
        baseline=context.digest("download") if both else None,
        artifact=context.digest(quantizer(context)),
        versions=versions(),
    )


def _profile(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    subjects = [Subject(artifact_name(context.recipe), context.folder(quantizer(context)))]
    if context.recipe.release.profile == "both":
        subjects.insert(0, Subject(source_name(context), context.folder("download")))
    measured = profile_models(subjects, context.recipe.profile, progress, unfinished=context.work / FOLDER)
    named = tuple(dataclasses.replace(model, folder=model.name) for model in measured.models)
    result, out = dataclasses.replace(measured, models=named), context.work / PROFILE_FOLDER
    written = write_outputs(result, out)
    shutil.rmtree(context.work / FOLDER, ignore_errors=True)
    figures = {"tokens_per_second": _speeds(result), "ratios": to_json(result.ratios)}
    names = tuple(path.name for path in written)
    return Made(out, names, figures=figures, summary=_speed_summary(result), error=_failed(result))


def _speeds(result: ProfileResult) -> dict[str, dict[str, float | str]]:
    """Model -> cell -> tokens per second, or why there is no figure."""
    found: dict[str, dict[str, float | str]] = {model.name: {} for model in result.models}
    for m in result.measurements:
        cell = f"{m.cell.label}, {m.cell.kv_cache} cache"
        found[m.model][cell] = m.speed.tokens_per_second.median if m.speed else m.status
    return found


def _speed_summary(result: ProfileResult) -> str:
    first = result.measurements[-len(result.measurements) // len(result.models)] if result.measurements else None
    if first is None or first.speed is None:
        return f"{len(result.measurements)} measurements"
    return f"{first.cell.label}: {first.speed.tokens_per_second.median:.1f} tokens/s"


def _failed(result: ProfileResult) -> QwenQuantError | None:
    """Out of memory is a result; any other failure of a measurement is not."""
    failed = [m for m in result.measurements if m.status == FAILED]
    if not failed:
        return None
    why = f"{failed[0].model}, {failed[0].cell.label}: {failed[0].reason}"
    return QwenQuantError(f"{len(failed)} of {len(result.measurements)} measurements failed", why, "run it again")


def _gate_inputs(context: Context) -> dict[str, Any]:
    return plain(
        report=context.digest("validate"),
        gates=context.recipe.base.gates,
        override_gates=context.recipe.release.override_gates,
        tool=__version__,
    )


def _gate(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    reason, out = context.recipe.release.override_gates, context.work / REPORT_FOLDER
    measured = read_report(context.folder("validate") / JSON_FILE)
    result = with_gates(measured, context.recipe.base.gates, reason)
    write_report(result, out, layers_of(context.folder(quantizer(context))))
    error: GateError | None = None
    try:
        check_gates(result)
    except GateError as failed:
        step = f"{remedy(result)}; override_gates in [release] says why not"
        error = GateError(failed.what, failed.why, f"nothing is pushed; {step}")
    failures = sum(not gate.passed for gate in result.gates)
    summary = f"{len(result.gates) - failures} of {len(result.gates)} passed"
    if reason and failures:
        summary += f", overridden: {reason}"
    figures = {"gates": [_gate_figures(gate) for gate in result.gates], "override_reason": reason}
    return Made(out, (JSON_FILE, HTML_FILE), figures=figures, summary=summary, error=error)


def _gate_figures(gate: GateOutcome) -> dict[str, Any]:
    return {"name": gate.name, "limit": gate.limit, "value": _number(gate.value), "passed": gate.passed}


VALIDATE = Stage("validate", "compare with the source", always, _validate_inputs, _validate)
PROFILE = Stage("profile", "measure speed and memory", _profile_left_out, _profile_inputs, _profile)
GATE = Stage("gate", "check the limits", always, _gate_inputs, _gate)
