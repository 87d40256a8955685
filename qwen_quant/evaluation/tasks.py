"""Benchmark tasks through lm-evaluation-harness, on the same items for both models, and their paired comparison.

Only this file imports lm-eval (extra `eval`), and only inside functions. `run_tasks` answers the harness's requests
with `LanguageModel` and keeps every item's score; `pair_tasks` compares two such runs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_quant.errors import InputError
from qwen_quant.evaluation.journal import RequestJournal, model_identity, request_key
from qwen_quant.evaluation.language_model import LanguageModel
from qwen_quant.evaluation.task_catalog import (
    BENCHMARK_FOLDERS,
    LoadedPlan,
    TaskPlan,
    UnknownTaskError,
    executing,
    include_paths,
    load_plans,
    plan_tasks,
    preset_tasks,
)
from qwen_quant.evaluation.task_pairing import pair_tasks
from qwen_quant.evaluation.task_scores import TaskScores, collect
from qwen_quant.progress import ProgressFn
from qwen_quant.runtime.loading import load_model
from qwen_quant.tasks.rows import ALLOW_CODE_EXECUTION, DATA_DIR, TOKENIZER_DIR
from qwen_quant.tokenizer import load_tokenizer

__all__ = ["TaskRun", "TaskScores", "harness_model", "pair_tasks", "run_tasks"]
INSTALL = "pip install 'qwen-quant[eval]'"
JOURNAL_FILE = "answers.jsonl"
_CHATTER = ("lm_eval", "datasets", "evaluate", "transformers", "huggingface_hub", "httpx", "filelock", "fsspec")


@dataclass(frozen=True)
class TaskRun:
    """What to run on both models.

    Attributes:
        tasks: short names (presets.SHORT_NAMES) or lm-eval names of tasks, groups and tags.
        preset: "qwen-base", "qwen-chat" or None.
        tasks_dirs: folders of the user's task YAML files.
        limit: only the first `limit` items of every task (of every member of a group); None is all.
        allow_code_execution: tasks may run code that the model wrote.
        seed: of the choice of few-shot examples, where a task draws them.
        work: folder for finished answers; a run that finds its answers there continues.
        data_dir: where data sets are looked up before the Hub, as data_dir/hub/OWNER/NAME or data_dir/OWNER/NAME. The
            harness runs in that folder, so relative `data_files` of task files are taken from it too.
        by_subject: list the members of a group beside the group.
        offline: never ask the Hub.
        kv_cache: OUT answers with its keys and values in such a cache (kv_cache.make_cache); "": in the plain one.
    """

    tasks: tuple[str, ...]
    preset: str | None
    tasks_dirs: tuple[Path, ...]
    limit: int | None
    allow_code_execution: bool
    seed: int
    work: Path
    data_dir: Path = Path(".")
    by_subject: bool = False
    offline: bool = False
    kv_cache: str = ""


def run_tasks(
    model_folder: Path, run: TaskRun, device: torch.device | str, progress: ProgressFn
) -> dict[str, TaskScores]:
    """Scores of every task by its name ("TASK:METRIC" where one task gives several scores).

    FP32 on the CPU, BF16 on CUDA, quantized linears exactly dequantized. Errors: InputError for unknown tasks, data
    that cannot be reached, code execution that was not allowed, sampled tasks, and a missing extra.
    """
    folder, run = model_folder.resolve(), _resolved(run)
    with _surroundings(run, folder):
        plans, manager = _allowed(run)
        loaded = load_plans(plans, manager, _hub_folder(run.data_dir), run.seed, progress)
        journal = RequestJournal(run.work / JOURNAL_FILE)
        asker = _Asker(folder, torch.device(device), journal, progress, run.kv_cache)
        scores: dict[str, TaskScores] = {}
        for plan in loaded:
            scores.update(_run_plan(plan, run, asker))
    return scores


def check_tasks(run: TaskRun) -> None:
    """Everything about a run that can be refused before a model or a data set is read (InputError)."""
    run = _resolved(run)
    with _surroundings(run, run.data_dir):
        _allowed(run)


def _resolved(run: TaskRun) -> TaskRun:
    """The run with absolute folders, since the harness works in another directory; its cheap checks come first."""
    preset_tasks(run.preset)
    if run.limit is not None and run.limit < 1:
        raise InputError(f"--limit is {run.limit}", next_step="use 1 or more")
    return replace(run, work=run.work.resolve(), data_dir=run.data_dir.resolve())


def _allowed(run: TaskRun) -> tuple[list[TaskPlan], Any]:
    """`_planned`, where no task runs generated code without permission."""
    plans, manager = _planned(run)
    code = executing(plans, manager)
    if code and not run.allow_code_execution:
        raise InputError(
            f"the task '{code[0]}' runs code that the model writes",
            f"that was not allowed; tasks that do: {', '.join(code)}",
            "add --allow-code-execution, or leave them out",
        )
    return plans, manager


def _planned(run: TaskRun) -> tuple[list[TaskPlan], Any]:
    """What to run, and lm-eval's catalog with our and the user's task files.

    The catalog of the known benchmarks is a few hundred files; all of lm-eval's (14000 names) are read only for a name
    that is not among them.
    """
    import lm_eval.tasks as harness

    paths = include_paths(run.tasks_dirs)
    benchmarks = [Path(harness.__file__).parent / folder for folder in BENCHMARK_FOLDERS]
    manager = harness.TaskManager(include_defaults=False, include_path=[*benchmarks, *paths])
    try:
        return plan_tasks(run.tasks, run.preset, manager), manager
    except UnknownTaskError:
        manager = _whole_catalog(tuple(paths))
        return plan_tasks(run.tasks, run.preset, manager), manager


@functools.lru_cache(maxsize=1)
def _whole_catalog(paths: tuple[Path, ...]) -> Any:
    """Every task of lm-eval and of `paths`; kept, since the second model asks for it again."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths))


