"""The stages that make others able to use the artifact: `export`, `card`, `push`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, SEALABLE, carried_hashes, read_manifest, versions
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import JSON_FILE
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.hub.card import add_evidence, card_problems, make_card
from qwen_quant.hub.card_state import CARD_FILE, CardRequest
from qwen_quant.hub.push_formats import (
    Exported,
    FormatTarget,
    PushedRepository,
    first_error,
    links_of,
    push_exported,
)
from qwen_quant.hub.push_prepare import PushJob
from qwen_quant.profiling.page import JSON_FILE as PROFILE_FILE
from qwen_quant.progress import ProgressFn
from qwen_quant.releasing.making import KEPT_CARD, is_whole, keep_card
from qwen_quant.releasing.measuring import quantizer
from qwen_quant.releasing.records import Made, inputs_sha256
from qwen_quant.releasing.settings import targets_of
from qwen_quant.releasing.stage import Context, Stage, always, artifact_name, plain, weights_stamp
from qwen_quant.units import format_bytes

EXPORT_PREFIX = "exports-"


def targets(context: Context) -> tuple[FormatTarget, ...]:
    """The formats of the recipe and the repositories that they go to."""
    return targets_of(context.recipe, context.repo)


def _export_left_out(context: Context) -> str:
    return "" if context.recipe.release.formats else "the recipe exports no other format"


def _export_inputs(context: Context) -> dict[str, Any]:
    return plain(
        formats=[row.format for row in targets(context)],
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
    sizes, names, present = {}, [], []
    for row in targets(context):
        out = parent / f"{artifact_name(context.recipe)}-{row.format}"
        if out.exists() and not is_whole(out):
            keep_card(context, out, _kept_name(row.format))
            shutil.rmtree(out)
        if not out.exists():
            export_artifact(ExportJob(artifact, out, row.format, None, False, run, artifact.name, None), progress)
        carried = carried_hashes(read_manifest(out))
        sizes[row.format] = sum((out / name).stat().st_size for name in carried)
        names += [f"{out.name}/{name}" for name in carried]
        present.append(f"{out.name}/{MANIFEST_FILE}")
    _remove_others(context, parent)
    summary = ", ".join(f"{name} ({format_bytes(size)})" for name, size in sizes.items())
    return Made(parent, tuple(names), tuple(present), {"bytes": sizes}, summary)


def _remove_others(context: Context, parent: Path) -> None:
    """Exports of other inputs go now that these stand, and what a kill left; text in their cards moves on."""
    for other in sorted(context.work.glob(f"{EXPORT_PREFIX}*")):
        if other != parent:
            for row in targets(context):
                keep_card(context, other / f"{artifact_name(context.recipe)}-{row.format}", _kept_name(row.format))
            shutil.rmtree(other)
    for left in parent.glob(".*.partial"):
        shutil.rmtree(left)


def _kept_name(format_name: str) -> str:
    return f"{format_name}.md"


def exports(context: Context) -> tuple[Exported, ...]:
    """The finished exports."""
    if "export" not in context.records:
        return ()
    parent, name = context.folder("export"), artifact_name(context.recipe)
    return tuple(Exported(row, parent / f"{name}-{row.format}") for row in targets(context))


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
        exports=context.digest("export") if "export" in context.records else None,
        formats=[[row.format, row.repo_id] for row in targets(context)],
        tool=__version__,
    )


def _card(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    """Evidence and card into the artifact, sealed into its manifest. What a killed card stage left there goes first."""
    folder, release = context.folder(quantizer(context)), context.recipe.release
    _clean(context, folder, CARD_FILE)
    profile = context.folder("profile") / PROFILE_FILE if "profile" in context.records else None
    add_evidence(folder, report=context.folder("gate") / JSON_FILE, profile=profile)
    links = links_of(context.repo, targets(context)) if context.repo and release.formats else ()
    request = CardRequest(
        release.card_language, context.repo or None, release.base_model or None, release.override_gates, links=links
    )
    path = make_card(folder, request)
    _check_licence(path, release.licence)
    problems = card_problems(folder)
    for row in exports(context):
        _clean(context, row.folder, _kept_name(row.target.format))
        add_evidence(row.folder, report=folder / JSON_FILE)
        repo = row.target.repo_id if context.repo else None
        make_card(row.folder, dataclasses.replace(request, repo_id=repo, like=folder))
        problems += [f"{row.target.format}: {problem}" for problem in card_problems(row.folder)]
    shutil.rmtree(context.work / KEPT_CARD, ignore_errors=True)
    summary = f"{path.name} in {release.card_language}" + (f"; not complete: {problems[0]}" if problems else "")
    return _sealed(context, folder, {"card": str(path), "problems": problems}, summary)


def _clean(context: Context, folder: Path, kept: str) -> None:
    """Remove what a killed card stage left, and put back the card whose hand-written text was kept."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix in (".tmp", ".partial"):
            path.unlink()
    place = context.work / KEPT_CARD / kept
    if place.is_file() and not (folder / CARD_FILE).exists():
        shutil.copyfile(place, folder / CARD_FILE)


def _sealed(context: Context, artifact: Path, figures: dict[str, Any], summary: str) -> Made:
    """Manifest, card and evidence of the artifact, and of the exports where there are any."""
    names = (MANIFEST_FILE, *(name for name in SEALABLE if (artifact / name).is_file()))
    if not exports(context):
        return Made(artifact, names, figures=figures, summary=summary)
    found = []
    for folder in (artifact, *(row.folder for row in exports(context))):
        place = folder.relative_to(context.work)
        found += [str(place / name) for name in (MANIFEST_FILE, *SEALABLE) if (folder / name).is_file()]
    return Made(context.work, tuple(found), figures=figures, summary=f"{summary}; and {len(exports(context))} formats")


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
        formats=[[row.format, row.repo_id] for row in targets(context)],
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
        links=(),
    )
    rows = push_exported(job, exports(context), progress)
    figures = _push_figures(rows[0])
    figures |= {"formats": [{"format": row.format, **_push_figures(row)} for row in rows[1:]]} if rows[1:] else {}
    return Made(folder, figures=figures, summary="; ".join(map(_push_summary, rows)), error=first_error(rows))


def _push_figures(row: PushedRepository) -> dict[str, Any]:
    """What became of one repository."""
    done = row.result
    if done is None:
        return {"repo": row.repo_id, "commit": None, "outcome": str(row.error or row.note)}
    return {
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


def _push_summary(row: PushedRepository) -> str:
    done = row.result
    if done is None:
        return f"{row.repo_id}: {'FAILED: ' if row.error else ''}{row.error or row.note}"
    where = done.pull_request or f"{done.repo_id} at {(done.commit or '')[:12]}"
    return f"{done.outcome}: {where}, {len(done.files)} files, {format_bytes(done.sent_bytes)} sent"


EXPORT = Stage("export", "re-encode for other runtimes", _export_left_out, _export_inputs, _export)
CARD = Stage("card", "write the model card", always, _card_inputs, _card)
PUSH = Stage("push", "push to the Hub", _push_left_out, _push_inputs, _push)
