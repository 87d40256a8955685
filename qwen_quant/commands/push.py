"""`qwen-quant push`: an artifact with its evidence to the hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, error_fields, running, show
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qwen_quant.hub.push import PushResult
    from qwen_quant.hub.push_formats import PushedRepository
    from qwen_quant.hub.push_prepare import PushJob

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="folder of an artifact or an export, with report.json in it")
]
Repo = Annotated[str, typer.Argument(metavar="ORG/NAME", help="repository on the hub; made where it does not exist")]
Private = Annotated[bool, typer.Option("--private", help="make the repository private")]
Revision = Annotated[str | None, typer.Option("--revision", help="branch; made where it does not exist (main)")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="open a pull request instead of committing")]
Tag = Annotated[str | None, typer.Option("--tag", help="tag for the commit, set once everything is verified")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything and compare; change nothing anywhere")]
OverrideGates = Annotated[
    str, typer.Option("--override-gates", metavar="REASON", help="push although a gate failed; the card says why")
]
CardLanguage = Annotated[
    Literal["en", "zh", "both"] | None, typer.Option("--card-language", help="of the model card (as it is, or en)")
]
FormatNames = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="FORMAT[=ORG/OTHER],...",
        help="export DIR to these formats too, each to a repository of its own (ORG/NAME-GGUF, ...)",
    ),
]
SignKey = Annotated[
    Path | None, typer.Option("--sign", metavar="KEY", help="sign with this PEM private key (extra 'sign')")
]


def push(
    folder: Folder,
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    tag: Tag = None,
    dry_run: DryRun = False,
    override_gates: OverrideGates = "",
    card_language: CardLanguage = None,
    sign: SignKey = None,
    format: FormatNames = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload an artifact to the Hugging Face hub: exactly the files that its manifest names, in one commit.

    Before anything is sent: hashes and tensors are checked, report.json must be of these weights with its gates passed
    (exit code 4 otherwise), readers' rules must hold (docs/consumers.md), licence and card must be there. Afterwards
    every remote hash is compared. An interrupted push is continued by the same command, and makes no second commit.

    DIR may be an export too: its gates are those of the artifact whose codes it has. With --format the exports are made
    beside DIR (DIR-gguf), or taken as they are where they are up to date, and pushed after it to repositories of their
    own; every check of all of them comes before the first byte is sent.

    The token is the hub's own: hf auth login, or HF_TOKEN.

    \b
    Examples:
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --dry-run
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --private --tag v1
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --create-pr --sign key.pem --json
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --format gguf,mlx=my-org/Qwen2.5-0.5B-mlx
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.hub.push import push as push_artifact
    from qwen_quant.hub.push_prepare import PushJob, check_job

    job = PushJob(
        folder=folder.expanduser(),
        repo_id=repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        dry_run=dry_run,
        override_gates=override_gates,
        card_language=card_language,
        sign_key=sign,
    )
    check_job(job)
    if format:
        _push_formats(job, format, output)
        return
    with running(output) as progress:
        result = push_artifact(job, progress)
    show(Report("push", to_json(result), report_parts(result)), output)


def _push_formats(job: PushJob, values: list[str], output: Output) -> None:
    """The artifact and its exports; one document, and the exit code of the first that failed."""
    from qwen_quant.hub.push_formats import artifact_bits, first_error, parse_targets, push_formats

    targets = parse_targets(values, job.repo_id, artifact_bits(job.folder))
    with running(output) as progress:
        rows = push_formats(job, targets, progress)
    error = first_error(rows)
    parts = [part for row in rows for part in repository_parts(row)]
    show(Report("push", {"repositories": [repository_data(row) for row in rows]}, tuple(parts)), output, error)
    if error is not None:
        raise typer.Exit(error.exit_code)


def repository_data(row: PushedRepository) -> dict[str, Any]:
    """One repository for --json: the fields of a push where there was one."""
    told = {"format": row.format, "folder": str(row.folder), "note": row.note}
    result = to_json(row.result) if row.result is not None else {"repo_id": row.repo_id}
    return {**told, **result, "error": error_fields(row.error) if row.error is not None else None}


def repository_parts(row: PushedRepository) -> tuple[str | Table, ...]:
    """One repository for people."""
    title = f"{row.format or 'artifact'} ({row.folder}):"
    if row.result is not None:
        return (title, *report_parts(row.result))
    why = f"FAILED: {row.error}" if row.error is not None else row.note
    return (f"{title}\n{row.repo_id}: {why}",)


def report_parts(result: PushResult) -> tuple[str | Table, ...]:
    """The result for people: where it is, what was sent, what to know, then every file."""
    place = f"{result.endpoint}/{result.repo_id}"
    lines = [f"{place} ({result.branch}): {result.outcome}"]
    lines += [f"pull request: {result.pull_request}"] if result.pull_request else []
    lines += [f"commit {result.commit}: every remote hash equals the local one"] if result.commit else []
    lines += [f"tag {result.tag}"] if result.tag and result.commit else []
    sent = sum(file.state == "sent" for file in result.files)
    verb = "to send" if result.commit is None else "sent"
    lines.append(
        f"{sent} files ({format_bytes(result.sent_bytes)}) {verb}, {len(result.files) - sent} there already, "
        f"{format_seconds(result.seconds)}"
    )
    lines += [f"removed, left by an earlier push: {', '.join(result.deleted)}"] if result.deleted else []
    lines += [f"signed: {'yes' if result.signed else 'no'}"]
    lines += [f"WARNING: {line}" for line in result.warnings]
    lines += [f"WARNING ({', '.join(f.consumers)}): {f.message} [{f.rule}]" for f in result.findings]
    states = {"sent": "sent" if result.commit else "to send", "there": "there"}
    rows = tuple((file.name, format_bytes(file.size), file.sha256[:16], states[file.state]) for file in result.files)
    return ("\n".join(lines), Table("files", ("file", "size", "sha256", ""), rows))
