"""Data that ships with the package: the demo checkpoint, calibration text and evaluation text."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from qwen_quant.errors import QwenQuantError


def bundled_path(name: str) -> Path:
    """Path of a bundled file or folder (QwenQuantError when the installation lacks it)."""
    path = Path(str(resources.files(__name__))) / name
    if not path.exists():
        raise QwenQuantError(f"the installation lacks its data '{name}'", str(path), "install qwen-quant again")
    return path
