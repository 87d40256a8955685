"""Is a folder still exactly the artifact that its `qwen-quant.json` describes?

Three independent questions: does every file have the sha256 that the manifest records, with nothing missing and nothing
beside it; is every tensor accounted for, in the numbers that the audit counted when the artifact was made; and, where
there is a signature and a key, did the owner of the key sign these files. What is wrong is listed, not raised, so that
one run shows all of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_quant.checkpoint.identity import EXPORT_SUFFIXES, weights_sha256, weights_sha256_of
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qwen_quant.checkpoint.reader import CheckpointReader, file_sha256
from qwen_quant.errors import InputError
from qwen_quant.inspection import inspect_path
from qwen_quant.progress import ProgressFn, no_progress
from qwen_quant.signing import SIGNATURE_FILE, stale_names, verify_signature

# Not of the artifact: git's settings of a hub repository, and the bookkeeping of a download into a folder.
IGNORED = (".gitattributes", ".cache", ".qwen-quant")
SHOWN_PROBLEMS = 5
_MIB = 1 << 20
EXPORT = "export"

Kind = Literal["missing", "changed", "unknown", "link", "tensors", "signature"]
SignatureState = Literal["none", "not checked", "valid", "invalid"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the manifest says: the file (or the artifact), what kind of thing, and in words."""

    name: str
    kind: Kind
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """What `qwen-quant verify` found.

    Attributes:
        folder: as given. method: how the artifact was made ("gptq", "bitsandbytes", "convert", "export").
        source_id, source_revision: what it was made from; revision is None for a local source.
        sha256: file name -> sha256 of its bytes now, for every file that the manifest names and that is there.
        nbytes: of those files. weights_sha256: what reports and profiles call these weights ("" when unreadable).
        quantized_linears, kept_tensors: the audit's accounting of the tensors.
        signature: "not checked" means that there is one and no key was given.
        problems: everything that is wrong; empty for a sound artifact.
    """

    folder: str
    method: str
    source_id: str
    source_revision: str | None
    sha256: dict[str, str]
    nbytes: int
    weights_sha256: str
    quantized_linears: int
    kept_tensors: int
    signature: SignatureState
    problems: tuple[Problem, ...]
    seconds: float


