"""A model named on the command line -> a local folder: an existing folder as it is, a hub id through the hub's cache.

Only weights, configuration, tokenizer and licence files are fetched: never Python files, never pickles. The revision is
resolved to a commit first, so that every file comes from the same one and the artifact can name it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_quant.errors import InputError, NetworkError

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
ALLOW_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "*.model",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",
)
IGNORE_PATTERNS = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint lies and what to call it.

    Attributes:
        path: the local folder.
        source_id: the hub id, or the folder's name.
        revision: the commit on the hub, None for a local folder.
    """

    path: Path
    source_id: str
    revision: str | None


def resolve_model(model: str, *, show_progress: bool = False) -> ModelSource:
    """Find the folder of `model` ("path/to/folder" or "org/name[@revision]"); a local folder wins over the hub.

    Errors: InputError for what is neither, NetworkError when the hub does not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelSource(folder, folder.resolve().name, None)
    match = HUB_ID.fullmatch(model)
    if folder.exists() or match is None:
        reason = "it is a file" if folder.exists() else "no such folder, and it is not a hub id"
        raise InputError(
            f"'{model}' is not a checkpoint", reason, "give a checkpoint folder or a hub id org/name[@revision]"
        )
    return download(match["repo"], match["revision"], show_progress=show_progress)


def download(repo: str, revision: str | None, *, show_progress: bool = False) -> ModelSource:
    """Fetch `repo` at `revision` (its default branch when None) into the hub's cache, or find it there when offline.

    Errors: NetworkError naming the repository and what to do.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    # The base of every HTTP error of the client that this huggingface_hub is built on (httpx2 at 2.4).
    client_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    (enable_progress_bars if show_progress else disable_progress_bars)()
    name = f"{repo}@{revision}" if revision else repo
    allow, ignore = list(ALLOW_PATTERNS), list(IGNORE_PATTERNS)
    try:
        try:
            commit = HfApi().model_info(repo, revision=revision).sha
            path = snapshot_download(repo, revision=commit, allow_patterns=allow, ignore_patterns=ignore)
        except OfflineModeIsEnabled:
            path = snapshot_download(
                repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore, local_files_only=True
            )
            commit = Path(path).name
    except HFValidationError as error:
        raise InputError(f"'{repo}' is not a hub id", str(error), "give a folder or org/name[@revision]") from error
    except (client_error, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise _network_error(name, error) from error
    return ModelSource(Path(path), repo, commit)


_NEXT_STEPS = {
    "GatedRepoError": "accept its terms on the model's page, then set HF_TOKEN to a token that may read it",
    "RepositoryNotFoundError": "check the name; for a private model set HF_TOKEN to a token that may read it",
    "RevisionNotFoundError": "check the branch, tag or commit after the '@'",
    "LocalEntryNotFoundError": "it is not in the local cache: unset HF_HUB_OFFLINE, or give the folder of a copy",
}
_OFFLINE_STEP = "check the connection (and HF_ENDPOINT, proxies) and run again, or give the folder of a local copy"


def _network_error(name: str, error: BaseException) -> NetworkError:
    """The hub's exception as ours: its first line, and the next step that fits its class."""
    kinds = [cls.__name__ for cls in type(error).__mro__]
    step = next((_NEXT_STEPS[kind] for kind in kinds if kind in _NEXT_STEPS), _OFFLINE_STEP)
    lines = str(error).strip().splitlines()
    why = lines[0] if lines else type(error).__name__
    return NetworkError(f"cannot fetch '{name}' from the hub, and there is no local folder of that name", why, step)
