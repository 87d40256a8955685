"""From the names that a user gives to lm-evaluation-harness tasks with their data: names, groups, presets, data sets.

The harness itself is handed in (`manager` is its TaskManager), so that this module imports without it. Data sets are
resolved in a working directory: a relative path that exists there (`cais/mmlu`) wins over the Hub's of that name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qwen_quant.errors import InputError
from qwen_quant.evaluation.presets import PRESETS, SHORT_NAMES, STOCK_SCORES, PresetTask
from qwen_quant.progress import ProgressFn

# Folders of lm_eval/tasks that hold what presets.SHORT_NAMES and PRESETS name.
BENCHMARK_FOLDERS = ("mmlu/default", "cmmlu", "ceval", "gsm8k", "bbh/cot_fewshot", "minerva_math")
OWN_TASKS = Path(__file__).parents[1] / "tasks"
_SUGGESTIONS = 3
_UNREACHABLE = "unreachable"
_MISSING = "missing"


class UnknownTaskError(InputError):
    """No catalog that was read has a task of this name."""


@dataclass(frozen=True)
class TaskPlan:
    """One row of the report before its data is read.

    Attributes:
        name: as the user gave it. leaves: the lm-eval tasks it stands for, more than one for a group.
        settings: lm-eval task settings that replace the stock ones. shots: examples; None is the task's own number.
        chat: the prompt goes through the chat template.
        scores: (metric, filter) wanted; ("", "") is the task's first, None is every metric (our own task files).
    """

    name: str
    leaves: tuple[str, ...]
    settings: Mapping[str, Any]
    shots: int | None
    chat: bool
    scores: tuple[str, str] | None


@dataclass(frozen=True)
class LoadedPlan:
    """A plan with its lm-eval tasks by name, data read, and what to warn about."""

    plan: TaskPlan
    tasks: dict[str, Any]
    warnings: tuple[str, ...]


def include_paths(tasks_dirs: Sequence[Path]) -> list[Path]:
    """Folders of task files that are read after lm-eval's own and win over them: ours, then the user's."""
    for folder in tasks_dirs:
        if not folder.is_dir():
            raise InputError(f"--tasks-dir {folder} is not a folder", next_step="give a folder with task YAML files")
    return [*([OWN_TASKS] if OWN_TASKS.is_dir() else []), *(folder.resolve() for folder in tasks_dirs)]


def preset_tasks(name: str | None) -> tuple[PresetTask, ...]:
    """The tasks of a preset (none without a name). Errors: InputError for an unknown one, with the nearest."""
    if name is None:
        return ()
    if name not in PRESETS:
        raise InputError(f"there is no preset '{name}'", next_step=f"use one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def plan_tasks(names: Sequence[str], preset: str | None, manager: Any) -> list[TaskPlan]:
    """What to run, in the order given, a preset first; a name that the preset holds is not run twice.

    Errors: InputError for no task at all, and for an unknown one, with the nearest names.
    """
    plans = []
    for task in preset_tasks(preset):
        leaves = _all_leaves(manager, task.tasks or SHORT_NAMES[task.name])
        wanted = None if not task.metric and _is_own(manager, leaves[0]) else (task.metric, task.filter)
        plans.append(TaskPlan(task.name, leaves, task.settings, task.shots, task.chat, wanted))
    taken = {plan.name for plan in plans}
    for name in dict.fromkeys(names):
        if name not in taken:
            plans += _named(name, manager)
    if not plans:
        raise InputError("there is no task to run", next_step="give --tasks NAME,... or --preset NAME")
    return plans


def _named(name: str, manager: Any) -> list[TaskPlan]:
    """The plan of one name; our own groups measure different things and so become one plan for each member."""
    leaves = _all_leaves(manager, SHORT_NAMES.get(name, (name,)))
    if all(_is_own(manager, leaf) for leaf in leaves):
        names = (name,) if len(leaves) == 1 else leaves
        return [TaskPlan(n, (leaf,), {}, None, False, None) for n, leaf in zip(names, leaves, strict=True)]
    return [TaskPlan(name, leaves, {}, None, False, STOCK_SCORES.get(name, ("", "")))]


def _is_own(manager: Any, name: str) -> bool:
    """Whether a task comes from qwen_quant/tasks."""
    path = manager.task_index[name].yaml_path
    return path is not None and OWN_TASKS in Path(path).parents


def _all_leaves(manager: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that names stand for, each once, in order."""
    return tuple(dict.fromkeys(leaf for name in names for leaf in _leaves(manager, name)))


