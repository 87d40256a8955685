"""`qwen-quant download`: the needed files of a repository, every hash checked, continued after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qwen_quant.hub.download import DownloadResult

Repo = Annotated[
    str, typer.Argument(metavar="REPO[@REVISION]", help="hub id, with branch, tag or commit after the '@'")
]
Source = Annotated[Literal["hf", "modelscope"], typer.Option("--source", help="Hugging Face hub or ModelScope")]
LocalDir = Annotated[
    Path | None, typer.Option("--local-dir", metavar="DIR", help="write plain files to DIR (else: the hub's cache)")
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="only files that match, e.g. '*.json'; may be repeated"),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="leave these files out; may be repeated")
]
Recheck = Annotated[bool, typer.Option("--recheck", help="hash files again that were found right by an earlier run")]


def download(
    repo: Repo,
    source: Source = "hf",
    local_dir: LocalDir = None,
    include: Include = None,
    exclude: Exclude = None,
    recheck: Recheck = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fetch the files of a model that quantizing and serving need, and check the hash of every one.

    Needed are safetensors weights, configuration, tokenizer, chat template, licence and card at the top of the
    repository. Python files and pickles are never fetched. The revision becomes a commit first, and all files come from
    that commit. A killed download continues where it was when the same command runs again.

    With HF_HUB_OFFLINE=1 nothing is asked of the network: what is complete is checked and named.

    \b
    Examples:
      qwen-quant download Qwen/Qwen2.5-7B-Instruct
      qwen-quant download Qwen/Qwen3-8B@main --local-dir ./Qwen3-8B
      qwen-quant download Qwen/Qwen-7B-Chat --source modelscope --json
      qwen-quant download org/name@v1.0 --include '*.json' --exclude 'report.json'
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.hub.download import DownloadJob, download_repo, parse_repo

    name, revision = parse_repo(repo)
    patterns = (tuple(include or ()), tuple(exclude or ()))
    job = DownloadJob(name, revision, source, local_dir, *patterns, force, recheck)
    with running(output) as progress:
        result = download_repo(job, progress)
    show(Report("download", to_json(result), report_parts(result)), output)


def report_parts(result: DownloadResult) -> tuple[str | Table, ...]:
    """The result for people: where it lies, which commit, what every file cost."""
    rows = tuple(
        (file.path, format_bytes(file.size), file.how, file.sha256 or f"git {file.blob_id}") for file in result.files
    )
    count = f"{len(result.files)} files, {format_bytes(result.total_bytes)}"
    rate = result.fetched_bytes / max(result.seconds, 1e-9)
    cost = f"{format_bytes(result.fetched_bytes)} fetched in {format_seconds(result.seconds)}"
    if result.fetched_bytes:
        cost += f" ({format_bytes(rate)}/s)"
    if result.offline:
        cost = "offline: nothing was fetched, every file is here"
    left = f"left out: {len(result.left_out)} files ({_reasons(result.left_out)})" if result.left_out else ""
    return (
        str(result.path),
        f"{result.repo} at commit {result.commit}",
        Table("", ("file", "size", "how", "verified sha256"), rows, text_columns=1),
        f"{count}, all verified; {cost}",
        *((left,) if left else ()),
    )


def _reasons(left_out: dict[str, str]) -> str:
    """How many files were left out for which reason."""
    reasons = list(left_out.values())
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
