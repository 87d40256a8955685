"""What would stop a release only hours later, looked for before the work: packages, keys, ids, hopeless formats."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import partial
from pathlib import Path

from qwen_quant.errors import InputError, QwenQuantError, UsageError
from qwen_quant.hub.folder import known_origin
from qwen_quant.releasing.settings import ReleaseRecipe, local_source, targets_of

_HARNESS = ("lm_eval", "datasets")


def check_machine(recipe: ReleaseRecipe, stages: Collection[str]) -> None:
    """The optional packages that `stages` need for tasks and formats are there (InputError naming the extra)."""
    from qwen_quant.export.formats import find_format, require

    for package in _HARNESS if recipe.tasks.wanted and "validate" in stages else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            what = f"{recipe.path}: [tasks] needs lm-evaluation-harness"
            raise InputError(what, str(error), "pip install 'qwen-quant[eval]'") from error
    for row in (find_format(target.format) for target in targets_of(recipe, "") if "export" in stages):
        for package in row.packages:
            require(package, row.name, row.extra)


def check_push(recipe: ReleaseRecipe, repo: str) -> None:
    """What a push at the end asks for besides the artifact: a repository, the source's id, a usable key.

    Errors: UsageError without a repository; InputError for the others.
    """
    if not repo:
        step = "add repo to [release], or --repo ORG/NAME, or --no-push"
        raise UsageError("there is no repository to push to", f"{recipe.path} does not name one", step)
    folder = local_source(recipe.model)
    if folder is not None and not recipe.release.base_model and known_origin(folder) is None:
        why = f"{recipe.model} is a folder of this machine, and a card that is published says what it was made from"
        raise InputError(f"{recipe.path}: base_model is missing", why, 'add base_model = "org/name" to [release]')
    if recipe.release.sign_key:
        from qwen_quant.signing import check_key

        check_key(Path(recipe.release.sign_key).expanduser())


def check_formats(recipe: ReleaseRecipe, source: Path) -> None:
    """Every format of the recipe can hold exactly what [gptq] will make of `source` (InputError otherwise)."""
    from qwen_quant.export.formats import find_format
    from qwen_quant.export.planned import PlannedSource

    targets = targets_of(recipe, "")
    if not targets:
        return
    planned = PlannedSource(source, recipe.base.gptq)
    for name in (target.format for target in targets):
        for reason in find_format(name).check(planned):
            what = f"{recipe.path}: {name} in formats cannot hold exactly what [gptq] makes"
            step = f"use {reason.nearest}, or leave {name} out of formats"
            raise InputError(what, f"{reason.what}: {reason.why}", step)


def problems_ahead(recipe: ReleaseRecipe, repo: str, stages: Collection[str]) -> tuple[str, ...]:
    """What `check_machine` and, with "push" among the stages, `check_push` refuse, in words for a plan."""
    checks = [partial(check_machine, recipe, stages)]
    checks += [partial(check_push, recipe, repo)] if "push" in stages else []
    found = []
    for check in checks:
        try:
            check()
        except QwenQuantError as error:
            found.append(f"{error}; {error.next_step}")
    return tuple(found)
