"""One virtual environment per consumer, under .venv-interop/NAME, with the versions of scripts/interop/NAME.txt.

    python scripts/interop/environments.py NAME FOLDER     makes FOLDER/NAME where it is missing and prints its Python

An environment that exists (or a symbolic link to one) is used as it is. In NAME.txt a line `# --no-deps` makes pip take
the lines after it without their dependencies; a line `# --env NAME=VALUE` sets a variable of the build; a line
`# --without NAMES` removes packages again that came as dependencies and do not fit this torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parent
NO_DEPS, ENV, WITHOUT = "# --no-deps", "# --env ", "# --without "


def consumer_python(name: str, venvs: Path) -> Path:
    """The interpreter of environment `name`, which is made when it is missing; RuntimeError when that fails."""
    python = venvs / name / "bin" / "python"
    if not python.exists():
        try:
            _make(name, venvs / name, python)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(venvs / name, ignore_errors=True)
            raise RuntimeError(f"{name}.txt cannot be installed: {(error.stderr or '').strip()[-300:]}") from error
    return python


def _make(name: str, folder: Path, python: Path) -> None:
    print(f"making {folder} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    settings = dict(line.removeprefix(ENV).split("=", 1) for line in lines if line.startswith(ENV))
    cut = lines.index(NO_DEPS) if NO_DEPS in lines else len(lines)
    for part, options in ((lines[:cut], []), (lines[cut:], ["--no-deps"])):
        wanted = [line for line in part if line.strip() and not line.startswith("#")]
        if wanted:
            _install(python, wanted, options, settings)
    removed = [name for line in lines if line.startswith(WITHOUT) for name in line.removeprefix(WITHOUT).split()]
    if removed:
        command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *removed]
        subprocess.run(command, check=True, capture_output=True, text=True)


def _install(python: Path, wanted: list[str], options: list[str], settings: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(wanted))
        file.flush()
        command = [str(python), "-m", "pip", "install", "--quiet", *options, "-r", file.name]
        subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})


if __name__ == "__main__":
    print(consumer_python(sys.argv[1], Path(sys.argv[2])))
