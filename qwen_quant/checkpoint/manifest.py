"""What goes beside the weights: configs, the source's own files, and `qwen-quant.json`, the provenance."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint.families import ModelSpec, SparseBlock, SubBlock
from qwen_quant.checkpoint.reader import INDEX_FILE, PICKLE_PATTERNS, file_sha256
from qwen_quant.recipe import GPTQConfig

MANIFEST_FILE = "qwen-quant.json"
QUANTIZE_CONFIG_FILE = "quantize_config.json"
_REPLACED = {
    "config.json",
    QUANTIZE_CONFIG_FILE,
    MANIFEST_FILE,
    INDEX_FILE,
    "README.md",
    "pytorch_model.bin.index.json",
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
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Copy tokenizer, template, generation_config, licence and similar files byte for byte.

    Returns:
        (copied, left behind) file names; code, pickles, dotfiles, other weights and the source's card stay behind.
    """
    copied, left = [], []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.endswith((".safetensors", INDEX_FILE)) or path.name == "config.json":
            continue
        if path.name in _REPLACED or path.name.startswith(".") or any(path.match(pattern) for pattern in _NOT_CARRIED):
            left.append(path.name)
            continue
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    return copied, left


def source_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of the source that decides the output (weights, configs, tokenizer)."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
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


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `qwen-quant.json`, with the sha256 of every other file of the artifact in it."""
    outputs = {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST_FILE}
    _write_json(folder / MANIFEST_FILE, {**manifest, "output": {"sha256": outputs}})