@contextlib.contextmanager
def _surroundings(run: TaskRun, folder: Path) -> Iterator[None]:
    """Run the harness in the data folder, quietly, with a fresh cache of prepared data sets, offline if asked.

    The cache is new for each run because `datasets` recognises a folder by its name and not by its contents: with a
    lasting one, changed files would silently give the old rows.
    """
    if not run.data_dir.is_dir():
        raise InputError(f"--data-dir {run.data_dir} is not a folder")
    try:
        import datasets
        import huggingface_hub.constants as hub
        import lm_eval.api.task as harness
    except ImportError as error:
        raise InputError("benchmark tasks need lm-evaluation-harness", str(error), INSTALL) from error
    run.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="datasets-", dir=run.work))
        stack.enter_context(contextlib.chdir(_hub_folder(run.data_dir)))
        stack.enter_context(
            _environment(
                {
                    DATA_DIR: str(run.data_dir),
                    ALLOW_CODE_EXECUTION: "1" if run.allow_code_execution else "0",
                    TOKENIZER_DIR: str(folder),
                }
            )
        )
        stack.enter_context(_replaced(datasets.config, "HF_DATASETS_CACHE", Path(cache)))
        stack.enter_context(_replaced(harness, "tqdm", _no_bar))  # it has no switch of its own
        if run.offline:
            stack.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(hub, "HF_HUB_OFFLINE", True))
        stack.enter_context(_quiet(datasets))
        yield


def _hub_folder(data_dir: Path) -> Path:
    """The folder that holds OWNER/NAME data sets."""
    return data_dir / "hub" if (data_dir / "hub").is_dir() else data_dir


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while: the switches of qwen_quant/tasks."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _no_bar(items: Any, **_: Any) -> Any:
    """tqdm without a bar."""
    return items


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Hold back the harness's own messages and bars: what matters in them is in our warnings."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


