"""`qwen-quant push`: an artifact with its evidence to the hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qwen_quant.hub.push import PushResult

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder of an artifact, with report.json in it")]
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
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload an artifact to the Hugging Face hub: exactly the files that its manifest names, in one commit.

    Before anything is sent: hashes and tensors are checked, report.json must be of these weights with its gates passed
    (exit code 4 otherwise), readers' rules must hold (docs/consumers.md), licence and card must be there. Afterwards
    every remote hash is compared. An interrupted push is continued by the same command, and makes no second commit.

    The token is the hub's own: hf auth login, or HF_TOKEN.

    \b
    Examples:
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --dry-run
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --private --tag v1
      qwen-quant push ./Qwen2.5-0.5B-Int4 my-org/Qwen2.5-0.5B-Int4 --create-pr --sign key.pem --json
    """
    output = Output(json=json, quiet=quiet)

    from qwen_quant.hub.push import PushJob
    from qwen_quant.hub.push import push as push_artifact

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
    with running(output) as progress:
        result = push_artifact(job, progress)
    show(Report("push", to_json(result), report_parts(result)), output)


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
    rows = tuple((file.name, format_bytes(file.size), file.sha256[:16], file.state) for file in result.files)
    return ("\n".join(lines), Table("files", ("file", "size", "sha256", ""), rows))
