"""The stages that make the artifact: `download`, then `gptq` or `bnb`.

The artifact lies in a folder named by the hash of everything that decides it, so a folder of that name is complete
and belongs to these inputs, and an unfinished one beside it is continued with the settings that it was begun with.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from qwen_quant.bnb_convert import quantize_bnb
from qwen_quant.bnb_plan import BnbJob
from qwen_quant.calibration import BUNDLED, BUNDLED_FILE
from qwen_quant.checkpoint.manifest import (
    MANIFEST_FILE,
    SEALABLE,
    carried_hashes,
    read_manifest,
    source_hashes,
    versions,
)
from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError
from qwen_quant.hub.download import DownloadJob, ModelSource, download_repo, parse_repo, resolve_model
from qwen_quant.preparation import QuantizeJob, resolve_device
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import CalibrationConfig, RunConfig
from qwen_quant.releasing.ahead import check_formats
from qwen_quant.releasing.records import Made, inputs_sha256, read_record
from qwen_quant.releasing.settings import local_source
from qwen_quant.releasing.stage import Context, Stage, always, artifact_name, plain
from qwen_quant.resume import WorkFolder
from qwen_quant.sequential import quantize_checkpoint
from qwen_quant.units import format_bytes

KEPT_CARD = "card"  # the folder that keeps the card's hand-written text while the artifact is made anew
CARD_FILE = "README.md"


def _download_inputs(context: Context) -> dict[str, Any]:
    """The id; a hub's endpoint, or sizes and times of a local folder's files. A branch is resolved once, then kept."""
    recipe = context.recipe
    folder = local_source(recipe.model)
    if folder is None:
        from huggingface_hub import constants

        endpoint = constants.ENDPOINT if recipe.release.source == "hf" else ""
        return plain(model=recipe.model, source=recipe.release.source, endpoint=endpoint)
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return plain(model=recipe.model, files={name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})


def _download(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    source = _find_source(context, inputs, progress)
    folder, source_id, revision = source.path.absolute(), source.source_id, source.revision
    names = tuple(source_hashes(folder))
    size = sum((folder / name).stat().st_size for name in names)
    where = f"{source_id} at {revision}" if revision else source_id
    figures = {"source_id": source_id, "revision": revision, "bytes": size, "files": len(names)}
    return Made(folder, names, figures=figures, summary=f"{where}: {len(names)} files, {format_bytes(size)}")


def _find_source(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> ModelSource:
    """The source's folder, fetched where it lies on a hub: at the commit that this release was begun with."""
    model = context.recipe.model
    folder = local_source(model)
    if folder is not None:
        return resolve_model(str(folder))
    repo, revision = parse_repo(model)
    earlier = read_record(context.work, "download")
    if earlier is not None and earlier.inputs == inputs:
        revision = earlier.figures["revision"]
    done = download_repo(DownloadJob(repo, revision, context.recipe.release.source), progress)
    return ModelSource(done.path, done.repo, done.commit)


def _source(context: Context) -> dict[str, Any]:
    return {
        "id": context.figure("download", "source_id"),
        "revision": context.figure("download", "revision"),
        "sha256": context.digest("download"),
    }


def _gptq_inputs(context: Context) -> dict[str, Any]:
    base = context.recipe.base
    return plain(
        settings=base.gptq,
        calibration={**dataclasses.asdict(base.calibration), "sha256": _calibration_sha256(base.calibration)},
        device=resolve_device(base.run.device).type,
        max_shard_size_bytes=base.run.max_shard_size_bytes,
        source=_source(context),
        versions=versions(),
    )


def _calibration_sha256(config: CalibrationConfig) -> str:
    path = bundled_path(BUNDLED_FILE) if config.source == BUNDLED else Path(config.source)
    try:
        return file_sha256(path)
    except OSError as error:
        step = "give a .json, .jsonl or .txt file, or bundled: [calibration] source"
        raise InputError(f"the calibration set {path} cannot be read", str(error.strerror), step) from error


def _bnb_inputs(context: Context) -> dict[str, Any]:
    base = context.recipe.base
    return plain(
        settings=base.bnb,
        max_shard_size_bytes=base.run.max_shard_size_bytes,
        source=_source(context),
        versions=versions(),
    )


