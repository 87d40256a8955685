"""What a stage of a release is: a name, what decides its output, and a function that makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import BnbConfig, GPTQConfig
from qwen_quant.releasing.records import Made, Record
from qwen_quant.releasing.settings import ReleaseRecipe
from qwen_quant.results import to_json


@dataclass(frozen=True)
class Context:
    """What every stage may read.

    Attributes:
        recipe: settings. work: absolute work folder. repo: where to push, "" for nowhere.
        records: the stages before this one, by name; the folders in them are below `work` or absolute.
    """

    recipe: ReleaseRecipe
    work: Path
    repo: str
    records: dict[str, Record]

    def folder(self, stage: str) -> Path:
        """Where the output of a finished stage lies."""
        return self.work / self._record(stage).folder

    def digest(self, stage: str) -> str:
        """The hash of a finished stage's output."""
        return self._record(stage).digest

    def figure(self, stage: str, name: str) -> Any:
        """One figure of a finished stage."""
        return self._record(stage).figures[name]

    def _record(self, stage: str) -> Record:
        if stage not in self.records:
            raise InputError(f"the stage {stage} has not run", next_step="run the release without --until")
        return self.records[stage]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as `--until` and release.json spell it.
        title: what it does, in a few words.
        left_out: why the recipe does without it ("" when it does not); reads the context's settings only.
        inputs: everything that decides its output, hashes of earlier stages' output included, as plain JSON types.
        run: makes the output; killed at any moment, the next call finishes what was begun. It gets `inputs` too.
    """

    name: str
    title: str
    left_out: Callable[[Context], str]
    inputs: Callable[[Context], dict[str, Any]]
    run: Callable[[Context, dict[str, Any], ProgressFn], Made]


def plain(**values: Any) -> dict[str, Any]:
    """The values as JSON would give them back, so that a record read from disk compares equal."""
    found: dict[str, Any] = json.loads(json.dumps(to_json(values)))
    return found


def artifact_name(recipe: ReleaseRecipe) -> str:
    """What the artifact is called in reports: the source's name and how it was quantized ("Qwen3-8B-GPTQ-Int4")."""
    source = recipe.model.partition("@")[0].removeprefix("bundled:").rstrip("/").rpartition("/")[2]
    config: BnbConfig | GPTQConfig = recipe.base.bnb if recipe.release.kind == "bnb" else recipe.base.gptq
    if isinstance(config, BnbConfig):
        return f"{source}-bnb-{config.quant_type}"
    return f"{source}-GPTQ-Int{config.bits}"


def source_name(context: Context) -> str:
    """What the source is called in reports: its id, with the commit where there is one."""
    revision = context.figure("download", "revision")
    return str(context.figure("download", "source_id")) + (f"@{revision}" if revision else "")


def weights_stamp(folders: list[Path]) -> dict[str, list[int]]:
    """[size, modification time] of every weight file: unfinished work over files that were replaced is other work."""
    paths = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def always(context: Context) -> str:
    """`left_out` of a stage that every release has."""
    return ""