class _Asker:
    """One model's answers to requests: from the journal where it has them, else computed batch by batch.

    Attributes:
        label: what the progress line says. truncated: tokens cut off, one entry for each request that was too long.
    """

    def __init__(
        self, folder: Path, device: torch.device, journal: RequestJournal, progress: ProgressFn, kv_cache: str
    ) -> None:
        self._journal, self._progress = journal, progress
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._identity = model_identity(folder, f"{device.type} {dtype}" + (f" {kv_cache} cache" if kv_cache else ""))
        self.tokenizer = load_tokenizer(folder)._inner
        progress("loading the model", 0, 1)
        self.model = LanguageModel(load_model(folder, device, dtype), self.tokenizer, str(folder), kv_cache)
        progress("loading the model", 1, 1)
        self.label = ""
        self.truncated: list[int] = []

    def ask(self, kind: str, arguments: Sequence[Any]) -> list[Any]:
        """Values of the answers in the order asked; `kind` is "likelihoods", "rolling" or "generate"."""
        keys = [request_key(self._identity, kind, argument) for argument in arguments]
        distinct = list(dict(zip(keys, arguments, strict=True)).items())
        batches = getattr(self.model, kind)([argument for _, argument in distinct])
        done = 0
        self._progress(self.label, done, len(distinct))
        for indices, compute in batches:
            batch = [distinct[index][0] for index in indices]
            if not all(key in self._journal for key in batch):
                self._journal.add(zip(batch, compute(), strict=True))
            done += len(indices)
            self._progress(self.label, done, len(distinct))
        cut = [self._journal[key].truncated_tokens for key, _ in distinct]
        self.truncated += [tokens for tokens in cut if tokens]
        return [self._journal[key].value for key in keys]

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as the model's chat template writes it (InputError where it has none)."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{self.model.name} has no chat template",
                "this preset or task asks its questions through it",
                "use --preset qwen-base, or add chat_template.jinja to the folder",
            )
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


def harness_model(asker: Any) -> Any:
    """An lm_eval.api.model.LM whose requests are answered by `asker` (an _Asker, or anything with its methods)."""
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        """Our loader behind lm-eval's model interface."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """(log-likelihood in nats, is greedy) of each (context, continuation)."""
            return [(float(v[0]), bool(v[1])) for v in asker.ask("likelihoods", [r.args for r in requests])]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """Log-likelihood in nats of each text."""
            return [float(v) for v in asker.ask("rolling", [r.args[0] for r in requests])]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Greedy continuation of each (prompt, generation_kwargs)."""
            return [str(v) for v in asker.ask("generate", [r.args for r in requests])]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The conversation as text."""
            return str(asker.chat(chat_history, add_generation_prompt))

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The template itself, for lm-eval's records."""
            return str(asker.tokenizer.chat_template) if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            """Which tokenizer made the prompts, for lm-eval's request cache."""
            return str(asker.tokenizer.name_or_path).replace("/", "__")

    return HarnessModel()


def _run_plan(loaded: LoadedPlan, run: TaskRun, asker: _Asker) -> dict[str, TaskScores]:
    """Scores of one plan: a row for each of its metrics, and for each member of a group if asked."""
    from lm_eval.evaluator import evaluate

    plan = loaded.plan
    asker.label, asker.truncated = plan.name, []
    results = evaluate(
        lm=harness_model(asker),
        task_dict={"tasks": loaded.tasks},
        limit=run.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=plan.chat,
        fewshot_as_multiturn=plan.chat,
        confirm_run_unsafe_code=run.allow_code_execution,
    )
    warnings = (*loaded.warnings, *_length_warning(plan.name, asker), *_penalty_warning(loaded, asker))
    rows = collect(plan.name, loaded, results["samples"], warnings)
    if run.by_subject and len(loaded.tasks) > 1:
        for leaf, task in loaded.tasks.items():
            part = LoadedPlan(replace(plan, name=leaf, leaves=(leaf,)), {leaf: task}, ())
            rows.update(collect(leaf, part, results["samples"], ()))
    return rows


def _length_warning(name: str, asker: _Asker) -> list[str]:
    """How many requests did not fit into the model."""
    if not asker.truncated:
        return []
    return [
        f"{name}: {len(asker.truncated)} requests were longer than the model's {asker.model.max_length} tokens and "
        f"lost their beginning (at most {max(asker.truncated)} tokens)"
    ]


def _penalty_warning(loaded: LoadedPlan, asker: _Asker) -> list[str]:
    """Greedy decoding keeps the penalties of generation_config.json, as lm-eval's own model does."""
    penalty = getattr(asker.model.model.generation_config, "repetition_penalty", None)
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in loaded.tasks.values())
    if not generates or penalty in (None, 1.0):
        return []
    return [
        f"{loaded.plan.name}: generation_config.json sets repetition_penalty {penalty}, which applies to its answers"
    ]
