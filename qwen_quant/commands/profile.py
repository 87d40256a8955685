"""`qwen-quant profile`: tokens per second and peak memory, as in the published tables, and what they lack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, note, running, show
from qwen_quant.errors import InputError, QwenQuantError, UsageError
from qwen_quant.profiling.protocol import ProfileConfig, parse_numbers
from qwen_quant.recipe import parse_size
from qwen_quant.results import to_json

if TYPE_CHECKING:
    from qwen_quant.profile import Subject
    from qwen_quant.profiling.results import ProfileResult

REPORT_FOLDER = "profile"

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="folders or hub ids; later ones are compared with the first")
]
BatchSizes = Annotated[
    str | None, typer.Option("--batch-sizes", metavar="N,N,...", help="sweep over rows (1024 new tokens)")
]
NewTokens = Annotated[str | None, typer.Option("--new-tokens", metavar="N,N,...", help="sweep over lengths (one row)")]
ContextTokens = Annotated[int, typer.Option("--context-tokens", help="tokens in front of the new ones, in a sweep")]
KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache", metavar="bf16|int8|qwen", help="one or more with commas; qwen: the original Int8 scheme"
    ),
]
Runs = Annotated[int, typer.Option("--runs", help="timed generations of each cell")]
Warmup = Annotated[int, typer.Option("--warmup-tokens", help="tokens generated before the clock starts")]
MaxSeconds = Annotated[
    float | None,
    typer.Option("--max-seconds", help="stop the runs of a cell after this time; figures are then extrapolated (none)"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="where to run")]
Dtype = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(
        "--dtype", help="of activations and dense weights; auto: BF16, packed models what the hardware multiplies"
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="of the CPU (torch's choice)")]
MemoryLimit = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="SIZE", help="out of memory beyond this, e.g. 16GB (what is free)"),
]
ReportFolder = Annotated[Path, typer.Option("--report", metavar="DIR", help="where profile.json, .html and .svg go")]
Compile = Annotated[
    bool, typer.Option("--compile", help="decode through torch.compile, whose time is reported (needs a C++ compiler)")
]
Png = Annotated[bool, typer.Option("--png", help="the plots as .png too (extra: plots)")]


def profile(
    models: Models,
    batch_sizes: BatchSizes = None,
    new_tokens: NewTokens = None,
    context_tokens: ContextTokens = 1,
    kv_cache: KvCache = "bf16",
    runs: Runs = 3,
    warmup_tokens: Warmup = 8,
    max_seconds: MaxSeconds = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    compile: Compile = False,
    report: ReportFolder = Path(REPORT_FOLDER),
    png: Png = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How fast is a model on this machine, and how much memory does it take?

    Without a sweep, the protocol of the published Qwen tables: 2048 and 8192 tokens from one context token, and 2048
    context tokens plus one. Each measurement runs in a process of its own; out of memory is a result ("oom"). An
    interrupted run continues when the same command is run again.

    \b
    Examples:
      qwen-quant profile ./Qwen2.5-0.5B ./Qwen2.5-0.5B-Int4
      qwen-quant profile ./model --max-seconds 60 --runs 1
      qwen-quant profile ./model --batch-sizes 1,4,16,32,64,100 --kv-cache bf16,int8
      qwen-quant profile ./model --new-tokens 512,1024,2048,4096,8192 --kv-cache bf16,int8
    """
    output = Output(json=json, quiet=quiet)
    config = ProfileConfig(
        batch_sizes=parse_numbers(batch_sizes, "--batch-sizes"),
        new_tokens=parse_numbers(new_tokens, "--new-tokens"),
        context_tokens=context_tokens,
        kv_caches=tuple(kind.strip() for kind in kv_cache.split(",")),
        runs=runs,
        warmup_tokens=warmup_tokens,
        max_seconds=max_seconds,
        device=device,
        dtype=dtype,
        threads=threads,
        memory_limit_bytes=None if memory_limit is None else parse_size(memory_limit),
        compile=compile,
    )
    _check_place(report, force=force)
    if png:
        from qwen_quant.profiling.png import require_matplotlib

        require_matplotlib()
    subjects = _subjects(models, output)

    from qwen_quant.profile import profile_models
    from qwen_quant.profiling.journal import FOLDER
    from qwen_quant.profiling.page import write_outputs

    with running(output) as progress:
        result = profile_models(subjects, config, progress, unfinished=report / FOLDER)
    written = write_outputs(result, report, png=png)
    shutil.rmtree(report / FOLDER, ignore_errors=True)
    note(f"wrote {', '.join(str(path) for path in written)}", output)
    show(Report("profile", to_json(result), _parts(result)), output, _failure(result))
    if (failure := _failure(result)) is not None:
        raise typer.Exit(failure.exit_code)


def _check_place(report: Path, *, force: bool) -> None:
    """Refuse to replace a profile before any work is done (InputError), unless --force."""
    from qwen_quant.profiling.results import read_profile

    path = report / "profile.json"
    if report.exists() and not report.is_dir():
        raise InputError(f"{report} is not a folder", next_step="give another --report DIR")
    if not path.exists():
        return
    if not force:
        raise InputError(f"{path} exists", next_step="give another --report DIR, or --force to replace it")
    read_profile(path)  # --force replaces a profile, nothing else


def _subjects(models: list[str], output: Output) -> list[Subject]:
    from qwen_quant.profile import Subject

    sources = [options.find_model(model, output) for model in models]
    names = [source.source_id for source in sources]
    if len({source.path.resolve() for source in sources}) < len(sources):
        raise UsageError("a model is given twice", next_step="give each once")
    return [
        Subject(name if names.count(name) == 1 else model, source.path)
        for name, model, source in zip(names, models, sources, strict=True)
    ]


def _parts(result: ProfileResult) -> tuple[str | Table, ...]:
    from qwen_quant.evaluation.report_numbers import visible
    from qwen_quant.profiling.page import protocol_lines
    from qwen_quant.profiling.tables import tables

    shown = [
        Table(table.title, table.columns, tuple(tuple(visible(cell) for cell in row) for row in table.rows),
              table.text_columns)
        for table in tables(result)
    ]  # fmt: skip
    warnings = [f"warning: {visible(text)}" for text in result.warnings]
    return (*shown, *warnings, *(visible(line) for line in protocol_lines(result)))


def _failure(result: ProfileResult) -> QwenQuantError | None:
    """An error that goes with the result when a cell failed for another reason than memory."""
    from qwen_quant.profiling.results import FAILED

    failed = [m for m in result.measurements if m.status == FAILED]
    if not failed:
        return None
    first = failed[0]
    rest = "the others are complete; " if len(failed) < len(result.measurements) else ""
    return QwenQuantError(
        f"{len(failed)} of {len(result.measurements)} measurements failed",
        f"{first.model}, {first.cell.label}: {first.reason}",
        rest + "QWEN_QUANT_DEBUG=1 keeps the traceback of the first in the message",
    )
