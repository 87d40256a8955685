"""What goes beside the weights: configs, the source's own files, and `qwen-quant.json`, the provenance."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint.families import ModelSpec, SparseBlock, SubBlock
from qwen_quant.checkpoint.reader import INDEX_FILE, PICKLE_PATTERNS, file_sha256
from qwen_quant.errors import InputError
from qwen_quant.recipe import GPTQConfig

MANIFEST_FILE = "qwen-quant.json"
SCHEMA = "qwen-quant/1"
# What may join or change beside finished weights: the card, the evidence, licence texts. Never what a runtime reads.
SEALABLE = ("README.md", "report.json", "report.html", "profile.json", "profile.html")
SEALABLE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")
_TEXT_SUFFIXES = ("", ".txt", ".md")
QUANTIZE_CONFIG_FILE = "quantize_config.json"
_REPLACED = {
    "config.json",
    QUANTIZE_CONFIG_FILE,
    MANIFEST_FILE,
    INDEX_FILE,
    "pytorch_model.bin.index.json",
    "model.sig",
    *SEALABLE,  # they speak of the weights that they were made for
}
_NOT_CARRIED = ("*.safetensors", "*.py", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.pkl", *PICKLE_PATTERNS)


def skip_lists(spec: ModelSpec) -> dict[str, Any]:
    """What tells runtimes which modules are quantized, for families whose blocks keep some linears 16-bit.

    `modules_in_block_to_quantize` is matched by the end of a name (optimum) or anywhere in it (vLLM), so experts are
    named without their number; `dynamic` with "-:" excludes modules (GPTQModel, vLLM, SGLang), matched from the start.
    """
    if not spec.family.skips:
        return {}
    groups: list[list[str]] = []
    for half in (half for halves in spec.kinds() for half in halves):
        parts = [half] if isinstance(half, SubBlock) else [half.shared] if half.shared else []
        groups += [group for part in parts for group in (list(part.inputs), [part.output])]
        groups += [["gate_proj", "up_proj"], ["down_proj"]] if isinstance(half, SparseBlock) else []
    unique = [group for k, group in enumerate(groups) if group not in groups[:k]]
    return {"modules_in_block_to_quantize": unique, "dynamic": {f"-:{pattern}": {} for pattern in spec.family.skips}}


def quantization_config(config: GPTQConfig) -> dict[str, Any]:
    """The AutoGPTQ-layout settings that runtimes read, for config.json's quantization_config."""
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "static_groups": not config.desc_act,
        "true_sequential": True,
        "damp_percent": config.damp_percent,
        "lm_head": False,
        "checkpoint_format": config.checkpoint_format,
        "pack_dtype": "int32",
        # GPTQModel (6.0 and later) reads v1 asymmetric zeros only from a quantizer it can identify.
        "meta": {"quantizer": [f"qwen-quant:{__version__}", "gptqmodel:7.7.0"]},
    }


def write_configs(folder: Path, spec: ModelSpec, config: GPTQConfig) -> None:
    """config.json with quantization_config, and quantize_config.json (the same plus AutoGPTQ's two name fields)."""
    settings = {**quantization_config(config), **skip_lists(spec)}
    kept = {key: value for key, value in spec.config.items() if key != "auto_map"}
    _write_json(folder / "config.json", {**kept, "quantization_config": settings})
    _write_json(
        folder / QUANTIZE_CONFIG_FILE, {**settings, "model_name_or_path": None, "model_file_base_name": "model"}
    )


def _write_json(path: Path, value: Any) -> None:
    """Write beside `path`, make it durable, rename: `path` is always either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_companions(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Copy tokenizer, template, generation_config, licence and similar files byte for byte.

    Returns:
        (copied, left behind) file names; code, pickles, dotfiles, other weights and the source's card stay behind.
    """
    copied, left = [], []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.endswith((".safetensors", INDEX_FILE)) or path.name == "config.json":
            continue
        if not _writable_name(path.name):
            left.append(ascii(path.name))
            continue
        if path.name in _REPLACED or path.name.startswith(".") or any(path.match(pattern) for pattern in _NOT_CARRIED):
            left.append(path.name)
            continue
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    return copied, left


def _writable_name(name: str) -> bool:
    """Whether JSON can hold a file's name: others (no UTF-8) stay behind."""
    return name.encode("utf-8", "ignore").decode() == name


