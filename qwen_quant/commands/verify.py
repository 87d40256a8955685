"""`qwen-quant verify`: whether an artifact is still what its manifest describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.errors import InputError
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes

if TYPE_CHECKING:
    from qwen_quant.progress import ProgressFn
    from qwen_quant.verify import VerifyResult

Artifact = Annotated[
    str, typer.Argument(metavar="DIR|REPO", help="folder of an artifact, or hub id org/name[@revision]")
]
PublicKey = Annotated[
    Path | None, typer.Option("--key", metavar="PUB", help="PEM public key that must have signed the artifact")
]


def verify(artifact: Artifact, key: PublicKey = None, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Check every file of an artifact against qwen-quant.json, its tensors against the audit, and its signature.

    Files that changed, are missing or do not belong are named; exit code 3 when there are any. A signature (model.sig)
    is checked with --key, offline.

    \b
    Examples:
      qwen-quant verify ./Qwen2.5-0.5B-Int4
      qwen-quant verify my-org/Qwen2.5-0.5B-Int4@v1 --key signer.pub
      qwen-quant verify ./Qwen2.5-0.5B-Int4 --json
    """
    output = Output(json=json, quiet=quiet)
    folder = Path(artifact).expanduser()
    is_local = folder.exists()

    from qwen_quant.verify import check_verified, verify_folder

    left_out: dict[str, str] = {}
    with running(output) as progress:
        if not is_local:
            folder, left_out = _fetch(artifact, progress)
        result = verify_folder(folder, progress, key=key, allow_links=not is_local, left_out=left_out)
    error: InputError | None = None
    try:
        check_verified(result)
    except InputError as problem:
        error = problem
    show(Report("verify", to_json(result), report_parts(result)), output, error)
    if error is not None:
        raise typer.Exit(error.exit_code)


def _fetch(repo: str, progress: ProgressFn) -> tuple[Path, dict[str, str]]:
    """(folder in the hub's cache with every file of a repository, those that are never fetched and why)."""
    from qwen_quant.hub.download import DownloadJob, download_repo, parse_repo
    from qwen_quant.hub.reencoded import own_data_files

    name, revision = parse_repo(repo)
    done = download_repo(DownloadJob(name, revision, include=("*",)), progress)
    data = tuple(sorted(set(own_data_files(done.path)) & set(done.left_out)))
    if data:
        done = download_repo(DownloadJob(name, done.commit, include=("*",), data_files=data), progress)
    return done.path, done.left_out


def report_parts(result: VerifyResult) -> tuple[str | Table, ...]:
    """The result for people: what was checked, then what is wrong."""
    source = f"{result.source_id}@{result.source_revision}" if result.source_revision else result.source_id
    lines = [
        f"{result.folder}: {result.method} of {source}",
        f"{len(result.sha256)} files ({format_bytes(result.nbytes)}) hashed against the manifest",
        f"{result.quantized_linears} linears quantized, {result.kept_tensors} tensors kept",
        f"signature: {result.signature}",
    ]
    if result.weights_sha256:
        lines.append(f"weights sha256: {result.weights_sha256}")
    if not result.problems:
        return ("\n".join([*lines, "everything is as the manifest says"]),)
    rows = tuple((problem.name, problem.kind, problem.detail) for problem in result.problems)
    return ("\n".join(lines), Table("problems", ("file", "kind", "what"), rows, text_columns=3))
