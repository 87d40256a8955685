"""One hash that says which weights a folder holds, so that a report can name the artifact it measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import InputError

CONFIG_FILE = "config.json"
# What the weight files of an export, of whatever format, end in.
EXPORT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".xml", ".bin")


def weights_sha256(folder: Path) -> str:
    """sha256 of the lines "{sha256 of the file}  {name}\\n" of config.json and every *.safetensors, sorted by name.

    The same text that `sha256sum` prints for those files, so that anybody can check it without this tool. Card, licence
    and tokenizer may be added to an artifact without making its measurements those of another one.

    Errors: InputError when the folder has no safetensors file.
    """
    names = [path.name for path in folder.glob("*.safetensors")]
    if not names:
        raise InputError(f"{folder} has no weights", "there is no *.safetensors in it", "give a checkpoint folder")
    names += [CONFIG_FILE] if (folder / CONFIG_FILE).is_file() else []
    return weights_sha256_of({name: file_sha256(folder / name) for name in names})


def weights_sha256_of(hashes: Mapping[str, str], suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """`weights_sha256` of a folder whose files have these hashes ("" where none is a weight file).

    Args:
        hashes: file name -> sha256. suffixes: what the names of weight files end in (exports have others).
    """
    names = sorted(name for name in hashes if name.endswith(suffixes) or name == CONFIG_FILE)
    if names in ([], [CONFIG_FILE]):
        return ""
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in names).encode()).hexdigest()