def source_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of the source that decides the output (weights, configs, tokenizer)."""
    names = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and _writable_name(p.name)]
    files = [p for p in names if p.is_file()]
    return {
        p.name: file_sha256(p)
        for p in files
        if p.suffix in (".safetensors", ".json", ".jinja", ".tiktoken", ".txt", ".model")
    }


def versions() -> dict[str, str]:
    """Versions of what computed the artifact."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    found = {name: metadata.version(name) for name in packages}
    return {"qwen-quant": __version__, "python": platform.python_version(), **found}


def write_manifest(folder: Path, manifest: dict[str, Any], hashes: dict[str, str] | None = None) -> None:
    """Write `qwen-quant.json`, with the sha256 of every other file of the artifact in it.

    Args:
        hashes: file name -> sha256 of files that were hashed already and have not changed since.
    """
    known = hashes or {}
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST_FILE)
    outputs = {name: known.get(name) or file_sha256(folder / name) for name in names}
    _write_json(folder / MANIFEST_FILE, {**manifest, "output": {"sha256": outputs}})


def carried_hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """File name -> sha256 of an artifact without card and evidence, which may change beside the same weights."""
    return {name: value for name, value in manifest["output"]["sha256"].items() if name not in SEALABLE}


def files_sha256(manifest: dict[str, Any]) -> str:
    """One hash of everything that an export of the artifact is made from: of the lines "{sha256}  {name}\\n"."""
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(carried_hashes(manifest).items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed `qwen-quant.json` of an artifact; its `output.sha256` maps plain file names to 64 hexadecimal digits.

    Errors: InputError when it is absent, is not JSON, has another schema or no such map.
    """
    path = folder / MANIFEST_FILE
    again = "give a folder that this tool wrote, or quantize the source again"
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not an artifact of qwen-quant", f"it has no {MANIFEST_FILE}", again) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read", error.strerror or str(error), again) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged", str(error), again) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a manifest", f"its schema is not {SCHEMA!r}", again)
    output = manifest.get("output")
    hashes = output.get("sha256") if isinstance(output, dict) else None
    if not isinstance(hashes, dict) or not all(_plain(name) and _hexadecimal(value) for name, value in hashes.items()):
        raise InputError(f"{path} is damaged", "output.sha256 is not a table of file names and their sha256", again)
    return manifest


def provenance(artifact: Path) -> dict[str, Any]:
    """How an artifact that others are made from was made itself: its manifest, and the hash of its files.

    Card and evidence are left out of both. Errors: InputError for a manifest that is damaged.
    """
    if not (artifact / MANIFEST_FILE).is_file():
        return {"has_manifest": False}
    manifest = read_manifest(artifact)
    kept = {**manifest, "output": {"sha256": carried_hashes(manifest)}}
    return {"has_manifest": True, "files_sha256": files_sha256(manifest), "manifest": kept}


def seal(folder: Path, names: Sequence[str]) -> None:
    """Put the sha256 of card and evidence files into `qwen-quant.json`, which is replaced as a whole.

    Args:
        folder: a finished artifact.
        names: files of it that were added or changed: `SEALABLE`, or licence texts (`SEALABLE_PATTERNS`).

    Every other entry stays as it is: what was computed with the weights cannot be re-sealed, so that a file changed
    afterwards is found by any later check.

    Errors: InputError for another name (weights, configs, tokenizer, code), one that is absent, a link or no plain
    file, and for an unusable manifest; nothing is written then.
    """
    manifest = read_manifest(folder)
    found = {name: _sealed(folder, name) for name in names}
    output = manifest["output"]
    hashes = dict(sorted({**output["sha256"], **found}.items()))
    _write_json(folder / MANIFEST_FILE, {**manifest, "output": {**output, "sha256": hashes}})


def _sealed(folder: Path, name: str) -> str:
    """The sha256 of one file that may be sealed (InputError otherwise)."""
    path = folder / name
    licence = path.suffix in _TEXT_SUFFIXES and any(path.match(pattern) for pattern in SEALABLE_PATTERNS)
    if not _plain(name) or not (name in SEALABLE or licence):
        raise InputError(
            f"{name!r} cannot be sealed into {folder / MANIFEST_FILE}",
            "its hash belongs to what was quantized; only the card, reports, profile and licence may join later",
            "restore the file, or quantize again",
        )
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} cannot be sealed", "it is not a plain file", "put the file itself there")
    return file_sha256(path)


def _plain(name: Any) -> bool:
    """Whether it is the name of a file in the folder itself, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")