def verify_folder(
    folder: Path,
    progress: ProgressFn = no_progress,
    *,
    key: Path | None = None,
    allow_links: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> VerifyResult:
    """Check hashes, tensors and signature of an artifact.

    Args:
        folder: the artifact.
        progress: called with MiB hashed.
        key: PEM public key of the signer; None leaves a signature unchecked.
        allow_links: whether files may be links, as in the hub's download cache.
        left_out: files of a repository that were not fetched at all, and why: none of them is the artifact's.

    Errors: InputError when the folder holds no usable manifest or the key cannot be used.
    """
    started = time.monotonic()
    manifest = read_manifest(folder)
    expected: dict[str, str] = manifest["output"]["sha256"]
    problems = _stray_entries(folder, set(expected), allow_links=allow_links)
    hashes, changed = _hashes(folder, expected, progress)
    strangers = [Problem(name, "unknown", f"is in the repository: {why}") for name, why in (left_out or {}).items()]
    found = [*problems, *strangers, *changed]
    if manifest.get("method") == EXPORT:
        weights, linears, kept, odd = _exported(folder, manifest, hashes)
    else:
        weights, linears, kept, odd = _tensors(folder, manifest)
    signature, invalid = _signature(folder, key, hashes, allow_links=allow_links)
    source = manifest.get("source", {})
    return VerifyResult(
        folder=str(folder),
        method=str(manifest.get("method", "")),
        source_id=str(source.get("id", "")),
        source_revision=source.get("revision"),
        sha256=hashes,
        nbytes=sum((folder / name).stat().st_size for name in hashes),
        weights_sha256=weights,
        quantized_linears=linears,
        kept_tensors=kept,
        signature=signature,
        problems=(*found, *odd, *invalid),
        seconds=time.monotonic() - started,
    )


def check_verified(result: VerifyResult) -> None:
    """Raise InputError naming what is wrong with a verified artifact (nothing when it is sound)."""
    if not result.problems:
        return
    shown = [f"{problem.name}: {problem.detail}" for problem in result.problems[:SHOWN_PROBLEMS]]
    more = len(result.problems) - len(shown)
    raise InputError(
        f"{result.folder} is not what its {MANIFEST_FILE} describes",
        "; ".join(shown) + (f"; and {more} more" if more else ""),
        _next_step({problem.kind for problem in result.problems}),
    )


def _next_step(kinds: set[str]) -> str:
    if kinds <= {"unknown", "link"}:
        return "move what does not belong out of the folder; card and reports are added by qwen-quant card"
    if kinds == {"signature"}:
        return "ask the signer for the right public key, or sign again"
    return "restore the files (download them again), or quantize again"


def _stray_entries(folder: Path, named: set[str], *, allow_links: bool) -> list[Problem]:
    """What lies in the folder and is not the manifest's, and what is a link."""
    found = []
    for root, folders, files in os.walk(folder):
        place = Path(root)
        if place == folder:
            folders[:] = [name for name in folders if name not in IGNORED]
        links = [name for name in folders if (place / name).is_symlink()]
        for name in sorted([*files, *links]):
            relative = (place / name).relative_to(folder).as_posix()
            if relative in IGNORED:
                continue
            if (place / name).is_symlink() and not (allow_links and name in files):
                found.append(Problem(relative, "link", "is a symbolic link"))
            elif relative not in named and relative not in (MANIFEST_FILE, SIGNATURE_FILE):
                found.append(Problem(relative, "unknown", f"is not named in {MANIFEST_FILE}"))
    return found


def _hashes(folder: Path, expected: dict[str, str], progress: ProgressFn) -> tuple[dict[str, str], list[Problem]]:
    """The sha256 of every named file that is there, and those that are absent or differ."""
    present = [name for name in sorted(expected) if (folder / name).is_file()]
    problems = [Problem(name, "missing", "is missing") for name in sorted(set(expected) - set(present))]
    total = sum((folder / name).stat().st_size for name in present)
    hashes, done = {}, 0
    for name in present:
        progress("checking sha256 (MiB)", done // _MIB, max(1, total // _MIB))
        hashes[name] = file_sha256(folder / name)
        done += (folder / name).stat().st_size
        if hashes[name] != expected[name]:
            detail = f"changed after the manifest: sha256 {hashes[name][:12]}..., recorded {expected[name][:12]}..."
            problems.append(Problem(name, "changed", detail))
    return hashes, problems


def _tensors(folder: Path, manifest: dict[str, Any]) -> tuple[str, int, int, list[Problem]]:
    """(weights_sha256, linears quantized, tensors kept, what is wrong), from headers and the audit's own record."""
    try:
        weights = weights_sha256(folder)
        found = inspect_path(folder)
        names = set(CheckpointReader(folder).names)
    except InputError as error:
        return "", 0, 0, [Problem(error.what, "tensors", error.why or error.what)]
    accounting = found.accounting
    odd = [f"tensor '{name}' is missing or incomplete" for name in accounting.missing]
    odd += [f"no rule accounts for tensor '{name}'" for name in accounting.unaccounted]
    audit = manifest.get("audit")
    if isinstance(audit, dict):
        if accounting.quantized_linears != audit.get("quantized"):
            odd.append(f"{accounting.quantized_linears} linears are quantized, the audit counted {audit['quantized']}")
        odd += [f"'{name}' was kept, and is missing" for name in sorted(set(audit.get("kept", {})) - names)]
    kept = sum(accounting.kept.values())
    return weights, accounting.quantized_linears, kept, [Problem("weights", "tensors", text) for text in odd]


def _exported(folder: Path, manifest: dict[str, Any], hashes: dict[str, str]) -> tuple[str, int, int, list[Problem]]:
    """The same of an export: its tensors were counted and compared when it was written, and the hashes are of them."""
    weights = weights_sha256_of(hashes, EXPORT_SUFFIXES)
    proof = manifest.get("proof", {})
    odd = [] if weights else ["there are no weights"]
    try:
        if any(name.endswith(".safetensors") for name in hashes):
            CheckpointReader(folder)
    except InputError as error:
        odd.append(error.what)
    linears, kept = int(proof.get("linears", 0)), int(proof.get("kept_tensors", 0))
    return weights, linears, kept, [Problem("weights", "tensors", text) for text in odd]


def _signature(
    folder: Path, key: Path | None, hashes: dict[str, str], *, allow_links: bool
) -> tuple[SignatureState, list[Problem]]:
    present = (folder / SIGNATURE_FILE).is_file()
    if key is None and present:
        try:
            stale = stale_names(folder, hashes)
        except InputError as error:
            return "invalid", [Problem(SIGNATURE_FILE, "signature", f"is not a signature: {error.why}")]
        reason = f"does not sign {', '.join(stale[:3])} as it is now"
        return ("not checked", []) if not stale else ("invalid", [Problem(SIGNATURE_FILE, "signature", reason)])
    if key is None:
        return "none", []
    if not present:
        return "none", [Problem(SIGNATURE_FILE, "signature", "is missing, and a key was given to check it with")]
    reason = verify_signature(folder, key, allow_links=allow_links, known=hashes)
    return ("valid", []) if not reason else ("invalid", [Problem(SIGNATURE_FILE, "signature", reason)])
