"""What a release recipe holds beyond `qwen-quant.toml`: [release], [profile] and [tasks]."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError, UsageError
from qwen_quant.hub.push_formats import FormatTarget, parse_targets
from qwen_quant.profiling.protocol import ProfileConfig
from qwen_quant.recipe import Recipe, parse_size, read_section, read_toml, refuse_rest, take_recipe

KINDS = ("gptq", "bnb")
SOURCES = ("hf", "modelscope")
LANGUAGES = ("en", "zh", "both")
_NOWHERE = "no/repository"
BUNDLED_PREFIX = "bundled:"
PROFILED = ("both", "artifact", "none")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}", next_step=f"use one of {', '.join(known)}")


@dataclass(frozen=True)
class ReleaseConfig:
    """What is released and to where.

    Attributes:
        kind: "gptq" or "bnb": which section says how the weights are quantized.
        source: hub that the model is fetched from: "hf" or "modelscope".
        repo: repository "org/name" to push to; "" is none (the command line names one, or nothing is pushed).
        private: create the repository private where it does not exist.
        create_pr: open a pull request instead of committing.
        revision: branch to push to; "" is the default one.
        tag: tag for the commit; "" is none.
        sign_key: PEM private key that the artifact is signed with; "" signs nothing.
        card_language: "en", "zh" or "both".
        base_model: the source's id on the Hub, for a model that is a local folder; "" is the model's own.
        licence: the licence that the source's card must name (e.g. "apache-2.0"); "" accepts any.
        profile: which models are profiled: "both", only the "artifact", or "none".
        override_gates: why failed gates are accepted; it is written into report and card. "" accepts none.
        formats: other formats that the artifact is exported to and pushed in, each to a repository of its own:
            "gguf", or "gguf=org/other" to name it.
    """

    kind: str = "gptq"
    source: str = "hf"
    repo: str = ""
    private: bool = False
    create_pr: bool = False
    revision: str = ""
    tag: str = ""
    sign_key: str = ""
    card_language: str = "en"
    base_model: str = ""
    licence: str = ""
    profile: str = "both"
    override_gates: str = ""
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        _choice("kind", self.kind, KINDS)
        _choice("source", self.source, SOURCES)
        _choice("card_language", self.card_language, LANGUAGES)
        _choice("profile", self.profile, PROFILED)
        check_repo(self.repo)
        check_repo(self.base_model)
        if self.create_pr and (self.revision or self.tag):
            raise InputError("create_pr goes with neither revision nor tag", next_step="tag after merging")
        if self.override_gates and not self.override_gates.strip():
            raise InputError("override_gates is blank", next_step="say why, or leave it out")


@dataclass(frozen=True)
class TasksConfig:
    """Benchmark tasks of the validate stage, as the options of `qwen-quant validate` of the same names.

    Attributes:
        tasks: names of tasks. preset: "qwen-base", "qwen-chat" or "". Both empty: no task is run.
        limit: only the first items of each task. by_subject: list the members of a group too.
        allow_code_execution: let code that the model wrote run, in a sandbox.
        data_dir: where task data lies ("": the working directory). offline: never ask the Hub for it.
    """

    tasks: tuple[str, ...] = ()
    preset: str = ""
    limit: int | None = None
    by_subject: bool = False
    allow_code_execution: bool = False
    data_dir: str = ""
    offline: bool = False

    @property
    def wanted(self) -> bool:
        """Whether there is any task to run."""
        return bool(self.tasks or self.preset)


@dataclass(frozen=True)
class ReleaseRecipe:
    """One release: the recipe that every command knows and what only a release needs.

    Attributes:
        path, sha256: the file it was read from.
        model: `base.model`, which a release must have.
    """

    path: Path
    sha256: str
    model: str
    base: Recipe
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)


def local_source(model: str) -> Path | None:
    """The folder of a model that needs no hub: "bundled:NAME" or an existing folder; None for a hub id."""
    if model.startswith(BUNDLED_PREFIX):
        return bundled_path(model.removeprefix(BUNDLED_PREFIX))
    folder = Path(model).expanduser()
    return folder.absolute() if folder.is_dir() else None


def check_repo(repo: str) -> None:
    """InputError for a repository that is neither "" nor "org/name"."""
    if repo and not REPO_ID.fullmatch(repo):
        raise InputError(f"'{repo}' is not a repository", next_step="write it as org/name")


def load_release(path: Path) -> ReleaseRecipe:
    """Read a release recipe. Errors: InputError naming the file, the table and the key, before any work is done."""
    table = read_toml(path)
    base = take_recipe(table, path)
    _sizes(table, path)
    recipe = ReleaseRecipe(
        path=path,
        sha256=file_sha256(path),
        model=base.model or "",
        base=base,
        release=read_section(table, "release", ReleaseConfig, path),
        profile=read_section(table, "profile", ProfileConfig, path),
        tasks=read_section(table, "tasks", TasksConfig, path),
    )
    if "export" in table:
        raise InputError(f"{path}: there is no table [export]", next_step="formats = [...] stands in [release]")
    refuse_rest(table, path)
    _check_together(recipe)
    return recipe


def targets_of(recipe: ReleaseRecipe, repo: str) -> tuple[FormatTarget, ...]:
    """The recipe's formats and where each goes beside `repo` ("": nowhere, and their repositories have no meaning).

    Errors: UsageError for an unknown format, or a repository given twice.
    """
    return parse_targets(recipe.release.formats, repo or _NOWHERE, recipe.base.gptq.bits)


def _sizes(table: dict[str, Any], path: Path) -> None:
    """[profile] memory_limit = "16GB" as memory_limit_bytes."""
    profile = table.get("profile")
    if isinstance(profile, dict) and "memory_limit" in profile:
        profile["memory_limit_bytes"] = parse_size(str(profile.pop("memory_limit")))


def _check_together(recipe: ReleaseRecipe) -> None:
    """What each section allows and both together do not; a stage hours later would otherwise be the first to say so."""
    path, gates, release = recipe.path, recipe.base.gates, recipe.release
    if not recipe.model:
        raise InputError(f"{path}: model is missing", next_step='add model = "org/name@revision" or a folder')
    if recipe.base.out is not None:
        why = "the artifact of a release lies in its work folder"
        raise InputError(f"{path}: out has no meaning in a release", why, "remove it; --work DIR says where to work")
    limits = (gates.max_kl, gates.max_perplexity_ratio, gates.min_top1, gates.max_task_drop)
    if all(limit is None for limit in limits) and not release.override_gates:
        step = "set max_kl, max_perplexity_ratio or min_top1 in [gates], or say why not: override_gates in [release]"
        raise InputError(f"{path}: there is no gate", "nothing would keep a bad artifact from being pushed", step)
    if gates.max_task_drop is not None and not recipe.tasks.wanted:
        raise InputError(
            f"{path}: max_task_drop is set but no task is run", next_step="name tasks or a preset: [tasks]"
        )
    try:
        targets_of(recipe, release.repo)
    except UsageError as error:
        raise UsageError(f"{path}: [release] formats: {error.what}", error.why, error.next_step) from None
    if release.formats and release.kind != "gptq":
        step = 'leave formats out, or set kind = "gptq"'
        raise InputError(f"{path}: formats has no meaning with kind {release.kind!r}", "only Int4 is re-encoded", step)
    if release.source == "modelscope" and "/" not in recipe.model:
        raise InputError(f"{path}: '{recipe.model}' is not a ModelScope id", next_step="write it as org/name@revision")
