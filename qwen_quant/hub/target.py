"""The repository that a push goes to: what is there, what a push would change, and making what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from qwen_quant.checkpoint.identity import EXPORT_SUFFIXES
from qwen_quant.checkpoint.manifest import MANIFEST_FILE
from qwen_quant.checkpoint.reader import INDEX_FILE, PICKLE_PATTERNS
from qwen_quant.errors import InputError
from qwen_quant.hub.fingerprint import git_blob_id
from qwen_quant.hub.huggingface import HuggingFace
from qwen_quant.hub.plan_files import RemoteFile
from qwen_quant.hub.session import MAIN_BRANCH, Session, ask
from qwen_quant.hub.transport import http_body
from qwen_quant.signing import SIGNATURE_FILE

_WEIGHTS = (*(f"*{suffix}" for suffix in EXPORT_SUFFIXES), INDEX_FILE, "*.bin.index.json", *PICKLE_PATTERNS)
_LARGEST_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class UploadFile:
    """One file of the artifact: `name` in the repository, its local `path`, `size` in bytes and `sha256`."""

    name: str
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class TargetState:
    """What is there now.

    Attributes:
        exists, private: of the repository. branch_exists: of the branch.
        head: commit that a push would build on (of main, where the branch is still to be made), None without any.
        files: path -> file at `head`. tags: name -> commit.
    """

    exists: bool
    private: bool = False
    branch_exists: bool = False
    head: str | None = None
    files: tuple[RemoteFile, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Changes:
    """What a push would do: files to send, names that are there already, names of an earlier push to remove."""

    upload: tuple[UploadFile, ...]
    same: tuple[str, ...]
    delete: tuple[str, ...]


def look(session: Session) -> TargetState:
    """The state of the target. Raises what the client raises, except for a repository that is not there."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi()
    try:
        info = ask(lambda: api.model_info(session.repo_id))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if get_token() is not None:
            ask(api.whoami)  # tells a bad token from an absent repository
        return TargetState(exists=False)
    refs = ask(lambda: api.list_repo_refs(session.repo_id))
    tags = tuple((ref.name, ref.target_commit) for ref in refs.tags)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    _check_branch(session, dict(tags), branches)
    head = branches.get(session.branch) or branches.get(MAIN_BRANCH)
    files = files_at(session, head) if head else ()
    return TargetState(True, bool(info.private), session.branch in branches, head, files, tags)


def files_at(session: Session, commit: str) -> tuple[RemoteFile, ...]:
    """The files of one commit."""
    return ask(lambda: HuggingFace().listing(session.repo_id, commit)).files


def _check_branch(session: Session, tags: dict[str, str], branches: dict[str, str]) -> None:
    name = session.branch
    if name in tags and name not in branches:
        raise InputError(
            f"'{name}' of '{session.repo_id}' is a tag", "a push goes to a branch", "give a branch with --revision"
        )


def make_ready(session: Session, state: TargetState, *, private: bool) -> TargetState:
    """Make the repository and the branch where they are missing; the state afterwards.

    Errors: InputError when a private one is asked for and the repository is public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    if state.exists and private and not state.private:
        refuse_public(session.repo_id)
    if not state.exists:
        ask(lambda: api.create_repo(session.repo_id, private=True if private else None, exist_ok=True))
        state = look(session)
    if not state.branch_exists and session.branch != MAIN_BRANCH:
        ask(lambda: api.create_branch(session.repo_id, branch=session.branch, exist_ok=True))
        state = look(session)
    return state


def refuse_public(repo_id: str) -> NoReturn:
    """A private repository was asked for, and it is public (InputError)."""
    raise InputError(f"'{repo_id}' exists and is public", "--private was given", "make it private in its settings")


def is_same(file: UploadFile, remote: RemoteFile | None) -> bool:
    """Whether the hub holds exactly this content under this name."""
    if remote is None or remote.size != file.size:
        return False
    if remote.sha256:
        return remote.sha256 == file.sha256
    return remote.blob_id == git_blob_id(file.path)


def differing(files: Iterable[UploadFile], remote: Iterable[RemoteFile]) -> list[str]:
    """Names of files whose content on the hub is another one, or absent."""
    there = {file.path: file for file in remote}
    return [file.name for file in files if not is_same(file, there.get(file.name))]


def changes(session: Session, files: Sequence[UploadFile], state: TargetState, format_name: str = "") -> Changes:
    """Compare the artifact with the target; `format_name` is the format of an export ("" for an artifact itself).

    What an earlier push of this tool left there and this artifact does not have is removed in the same commit. Weights
    of anybody else are never removed: readers would mix them with these, so such a target is refused.

    Errors: InputError naming the foreign weights, or where an earlier push was of another format: the two would
    replace each other.
    """
    differ = set(differing(files, state.files))
    own = {file.name for file in files}
    others = [file.path for file in state.files if file.path not in own]
    there = _earlier_manifest(session, state) if others else {}
    earlier = _names(there)
    if earlier and _format(there) != format_name:
        raise InputError(
            f"'{session.repo_id}' holds {_format(there) or there.get('method', 'an artifact')} of an earlier push",
            f"{format_name or 'the artifact itself'} would replace it, and a runtime loads a repository's root",
            "give each format a repository of its own",
        )
    delete = tuple(sorted(name for name in others if name in earlier))
    foreign = [name for name in others if name not in earlier and _is_weights(name)]
    if foreign:
        raise InputError(
            f"'{session.repo_id}' holds weights that this artifact does not name: {', '.join(foreign[:3])}",
            "readers would load them together with, or instead of, these",
            "push to another repository or --revision, or delete them on the hub first",
        )
    upload = tuple(file for file in files if file.name in differ)
    return Changes(upload, tuple(sorted(own - differ)), delete)


def _is_weights(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in _WEIGHTS)


def _names(manifest: dict[str, Any]) -> set[str]:
    """Files that the manifest of an earlier push names."""
    try:
        return {*map(str, manifest["output"]["sha256"]), SIGNATURE_FILE}
    except (KeyError, TypeError):
        return set()


def _format(manifest: dict[str, Any]) -> str:
    return str(manifest.get("format", "")) if manifest.get("method") == "export" else ""


def _earlier_manifest(session: Session, state: TargetState) -> dict[str, Any]:
    """The manifest of an earlier push at the target ({} without a readable one)."""
    from huggingface_hub import hf_hub_url

    sizes = {file.path: file.size for file in state.files}
    if sizes.get(MANIFEST_FILE, _LARGEST_MANIFEST_BYTES + 1) > _LARGEST_MANIFEST_BYTES:
        return {}
    url = hf_hub_url(session.repo_id, MANIFEST_FILE, revision=state.head)

    def read() -> bytes:
        with http_body(url, session.headers, 0) as body:
            return b"".join(body.chunks)

    try:
        found = json.loads(ask(read))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
