"""`qwen-quant validate`: how far an artifact is from its baseline, with gates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.commands.validate_report import report_parts
from qwen_quant.console import Output, Report, note, running, show
from qwen_quant.errors import GateError, InputError
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.hub.download import ModelSource
from qwen_quant.recipe import GateConfig
from qwen_quant.results import ValidationResult, to_json

LONG_CONTEXT_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
WORK_FOLDER = ".validate.partial"

Quantized = Annotated[
    str | None, typer.Argument(metavar="OUT", help="quantized folder or hub id (out in qwen-quant.toml)")
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", metavar="MODEL", help="what it was made from (model in qwen-quant.toml)")
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="FILE|bundled|hub:...",
        help="what to score, may be repeated: a .txt file, FILE.jsonl#field, hub:org/name:config:split:field, "
        "bundled:en, bundled:zh (bundled: both)",
    ),
]
Window = Annotated[int | None, typer.Option("--window", help="tokens per window (1024)")]
Stride = Annotated[int | None, typer.Option("--stride", help="tokens between window starts (the window: disjoint)")]
MaxWindows = Annotated[int | None, typer.Option("--max-windows", help="score only the first windows of a text (all)")]
Joining = Annotated[str | None, typer.Option("--join", help="what stands between two rows of a data set (blank line)")]
LongContext = Annotated[
    bool, typer.Option("--long-context", help="add the table of perplexity at 1024, 2048, ... 32768 tokens")
]
Lengths = Annotated[str | None, typer.Option("--lengths", metavar="N,N,...", help="the same table at these lengths")]
KvCache = Annotated[
    Literal["bf16", "int8", "qwen"] | None,
    typer.Option("--kv-cache", help="keep OUT's keys and values in such a cache; without --baseline only that differs"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option("--device", help="where to compute (auto)")]
Seed = Annotated[int | None, typer.Option("--seed", help="of every bootstrap (0)")]
Smoke = Annotated[
    bool | None, typer.Option("--smoke/--no-smoke", help="run fixed prompts first (smoke)", show_default=False)
]
Tasks = Annotated[
    str | None, typer.Option("--tasks", metavar="NAME,...", help="benchmark tasks: mmlu, ceval, cmmlu, gsm8k, ...")
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="qwen-base|qwen-chat", help="the tasks and shots of the Qwen cards")
]
TasksDir = Annotated[list[Path] | None, typer.Option("--tasks-dir", help="folder of your own task files")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="where task data lies for use without network")]
Limit = Annotated[int | None, typer.Option("--limit", help="only the first items of each task (all)")]
BySubject = Annotated[bool, typer.Option("--by-subject", help="list the members of a group of tasks beside it")]
Offline = Annotated[bool, typer.Option("--offline", help="never ask the Hub for task data")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="let code that the model wrote run, in a sandboxed process")
]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="gate: largest mean KL divergence, nats per token")]
MaxRatio = Annotated[
    float | None, typer.Option("--max-perplexity-ratio", help="gate: largest perplexity ratio, quantized / baseline")
]
MinTop1 = Annotated[float | None, typer.Option("--min-top1", help="gate: least top-1 agreement, 0 to 1")]
MaxTaskDrop = Annotated[float | None, typer.Option("--max-task-drop", help="gate: largest loss of a task, 0 to 1")]
Override = Annotated[
    str | None, typer.Option("--override-gates", metavar="REASON", help="accept failed gates; the reason is recorded")
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="DIR", help="where report.json and report.html go (OUT; of a cache alone OUT-int8-cache)"
    ),
]


def validate(
    quantized: Quantized = None,
    baseline: Baseline = None,
    text: Text = None,
    window: Window = None,
    stride: Stride = None,
    max_windows: MaxWindows = None,
    join: Joining = None,
    long_context: LongContext = False,
    lengths: Lengths = None,
    kv_cache: KvCache = None,
    device: Device = None,
    seed: Seed = None,
    smoke: Smoke = None,
    tasks: Tasks = None,
    preset: Preset = None,
    tasks_dir: TasksDir = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    by_subject: BySubject = False,
    offline: Offline = False,
    allow_code_execution: AllowCode = False,
    max_kl: MaxKl = None,
    max_perplexity_ratio: MaxRatio = None,
    min_top1: MinTop1 = None,
    max_task_drop: MaxTaskDrop = None,
    override_gates: Override = None,
    report: ReportFolder = None,
    resume: options.Resume = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Is a quantized folder good enough to release? Compare it with its baseline on the same texts and tasks.

    Smoke prompts, perplexity, KL divergence and top-1 agreement, each with a 95% interval; with --tasks or --preset
    benchmark scores too. Writes report.json and report.html. A gate compares the unfavourable end of the interval; when
    one fails, the exit code is 4 and everything is printed and written all the same.

    \b
    Examples:
      qwen-quant validate ./Qwen2.5-0.5B-Int4 --baseline ./Qwen2.5-0.5B
      qwen-quant validate ./out --baseline Qwen/Qwen3-0.6B --text wiki.test.txt --window 2048 --stride 512
      qwen-quant validate ./out --baseline ./model --max-kl 0.1 --min-top1 0.85 --json
      qwen-quant validate ./out --baseline ./model --preset qwen-base --data-dir ./hub --limit 200
      qwen-quant validate ./out --baseline ./model --long-context --text book.txt --max-windows 1
      qwen-quant validate ./model --kv-cache int8
    """
    output = Output(json=json, quiet=quiet)
    recipe = options.project_recipe(output)
    table = _lengths(long_context, lengths)
    config = options.override(
        recipe.validation,
        texts=tuple(text) if text else None,
        window_tokens=window,
        stride_tokens=stride,
        max_windows=max_windows,
        joining=join,
        lengths=table,
        kv_cache=kv_cache,
        smoke=smoke,
        device=device,
        seed=seed,
        resume=resume,
    )
    limits = {
        "max_kl": max_kl,
        "max_perplexity_ratio": max_perplexity_ratio,
        "min_top1": min_top1,
        "max_task_drop": max_task_drop,
    }
    gates = options.override(recipe.gates, **limits)
    if override_gates is not None and not override_gates.strip():
        raise typer.BadParameter("a reason is required", param_hint="'--override-gates'")
    target_name = options.required(quantized or recipe.out, "out")
    same_weights = kv_cache is not None and baseline is None
    if not (same_weights or baseline or recipe.model):
        raise typer.BadParameter("it is required: the checkpoint OUT was made from", param_hint="'--baseline'")
    wanted = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    target = options.find_model(target_name, output)
    source = target
    if not same_weights:
        source = options.find_model(baseline or options.required(recipe.model, "model"), output)
    folder = report or _report_folder(target, source, config.kv_cache)
    work = _prepare_report(folder, force=force)
    run = None
    if wanted or preset:
        from qwen_quant.evaluation.tasks import TaskRun

        run = TaskRun(
            tasks=wanted,
            preset=preset,
            tasks_dirs=tuple(tasks_dir or ()),
            limit=limit,
            allow_code_execution=allow_code_execution,
            seed=config.seed,
            work=work,
            data_dir=data_dir or Path(),
            by_subject=by_subject,
            offline=offline,
            kv_cache=config.kv_cache,
        )
    elif max_task_drop is not None:
        raise typer.BadParameter("it needs --tasks or --preset", param_hint="'--max-task-drop'")
    from qwen_quant.evaluation.measure import measure

    with running(output) as progress:
        result = measure((source.path, target.path), config, run, progress, work=work)
    _finish(result, gates, (folder, work, target.path), output, override_gates or "")


