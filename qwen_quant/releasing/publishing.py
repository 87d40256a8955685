"""The stages that make others able to use the artifact: `export`, `card`, `push`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, SEALABLE, versions
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.hub.card import add_evidence, card_problems, make_card
from qwen_quant.hub.card_state import CARD_FILE, CardRequest
from qwen_quant.hub.push import push
from qwen_quant.hub.push_prepare import PushJob
from qwen_quant.profiling.page import JSON_FILE as PROFILE_FILE
from qwen_quant.progress import ProgressFn
from qwen_quant.releasing.making import KEPT_CARD
from qwen_quant.releasing.measuring import quantizer
from qwen_quant.releasing.records import Made, inputs_sha256
from qwen_quant.releasing.stage import Context, Stage, always, artifact_name, plain, weights_stamp
from qwen_quant.units import format_bytes

EXPORT_PREFIX = "exports-"


def _export_left_out(context: Context) -> str:
    return "" if context.recipe.export.formats else "the recipe exports no other format"


def _export_inputs(context: Context) -> dict[str, Any]:
    return plain(
        formats=context.recipe.export.formats,
        max_shard_size_bytes=context.recipe.base.run.max_shard_size_bytes,
        artifact=context.digest(quantizer(context)),
        versions=versions(),
    )


def _export(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    """Every format into a folder of its own; finished ones of the same inputs are kept."""
    artifact = context.folder(quantizer(context))
    stamp = weights_stamp([artifact])
    parent = context.work / f"{EXPORT_PREFIX}{inputs_sha256({**inputs, 'files': stamp})[:12]}"
    parent.mkdir(exist_ok=True)
    run = dataclasses.replace(context.recipe.base.run, resume=True, force=False)
    sizes = {}
    for name in context.recipe.export.formats:
        out = parent / f"{artifact_name(context.recipe)}-{name}"
        if not out.exists():
            export_artifact(ExportJob(artifact, out, name, None, False, run, artifact.name, None), progress)
        sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for other in context.work.glob(f"{EXPORT_PREFIX}*"):
        if other != parent:
            shutil.rmtree(other)
    for left in parent.glob(".*.partial"):
        shutil.rmtree(left)
    names = sorted(str(path.relative_to(parent)) for path in parent.rglob("*") if path.is_file())
    summary = ", ".join(f"{name} ({format_bytes(size)})" for name, size in sizes.items())
    return Made(parent, tuple(names), figures={"bytes": sizes}, summary=summary)


def _card_inputs(context: Context) -> dict[str, Any]:
    release = context.recipe.release
    return plain(
        artifact=context.digest(quantizer(context)),
        report=context.digest("gate"),
        profile=context.digest("profile") if "profile" in context.records else None,
        repo=context.repo,
        base_model=release.base_model,
        language=release.card_language,
        licence=release.licence,
        override_gates=release.override_gates,
        tool=__version__,
    )


def _card(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    """Evidence and card into the artifact, sealed into its manifest. What a killed card stage left there goes first."""
    folder, release = context.folder(quantizer(context)), context.recipe.release
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix in (".tmp", ".partial"):
            path.unlink()
    kept = context.work / KEPT_CARD / CARD_FILE
    if kept.is_file() and not (folder / CARD_FILE).exists():
        shutil.copyfile(kept, folder / CARD_FILE)
    profile = context.folder("profile") / PROFILE_FILE if "profile" in context.records else None
    add_evidence(folder, report=context.folder("gate") / JSON_FILE, profile=profile)
    request = CardRequest(
        release.card_language, context.repo or None, release.base_model or None, release.override_gates
    )
    path = make_card(folder, request)
    if kept.is_file():
        kept.unlink()
    _check_licence(path, release.licence)
    problems = card_problems(folder)
    names = (MANIFEST_FILE, *(name for name in SEALABLE if (folder / name).is_file()))
    summary = f"{path.name} in {release.card_language}" + (f"; not complete: {problems[0]}" if problems else "")
    return Made(folder, names, figures={"card": str(path), "problems": problems}, summary=summary)


def _check_licence(card: Path, wanted: str) -> None:
    """The card names the licence that the recipe expects (else InputError): the source may have changed its own."""
    from huggingface_hub import metadata_load

    if not wanted:
        return
    data = metadata_load(card) or {}
    named = [str(data[key]) for key in ("license", "license_name") if data.get(key)]
    if wanted not in named:
        found = " / ".join(named) or "no licence"
        step = "read the source's licence again, then change licence in [release]"
        raise InputError(f"the source's card names {found}", f"the recipe expects {wanted}", step)


def _push_left_out(context: Context) -> str:
    return "" if context.repo else "no repository is named"


def _push_inputs(context: Context) -> dict[str, Any]:
    from huggingface_hub import constants

    release = context.recipe.release
    return plain(
        artifact=context.digest("card"),
        endpoint=constants.ENDPOINT,
        repo=context.repo,
        private=release.private,
        revision=release.revision,
        create_pr=release.create_pr,
        tag=release.tag,
        sign_key=release.sign_key,
        tool=__version__,
    )


def _push(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    folder, release = context.folder(quantizer(context)), context.recipe.release
    job = PushJob(
        folder=folder,
        repo_id=context.repo,
        private=release.private,
        revision=release.revision or None,
        create_pr=release.create_pr,
        tag=release.tag or None,
        override_gates=release.override_gates,
        card_language=release.card_language,
        sign_key=Path(release.sign_key).expanduser() if release.sign_key else None,
    )
    done = push(job, progress)
    figures = {
        "endpoint": done.endpoint,
        "repo": done.repo_id,
        "branch": done.branch,
        "commit": done.commit,
        "pull_request": done.pull_request,
        "outcome": done.outcome,
        "sent_bytes": done.sent_bytes,
        "tag": done.tag,
        "signed": done.signed,
        "warnings": list(done.warnings),
    }
    where = done.pull_request or f"{done.repo_id} at {(done.commit or '')[:12]}"
    summary = f"{done.outcome}: {where}, {len(done.files)} files, {format_bytes(done.sent_bytes)} sent"
    return Made(folder, figures=figures, summary=summary)


EXPORT = Stage("export", "re-encode for other runtimes", _export_left_out, _export_inputs, _export)
CARD = Stage("card", "write the model card", always, _card_inputs, _card)
PUSH = Stage("push", "push to the Hub", _push_left_out, _push_inputs, _push)