def _leaves(manager: Any, name: str) -> list[str]:
    """The tasks that one name stands for: itself, or the members of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        known = dict.fromkeys([*SHORT_NAMES, *manager.all_tasks])
        near = difflib.get_close_matches(name, known, n=_SUGGESTIONS, cutoff=0.5)
        step = f"did you mean {' or '.join(near)}?" if near else f"use one of: {', '.join(SHORT_NAMES)}"
        raise UnknownTaskError(f"there is no task '{name}'", "neither lm-eval nor a task folder has it", step)
    kind = entry.kind.name
    if kind == "TAG":
        return sorted(entry.tags)
    if kind != "GROUP":
        return [name]
    members = entry.cfg.get("task") or []
    members = [members] if isinstance(members, str) else members
    if not all(isinstance(member, str) for member in members):
        raise InputError(
            f"the group '{name}' changes the settings of its members",
            "its tasks cannot be paired item by item under their own names",
            "name its tasks one by one",
        )
    return [leaf for member in members for leaf in _leaves(manager, member)]


def executing(plans: Sequence[TaskPlan], manager: Any) -> list[str]:
    """Names of planned tasks that run code which the model wrote."""
    index = manager.task_index
    return [p.name for p in plans if any((index[leaf].cfg or {}).get("unsafe_code") for leaf in p.leaves)]


def load_plans(
    plans: Sequence[TaskPlan], manager: Any, data_dir: Path, seed: int, progress: ProgressFn
) -> list[LoadedPlan]:
    """Read the data of every plan. The working directory must already be `data_dir`, the folder of OWNER/NAME.

    In a group, members whose data is not there are left out and named in a warning. Errors: InputError naming the data
    set and the place it belongs to, when none of a plan's tasks can be read.
    """
    total, done, loaded = sum(len(plan.leaves) for plan in plans), 0, []
    for plan in plans:
        tasks, absent = {}, []
        for leaf in plan.leaves:
            progress("reading data sets", done, total)
            task, problem = _load_leaf(leaf, plan, manager)
            if task is None and (problem[0] == _UNREACHABLE or len(plan.leaves) == 1):
                raise _unreadable(leaf, manager, data_dir, problem[1])
            if task is None:
                absent.append((leaf, problem[1]))
            else:
                task.set_fewshot_seed(seed)
                tasks[leaf] = task
            done += 1
        if not tasks:
            raise _unreadable(absent[0][0], manager, data_dir, absent[0][1])
        loaded.append(LoadedPlan(plan, tasks, _absence(plan, [leaf for leaf, _ in absent])))
    progress("reading data sets", total, total)
    return loaded


def _absence(plan: TaskPlan, absent: Sequence[str]) -> tuple[str, ...]:
    """The warning about members of a group without data."""
    if not absent:
        return ()
    return (
        f"{plan.name}: {len(absent)} of {len(plan.leaves)} parts have no data here and were left out, so that the "
        f"score is not the published benchmark's: {', '.join(absent)}",
    )


def _load_leaf(leaf: str, plan: TaskPlan, manager: Any) -> tuple[Any, tuple[str, str]]:
    """(task, ("", "")), or (None, (kind of problem, its first line))."""
    settings = dict(plan.settings)
    if plan.shots is not None:
        settings["num_fewshot"] = plan.shots
    try:
        loaded = manager.load([{"group": "qwen_quant_plan", "task": [{"task": leaf, **settings}]}])
    except (ImportError, ModuleNotFoundError) as error:
        raise InputError(
            f"the task '{leaf}' needs a package that is not installed",
            str(error).splitlines()[0],
            "pip install 'qwen-quant[eval]'",
        ) from error
    except ConnectionError as error:  # offline, or the Hub does not answer: the next data set will not come either
        return None, (_UNREACHABLE, _first_line(error))
    except (OSError, ValueError, KeyError) as error:
        return None, (_MISSING, _first_line(error))
    except (TypeError, AttributeError, IndexError, AssertionError, TemplateError) as error:
        raise InputError(
            f"the task '{leaf}' cannot be set up", _first_line(error), f"check {manager.task_index[leaf].yaml_path}"
        ) from error
    task = loaded["tasks"][leaf]
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return task, ("", "")


def _first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unreadable(leaf: str, manager: Any, data_dir: Path, why: str) -> InputError:
    """The error for data that is neither on disk nor on the Hub, naming the files to provide."""
    config = manager.task_index[leaf].cfg or {}
    path, name = str(config.get("dataset_path")), config.get("dataset_name")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        listed = files.values() if isinstance(files, dict) else files if isinstance(files, list) else [files]
        place = ", ".join(str(data_dir / str(file)) for file in listed)
        return InputError(f"the data of task '{leaf}' cannot be read", why, f"provide {place}, or give --data-dir DIR")
    part = f" (configuration '{name}')" if name else ""
    return InputError(
        f"the data set {path}{part} of task '{leaf}' cannot be read",
        why,
        f"provide it as {data_dir / path}/ (its files, and a README.md whose front matter lists configurations and "
        "splits), give --data-dir DIR where DIR or DIR/hub holds OWNER/NAME, or connect to the Hub",
    )