def _lengths(long_context: bool, lengths: str | None) -> tuple[int, ...] | None:
    """The lengths of the long-context table; None where the command line says nothing."""
    if lengths is None:
        return LONG_CONTEXT_TOKENS if long_context else None
    try:
        return tuple(int(part) for part in lengths.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{lengths}' is not a list of numbers", param_hint="'--lengths'") from None


def _report_folder(target: ModelSource, source: ModelSource, kv_cache: str) -> Path:
    """Where a report goes by default: into OUT; one on a cache alone says nothing of OUT and gets its own folder."""
    if kv_cache and source.path.resolve() == target.path.resolve():
        return Path(f"{target.source_id.rpartition('/')[2]}-{kv_cache}-cache")
    return target.path if target.revision is None else Path(f"{target.path.name}-report")


def _prepare_report(folder: Path, *, force: bool) -> Path:
    """The work folder of a report in `folder` (InputError when a report is there already)."""
    if (folder / JSON_FILE).exists() and not force:
        raise InputError(
            f"{folder / JSON_FILE} exists", next_step="add --force to replace it, or give another place: --report DIR"
        )
    return folder / WORK_FOLDER


def _finish(
    result: ValidationResult, gates: GateConfig, places: tuple[Path, Path, Path], output: Output, reason: str
) -> None:
    """Gates, files, what is printed, exit code; `places` are the report's folder, the work folder and the artifact."""
    from qwen_quant.evaluation.gates import check_gates, with_gates
    from qwen_quant.evaluation.report import layers_of, write_report

    result = with_gates(result, gates, reason)
    data, page = write_report(result, places[0], layers_of(places[2]))
    shutil.rmtree(places[1], ignore_errors=True)
    error: GateError | None = None
    try:
        check_gates(result)
    except GateError as failed:
        error = failed
    note(f"report: {data} and {page}", output)
    show(Report("validate", {**to_json(result), "passed": error is None}, report_parts(result)), output, error)
    if error is not None:
        raise typer.Exit(error.exit_code)
