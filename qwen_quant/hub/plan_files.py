"""Which files of a repository a download takes, and the names that it refuses.

Needed are the files that lie at the top of the repository and hold safetensors weights, configuration, tokenizer,
chat template, licence, card or evidence of an artifact. Python code and pickles run code when they are loaded, and are
never fetched, whatever was asked for. `include` patterns replace the list of what is needed, `exclude` patterns take
from it; both are shell patterns over the whole path, in which `*` crosses "/".
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from qwen_quant.errors import InputError

STATE_FOLDER = ".qwen-quant"
NEEDED_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "*.model",
    "license*",
    "licence*",
    "notice*",
    "readme.md",
    "model.sig",
)
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_BLOB_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CODE_PATTERNS = ("*.py", "*.pyc", "*.so")
_NOT_NEEDED = ("*.bin.index.json",)
_CODE, _PICKLE, _RESERVED = "code is never fetched", "pickles are never fetched", "a name of this program's own"
_UNASKED = "not needed"


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub lists it.

    Attributes:
        path: "/"-separated, relative to the top of the repository.
        size: bytes.
        sha256: 64 hex digits; None for a file that the Hugging Face hub keeps in git.
        blob_id: git's id, 40 hex digits (of the pointer where the content is in LFS); None where it is not listed.
        xet_hash: the name of the content in Xet storage, None where it is not there.
    """

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None
    xet_hash: str | None = None

    @property
    def content_id(self) -> str:
        """What names the content: its sha256, else its git blob id."""
        return self.sha256 or self.blob_id or ""


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        source: "hf" or "modelscope".
        repo: org/name.
        revision: what was asked for, None for the default branch.
        commit: what that was when it was looked up; every file comes from there.
        files: every file of that commit.
    """

    source: str
    repo: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def name(self) -> str:
        """org/name, with "@revision" where one was asked for."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Selection:
    """The files to fetch, and why each other one is left out (path -> reason)."""

    files: tuple[RemoteFile, ...]
    left_out: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def select(
    listing: Listing, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), data_files: Collection[str] = ()
) -> Selection:
    """The files of `listing` to fetch; `data_files` are names of pickles that are known to be none.

    Errors: InputError for a name that leads out of the folder or clashes with another, for ids that are none (they
    become file names), for a repository that has its weights as pickles only or has none, and for patterns that leave
    nothing.
    """
    check_paths(file.path for file in listing.files)
    check_ids(listing)
    reasons = {file.path: _reason(file.path, include, exclude, data_files) for file in listing.files}
    chosen = tuple(file for file in listing.files if not reasons[file.path])
    if not chosen:
        raise _nothing(listing, include, exclude)
    if not include and not any(fnmatch.fnmatchcase(file.path, "*.safetensors") for file in chosen):
        _refuse_without_weights(listing, exclude)
    check_clashes(listing, chosen)
    if bare := [file.path for file in chosen if not file.content_id]:
        raise InputError(f"'{bare[0]}' of '{listing.name}' cannot be verified", "no hash is listed", "leave it out")
    return Selection(chosen, {path: reason for path, reason in reasons.items() if reason})


def _reason(path: str, include: tuple[str, ...], exclude: tuple[str, ...], data_files: Collection[str]) -> str:
    """Why a file is left out; empty for one to fetch."""
    lower = path.lower()
    if _any(lower, _CODE_PATTERNS):
        return _CODE
    if _any(lower, PICKLE_PATTERNS) and path not in data_files:
        return _PICKLE
    if lower.split("/")[0] == STATE_FOLDER:
        return _RESERVED
    if _any(path, exclude):
        return "excluded"
    if include:
        return "" if _any(path, include) else "not included"
    needed = "/" not in path and _any(lower, NEEDED_PATTERNS) and not _any(lower, _NOT_NEEDED)
    return "" if needed else _UNASKED


def _any(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _nothing(listing: Listing, include: tuple[str, ...], exclude: tuple[str, ...]) -> InputError:
    """Nothing is left to fetch: by the patterns, or in the repository."""
    patterns = " ".join([*(f"--include {p}" for p in include), *(f"--exclude {p}" for p in exclude)])
    if patterns and not (_any_pickle(listing) and not include):
        possible = [file.path for file in listing.files if not _reason(file.path, (file.path,), (), ())]
        step = "its files: " + (", ".join(possible[:12]) or "none")
        never = " (code and pickles are never fetched)" if len(possible) < len(listing.files) else ""
        return InputError(f"'{listing.name}' has no file to fetch", f"{patterns} leaves none{never}", step)
    return _without_weights(listing)


def _refuse_without_weights(listing: Listing, exclude: tuple[str, ...]) -> None:
    """The rest of a repository is of no use without weights, unless they were excluded by hand."""
    if not any(_any(file.path, exclude) and file.path.endswith(".safetensors") for file in listing.files):
        raise _without_weights(listing)


def _any_pickle(listing: Listing) -> bool:
    return any(_any(file.path.lower(), PICKLE_PATTERNS) for file in listing.files)


def _without_weights(listing: Listing) -> InputError:
    what = f"'{listing.name}' has no safetensors weights"
    if _any_pickle(listing):
        return InputError(
            what,
            "it has pickles only, and a pickle can run any code when it is loaded",
            "look for a revision with safetensors (https://huggingface.co/spaces/safetensors/convert opens a pull "
            "request with one) and give ORG/NAME@refs/pr/N",
        )
    return InputError(what, next_step="check the name, or say with --include which files to fetch all the same")


def check_paths(paths: Iterable[str]) -> None:
    """Every path stays below the folder that it will be written to (else InputError naming it)."""
    for path in paths:
        parts = path.split("/")
        bad = any(part in ("", ".", "..") for part in parts) or "\\" in path
        if bad or any(unicodedata.category(character) == "Cc" for character in path):
            raise InputError(
                f"the repository lists a file named {path!r}",
                "such a name leads out of the folder or is no file name",
                "do not use this repository; nothing was fetched",
            )


def check_ids(listing: Listing) -> None:
    """The commit and every listed hash are hex digits of their length, and sizes are sizes (else InputError)."""
    wrong = [] if _COMMIT.fullmatch(listing.commit) else [f"commit {listing.commit!r}"]
    for file in listing.files:
        ids = ((file.sha256, _SHA256), (file.blob_id, _BLOB_ID), (file.xet_hash, _SHA256))
        if file.size < 0 or any(value and not form.fullmatch(value) for value, form in ids):
            wrong.append(f"size or hash of {file.path!r}")
    if wrong:
        raise InputError(f"the listing of '{listing.name}' is damaged", wrong[0], "check HF_ENDPOINT and run again")


def check_clashes(listing: Listing, files: Iterable[RemoteFile]) -> None:
    """No two of `files`, and no folders of theirs, are one on a file system that ignores case (else InputError)."""
    spelt: dict[str, tuple[str, bool]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        for part, is_file in ((file.path, True), *((str(parent), False) for parent in path.parents if parent.parts)):
            key = unicodedata.normalize("NFC", part).casefold()
            other = spelt.setdefault(key, (part, is_file))
            if other != (part, is_file):
                raise InputError(
                    f"'{listing.name}' has both {other[0]!r} and {part!r}",
                    "names that differ only in case are one file on some disks, so one would replace the other",
                    "leave one out with --exclude",
                )
