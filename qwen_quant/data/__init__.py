"""Files that ship inside the package: demo checkpoint, calibration set, held-out texts (licences in README.md here)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from qwen_quant.errors import InputError


def bundled_path(name: str) -> Path:
    """The path of a bundled file or folder, for example ``calibration_bundled.jsonl`` or ``demo_checkpoint``.

    Raises:
        InputError: nothing of that name is installed, or the package is read from a zip archive.
    """
    resource = files(__name__).joinpath(name)
    if not isinstance(resource, Path) or not resource.exists():
        raise InputError(
            f"the bundled data {name!r} is not installed",
            "the package was installed without its data files",
            "reinstall it unpacked: pip install --force-reinstall qwen-quant",
        )
    return resource
