"""One hash that says which weights a folder holds, so that a report can name the artifact it measured."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import InputError


def weights_sha256(folder: Path) -> str:
    """sha256 of the lines "{sha256 of the file}  {name}\\n" of config.json and every *.safetensors, sorted by name.

    The same text that `sha256sum` prints for those files, so that anybody can check it without this tool. Card, licence
    and tokenizer may be added to an artifact without making its measurements those of another one.

    Errors: InputError when the folder has no safetensors file.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder} has no weights", "there is no *.safetensors in it", "give a checkpoint folder")
    names = sorted([*names, *(["config.json"] if (folder / "config.json").is_file() else [])])
    lines = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()
