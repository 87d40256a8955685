"""What must hold before anything is sent: the folder is sound, measured, passed, loadable, licensed and described.

The list of files to send is an allow-list: exactly what the manifest names, the manifest itself and the signature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from qwen_quant.checkpoint.identity import EXPORT_SUFFIXES
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, SEALABLE, read_manifest
from qwen_quant.checkpoint.reader import PICKLE_PATTERNS, file_sha256
from qwen_quant.errors import GateError, InputError
from qwen_quant.evaluation.gates import check_gates
from qwen_quant.evaluation.report import JSON_FILE, read_report
from qwen_quant.hub.card_state import CARD_FILE
from qwen_quant.hub.export_table import SAFETENSORS
from qwen_quant.hub.reencoded import Reencoded
from qwen_quant.hub.target import UploadFile
from qwen_quant.progress import ProgressFn
from qwen_quant.results import ValidationResult
from qwen_quant.signing import SIGNATURE_FILE, stale_names
from qwen_quant.verify import Problem, VerifyResult, check_verified, verify_folder

_WEIGHTS = tuple(f"*{suffix}" for suffix in EXPORT_SUFFIXES)
_REFUSED = (*PICKLE_PATTERNS, "*.pkl", "*.pickle", "*.joblib", "*.py", "*.so", "*.dll", *_WEIGHTS)
_SMOKE_NEW_TOKENS = 16
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def check_artifact(folder: Path, progress: ProgressFn, *, will_sign: bool) -> VerifyResult:
    """Hashes and tensors as the manifest says, no links, no strangers.

    Evidence that is not sealed yet, and a card that changed by hand, are allowed: writing the card seals them. With
    `will_sign` a signature that does not fit any more is allowed too.

    Errors: InputError naming what is wrong.
    """
    found = verify_folder(folder, progress)
    left = tuple(p for p in found.problems if not (_is_sealed_later(p) or (will_sign and p.kind == "signature")))
    result = replace(found, problems=left)
    check_verified(result)
    return result


def _is_sealed_later(problem: Problem) -> bool:
    return (problem.kind == "unknown" and problem.name in SEALABLE) or (
        problem.kind == "changed" and problem.name == CARD_FILE
    )


def check_report(
    folder: Path, measured: Sequence[str], override_reason: str, given: Path | None = None
) -> ValidationResult:
    """report.json of exactly these weights, with gates, all of which pass or are overridden with a reason.

    Args:
        measured: `weights_sha256` of the weights that it must have measured: these, or for an export also those that
            it was made from. given: a report that will be put into the folder; None: the one in it.

    Errors: InputError without a report or with one of another artifact; GateError (exit 4) when a gate failed, or when
    none was asked for.
    """
    path = folder / JSON_FILE
    path = given or path
    validate = f"qwen-quant validate {folder} --baseline MODEL --max-kl LIMIT --report {folder}"
    if len(measured) > 1:
        validate = f"qwen-quant card {folder} --report FILE puts in the report of the artifact that it was made from"
    if not path.is_file():
        raise InputError(f"{folder} has no {JSON_FILE}", "nothing says how good it is", validate)
    report = read_report(path)
    if report.quantized_sha256 not in measured:
        raise InputError(
            f"{path} is the report of another artifact",
            f"it measured weights {report.quantized_sha256[:12]}..., these are {measured[0][:12]}...",
            validate,
        )
    report = replace(report, override_reason=override_reason or report.override_reason)
    if not report.gates and not report.override_reason:
        raise GateError(f"{path} has no gates", "nothing was required of the artifact", validate)
    check_gates(report)
    return report


def check_exact(folder: Path, made: Reencoded, override_reason: str) -> None:
    """The gates were passed by the artifact's numbers: an export with others needs a reason of its own.

    Errors: GateError (exit 4) for an export that is not exact, without one.
    """
    if made.exact or override_reason:
        return
    what = made.inexact[0][0] if made.inexact else f"--rest {made.rest}"
    largest = max(made.compared.largest, made.compared.kept_largest) if made.compared else 0.0
    raise GateError(
        f"{folder} is not exactly the artifact that was measured",
        f"{what}: a value differs by up to {largest:.3g}, and no gate was passed by these numbers",
        "push an exact format, or say why this one: --override-gates REASON (the card says both)",
    )


def check_smoke(folder: Path, report: ValidationResult, progress: ProgressFn) -> tuple[str, ...]:
    """Fixed prompts: those that validate ran on exactly these weights, else they are run here; warnings in words.

    Errors: InputError when the model says nothing, or numbers are not finite.
    """
    if report.smoke:
        return ()
    import torch

    from qwen_quant.evaluation.smoke import smoke_cases  # a model library, which few pushes need
    from qwen_quant.runtime.loading import WeightSource

    source, device = WeightSource(folder), torch.device("cpu")
    cases = smoke_cases(source, source, device, progress, max_new_tokens=_SMOKE_NEW_TOKENS)
    failures = [f"{case.name}: {failure}" for case in cases for failure in case.failures]
    if failures or not any(case.text.strip() for case in cases if case.prompt):
        why = "; ".join(failures[:3]) or "every answer is empty"
        raise InputError(f"{folder} fails the generation test", why, "look at qwen-quant validate --smoke")
    return tuple(f"{case.name}: {note}" for case in cases for note in case.notes)


def check_signature(folder: Path) -> None:
    """A signature that is there is about these very files (InputError otherwise)."""
    recorded: dict[str, str] = read_manifest(folder)["output"]["sha256"]  # checked a moment ago, or sealed since
    stale = stale_names(folder, recorded)
    if stale:
        raise InputError(
            f"{folder / SIGNATURE_FILE} does not sign {', '.join(stale[:3])} as it is now",
            "a file changed after signing (the card is written before every push)",
            "give --sign KEY to sign again, or delete the signature",
        )


def upload_files(folder: Path, own: Sequence[str] = SAFETENSORS, *, sealed: bool = True) -> tuple[UploadFile, ...]:
    """Every file to send, with the sha256 that the manifest records (of manifest and signature: as they are now).

    `own` are the patterns of the weights of this format: no others are sent. `sealed` is False for a dry run: card and
    evidence are then taken as they are.

    Errors: InputError for a name that must never be sent, or two names that differ only in case.
    """
    recorded: dict[str, str] = read_manifest(folder)["output"]["sha256"]
    extra = [name for name in (MANIFEST_FILE, SIGNATURE_FILE) if (folder / name).is_file()]
    check_names([*recorded, *extra], own)
    check_secrets(folder)
    hashes = {**recorded, **{name: file_sha256(folder / name) for name in extra}}
    if not sealed:
        hashes |= {name: file_sha256(folder / name) for name in SEALABLE if (folder / name).is_file()}
    return tuple(
        UploadFile(name, (folder / name).absolute(), (folder / name).stat().st_size, hashes[name])
        for name in sorted(hashes)
    )


def check_secrets(folder: Path) -> None:
    """Card, reports and manifest hold no token of the hub (InputError naming the file, not the token)."""
    for name in (*SEALABLE, MANIFEST_FILE):
        path = folder / name
        if path.is_file() and _TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            raise InputError(
                f"{path} holds what looks like a token of the hub",
                "everybody could read it there",
                "remove it, and revoke that token where it was real",
            )


def check_names(names: Sequence[str], own: Sequence[str] = SAFETENSORS) -> None:
    """No hidden file, pickle or code, no weights of another format, no two names that differ in case (InputError)."""
    for name in names:
        known = any(PurePosixPath(name).match(pattern) for pattern in own)
        if name.startswith(".") or (not known and any(PurePosixPath(name).match(pattern) for pattern in _REFUSED)):
            raise InputError(
                f"the manifest names {name!r}",
                "hidden files, pickles, code and weights of another format are never pushed",
                "quantize or export again: the tool leaves such files behind",
            )
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(
                f"{other!r} and {name!r} differ only in case",
                "on some systems one would replace the other",
                "rename one in the source and quantize again",
            )