def gptq_job(context: Context, out: Path) -> QuantizeJob:
    """The job of the gptq stage, once the source is there."""
    base = context.recipe.base
    source_id, revision = context.figure("download", "source_id"), context.figure("download", "revision")
    folder, run = context.folder("download"), _run_config(base.run)
    return QuantizeJob(folder, out, base.gptq, base.calibration, run, source_id, revision)


def bnb_job(context: Context, out: Path) -> BnbJob:
    """The job of the bnb stage, once the source is there."""
    base = context.recipe.base
    source_id, revision = context.figure("download", "source_id"), context.figure("download", "revision")
    return BnbJob(context.folder("download"), out, base.bnb, _run_config(base.run), source_id, revision)


def _run_config(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, resume=True, force=False)


def artifact_folder(context: Context, inputs: dict[str, Any]) -> Path:
    """Where the artifact of these inputs lies, or will."""
    return context.work / f"artifact-{inputs_sha256(inputs)[:12]}" / artifact_name(context.recipe)


def _gptq(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    out = artifact_folder(context, inputs)
    if not _stands(context, out):
        check_formats(context.recipe, context.folder("download"))
        quantize_checkpoint(gptq_job(context, out), progress)
    return _made(context, out)


def _bnb(context: Context, inputs: dict[str, Any], progress: ProgressFn) -> Made:
    out = artifact_folder(context, inputs)
    if not _stands(context, out):
        quantize_bnb(bnb_job(context, out), progress)
    return _made(context, out)


def _stands(context: Context, out: Path) -> bool:
    """Whether the artifact is complete already: an earlier run was killed after it was renamed into place.

    One whose files are not what its manifest says is removed, so that it is made anew.
    """
    out.parent.mkdir(exist_ok=True)
    if not out.exists():
        return False
    if is_whole(out):
        return True
    keep_card(context, out)
    shutil.rmtree(out)
    return False


def is_whole(out: Path) -> bool:
    """Whether every file of a finished folder, but card and evidence, is the one that its manifest names."""
    hashes = carried_hashes(read_manifest(out)) if (out / MANIFEST_FILE).is_file() else {}
    return bool(hashes) and all(
        (out / name).is_file() and file_sha256(out / name) == value for name, value in hashes.items()
    )


def _made(context: Context, out: Path) -> Made:
    """The finished artifact; artifacts of other settings go now that it stands, and so does what a kill left over."""
    for other in sorted(context.work.glob("artifact-*")):
        if other != out.parent:
            for folder in sorted(other.iterdir()):
                keep_card(context, folder)
            shutil.rmtree(other)
    for left in [WorkFolder(out).root, out.with_name(f".{out.name}.old")]:
        shutil.rmtree(left, ignore_errors=True)
    manifest = read_manifest(out)
    names = tuple(name for name in manifest["output"]["sha256"] if name not in SEALABLE)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    audit, measured = manifest["audit"], manifest["measured"]
    figures = {
        "artifact": str(out),
        "method": manifest["method"],
        "output_bytes": size,
        "quantized_linears": audit["quantized"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "seconds": measured["wall_seconds"],
        "warnings": manifest["warnings"],
    }
    summary = f"{audit['quantized']} linears quantized, {format_bytes(size)} of weights"
    return Made(out, names, (MANIFEST_FILE,), figures, summary)


def keep_card(context: Context, folder: Path, kept: str = CARD_FILE) -> None:
    """Copy the card of a folder that is about to go to KEPT_CARD / `kept`: it may hold text written by hand."""
    if (folder / CARD_FILE).is_file():
        (context.work / KEPT_CARD).mkdir(exist_ok=True)
        shutil.copyfile(folder / CARD_FILE, context.work / KEPT_CARD / kept)


def _other_kind(kind: str) -> Any:
    def left_out(context: Context) -> str:
        chosen = context.recipe.release.kind
        return "" if chosen == kind else f"the recipe's kind is {chosen}"

    return left_out


DOWNLOAD = Stage("download", "fetch the source", always, _download_inputs, _download)
GPTQ = Stage("gptq", "quantize with GPTQ", _other_kind("gptq"), _gptq_inputs, _gptq)
BNB = Stage("bnb", "quantize for bitsandbytes", _other_kind("bnb"), _bnb_inputs, _bnb)
