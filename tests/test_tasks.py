"""evaluation/tasks.py and what it stands on: the answers of lm-eval's own HF model, resumed runs, honest errors."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from qwen_quant.errors import InputError, QwenQuantError
from qwen_quant.evaluation import presets, tasks
from qwen_quant.evaluation.journal import RequestJournal, model_identity, request_key
from qwen_quant.evaluation.language_model import (
    Answer,
    LanguageModel,
    before_stop,
    generation_settings,
    max_length,
    padded,
    rolling_rows,
)
from qwen_quant.evaluation.task_catalog import BENCHMARK_FOLDERS
from qwen_quant.evaluation.task_pairing import pair_tasks
from qwen_quant.evaluation.task_scores import TaskScores
from qwen_quant.evaluation.tasks import TaskRun, run_tasks
from qwen_quant.progress import no_progress
from qwen_quant.runtime.loading import load_model
from qwen_quant.tokenizer import load_tokenizer
from tests.support.artifacts import make_artifact
from tests.support.checkpoints import make_checkpoint

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'qwen-quant[eval]'"
)
needs_hflm = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs lm-eval and accelerate: pip install 'qwen-quant[eval,dev]'",
)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256, "head_dim": 16}
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["\\n", "zz"], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = "group: tiny_group\ntask: [tiny_choice, tiny_absent]\n"
LOWER = WRITE.replace("tiny_write", "tiny_lower").replace("higher_is_better: true", "higher_is_better: false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen2 checkpoint of 256 positions."""
    sizes = {name: value for name, value in SMALL.items() if name != "head_dim"}
    return make_checkpoint(tmp_path_factory.mktemp("tasks") / "tiny", "qwen2", **sizes)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    """The same, loaded in FP32."""
    return LanguageModel(load_model(folder), load_tokenizer(folder)._inner, "tiny")


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Questions of very different lengths, two of them longer than the model; options of one and of several tokens."""
    generator = np.random.default_rng(3)
    items = []
    for index in range(count):
        length = 400 if index in (4, 9) else int(generator.integers(2, 90))
        words = "".join(generator.choice(list("abcdefgh é的 "), size=length))
        options = ["A", "B"] if index % 2 else [" yes it is", " no", "的"]
        items.append({"question": f"Q{index} {words} answer:", "options": options, "answer": index % 2})
    return items


def data_folder(place: Path) -> Path:
    """Task files and their rows."""
    place.mkdir()
    (place / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("write", WRITE), ("group", GROUP), ("lower", LOWER)):
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    absent = CHOICE.replace("tiny_choice", "tiny_absent").replace("choice.jsonl", "absent.jsonl")
    (place / "absent.yaml").write_text(absent, encoding="utf-8")
    return place


def a_run(place: Path, *names: str, **changes: Any) -> TaskRun:
    """A run of the tasks in `place`."""
    settings: dict[str, Any] = {
        "tasks": names,
        "preset": None,
        "tasks_dirs": (place,),
        "limit": None,
        "allow_code_execution": False,
        "seed": 1234,
        "work": place / "work",
        "data_dir": place,
        "offline": True,
    }
    return TaskRun(**{**settings, **changes})


def test_answers_through_a_cache(folder: Path, model: LanguageModel) -> None:
    """Int8 keys and values move every likelihood a little; greedy text and batching stay the model's own."""
    cached = LanguageModel(load_model(folder), load_tokenizer(folder)._inner, "tiny", "int8")
    pairs = [("a long question " * n, " answer") for n in (1, 2, 5)]
    plain, ours = (answers(m.likelihoods(pairs), 3) for m in (model, cached))
    alone = [answers(cached.likelihoods([pair]), 1)[0] for pair in pairs]
    for left, right, single in zip(plain, ours, alone, strict=True):
        assert 1e-6 < abs(left.value[0] - right.value[0]) < 0.05 * abs(left.value[0])
        assert right.value[0] == pytest.approx(single.value[0], rel=1e-5)
    made = answers(cached.generate([("a question", {"until": [], "max_gen_toks": 5})]), 1)[0]
    assert isinstance(made.value, str)


def answers(batches: Any, count: int) -> list[Answer]:
    """Answers in the order of the requests."""
    found: dict[int, Answer] = {}
    for indices, compute in batches:
        found.update(zip(indices, compute(), strict=True))
    return [found[index] for index in range(count)]


# --- the language model, against one plain forward pass a request


def plain_likelihood(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = (context + continuation)[-(model.max_length + 1) :]
    with torch.no_grad():
        scores = model.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(continuation) :]
    picked = torch.tensor(continuation)
    return float(scores[range(len(continuation)), picked].sum()), bool((scores.argmax(-1) == picked).all())


def test_likelihoods_equal_one_pass_for_each_pair(model: LanguageModel) -> None:
    pairs = [(row["question"], option) for row in rows() for option in row["options"]]
    pairs += [("", "no context"), ("ends in spaces  ", "word")]
    got = answers(model.likelihoods(pairs), len(pairs))
    for (context, continuation), answer in zip(pairs, got, strict=True):
        bare = context.rstrip()
        start = model.encode(bare) if bare else [model.prefix_id]
        tail = model.encode(context + continuation)[len(model.encode(bare)) if bare else 0 :]
        value, greedy = plain_likelihood(model, start, tail)
        assert answer.value[0] == pytest.approx(value, abs=2e-4)
        assert answer.value[1] == greedy
        assert answer.truncated_tokens == max(0, len(start) + len(tail) - model.max_length - 1)
    assert sum(answer.truncated_tokens > 0 for answer in got) == 5  # items 4 (three options) and 9 (two)


def test_greedy_is_true_for_what_the_model_would_say(model: LanguageModel) -> None:
    found = 0
    for start in "abcdefghijklmnopqrstuvwxyz":
        with torch.no_grad():
            scores = model.model(torch.tensor([model.encode(start)])).logits[0, -1]
        best = model.tokenizer.decode([int(scores.argmax())])
        if model.encode(start + best) == [*model.encode(start), int(scores.argmax())]:
            other = "x" if best != "x" else "y"
            got = answers(model.likelihoods([(start, best), (start, other)]), 2)
            assert [answer.value[1] for answer in got] == [True, False]
            found += 1
    assert found


@pytest.mark.parametrize("batch", [1, 5])
def test_generation_equals_a_plain_greedy_loop(model: LanguageModel, monkeypatch: Any, batch: int) -> None:
    monkeypatch.setattr("qwen_quant.evaluation.language_model.GENERATION_ROWS", {"cpu": batch})
    prompts = [(row["question"], {"until": ["zz"], "max_gen_toks": 16}) for row in rows()]
    got = answers(model.generate(prompts), len(prompts))
    ends = model.tokenizer.eos_token_id
    for (prompt, _), answer in zip(prompts, got, strict=True):
        ids = model.encode(prompt)[-(model.max_length - 16) :]
        new: list[int] = []
        for _ in range(16):
            with torch.no_grad():
                new.append(int(model.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == ends or "zz" in model.tokenizer.decode(new):
                break
        text = model.tokenizer.decode([t for t in new if t != ends], skip_special_tokens=True)
        assert answer.value == text.split("zz")[0]


def test_a_stop_string_ends_its_own_row_only(model: LanguageModel, monkeypatch: Any) -> None:
    monkeypatch.setattr("qwen_quant.evaluation.language_model.GENERATION_ROWS", {"cpu": 8})
    prompts = [letter * count for letter in "abcdefghijklmnopqrstuvwxyz" for count in (1, 3)]
    free = [a.value for a in answers(model.generate([(p, {"max_gen_toks": 12}) for p in prompts]), len(prompts))]
    stop = next(char for text in free for char in text if char.isascii() and char.isprintable())
    got = answers(model.generate([(p, {"max_gen_toks": 12, "until": stop}) for p in prompts]), len(prompts))
    assert [answer.value for answer in got] == [text.split(stop)[0] for text in free]
    assert 0 < sum(stop in text for text in free) < len(prompts)


def test_rolling_windows_predict_each_token_once() -> None:
    for count, window in ((1, 8), (8, 8), (9, 8), (23, 8), (16, 8)):
        tokens = list(range(100, 100 + count))
        windows = rolling_rows(tokens, 7, window)
        assert [t for row in windows for t in row.continuation] == tokens
        for row in windows:
            ids = [*row.context, *row.continuation]
            assert len(ids) <= window + 1 and len(row.context) >= 1
            start = ids.index(row.continuation[0])
            assert ids[start:] == list(row.continuation)
        assert windows[0].context == (7,)
        assert all(len(row.context) + len(row.continuation) == window + 1 for row in windows[1:])


def test_rolling_likelihood_of_a_short_text_is_its_likelihood_after_the_prefix(model: LanguageModel) -> None:
    text = rows()[0]["question"]
    value, _ = plain_likelihood(model, [model.prefix_id], model.encode(text))
    assert answers(model.rolling([text]), 1)[0].value == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    "asked", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}, {"repetition_penalty": 1.1}]
)
def test_anything_but_greedy_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        generation_settings(asked)


def test_generation_settings_read_every_spelling() -> None:
    assert generation_settings({"until": "x", "do_sample": False, "temperature": 0.9}).until == ("x",)
    assert generation_settings({}).new_tokens == 256
    assert generation_settings({"max_new_tokens": 5, "max_gen_toks": 3}).new_tokens == 3


def test_small_parts() -> None:
    assert before_stop("one two three", ("three", " two")) == "one"
    ids, mask = padded([[1, 2, 3], [4]], left=True, device=torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert max_length(type("Config", (), {"seq_length": 99})()) == 99
    assert max_length(type("Config", (), {})()) == 2048


# --- the journal


def test_a_torn_line_is_dropped_and_the_next_one_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    RequestJournal(path).add([("a", Answer([1.5, True])), ("b", Answer("text\n的", 3))])
    path.write_bytes(path.read_bytes()[:-5])
    journal = RequestJournal(path)
    assert "a" in journal and "b" not in journal and len(journal) == 1
    journal.add([("c", Answer("x"))])
    again = RequestJournal(path)
    assert again["a"].value == [1.5, True] and again["c"] == Answer("x") and len(again) == 2


def test_keys_depend_on_the_model_and_the_request(folder: Path, tmp_path: Path) -> None:
    identity = model_identity(folder, "cpu")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert model_identity(copy, "cpu") == identity != model_identity(folder, "cuda")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_identity(copy, "cpu") != identity
    keys = {
        request_key(identity, kind, args) for kind in ("generate", "likelihoods") for args in (("a", "b"), ("ab", ""))
    }
    assert len(keys) == 4


# --- pairing


def scores(values: list[float], *, metric: str = "acc", ids: list[str] | None = None) -> TaskScores:
    names = tuple(ids or [f"t/{i}" for i in range(len(values))])
    return TaskScores("t", metric, 0, names, np.array(values, dtype=np.float64), ())


def test_pairing_counts_discordant_items_and_corrects_over_tasks() -> None:
    first = {"a": scores([1.0] * 12 + [0.0] * 8), "b": scores([0.5, 0.25, 1.0, 0.0])}
    second = {"a": scores([0.0] * 10 + [1.0] * 3 + [0.0] * 7), "b": scores([0.5, 0.25, 0.5, 0.0])}
    one, two = pair_tasks(first, second, seed=0)
    assert (one.only_baseline_right, one.only_quantized_right, one.items) == (10, 1, 20)
    assert one.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    assert one.p_holm == pytest.approx(2 * one.p_value)
    assert one.difference.estimate == pytest.approx(-9 / 20) and one.baseline == pytest.approx(0.6)
    assert one.verdict.word == "loss"
    assert two.only_baseline_right is None and two.quantized == pytest.approx(0.3125) and two.p_value == 1.0


def test_pairing_refuses_other_items() -> None:
    with pytest.raises(InputError, match="same items"):
        pair_tasks({"a": scores([1.0, 0.0])}, {"a": scores([1.0, 0.0], ids=["t/0", "t/9"])}, seed=0)
    with pytest.raises(InputError, match="one model only"):
        pair_tasks({"a": scores([1.0])}, {}, seed=0)


# --- presets


def test_presets_write_the_prompts_of_the_qwen_scripts() -> None:
    row = {"question": "Which is a prime?", "A": "4", "B": "7", "C": "9", "D": "12"}
    choices = {"question": row["question"], "choices": ["4", "7", "9", "12"]}
    options = "A. 4\nB. 7\nC. 9\nD. 12\n"

    def written(settings: dict[str, Any], doc: dict[str, Any]) -> str:
        environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(settings["doc_to_text"]).render(**doc)

    assert written(presets.MMLU_BASE, choices) == f"Question: Which is a prime?\n{options}Answer:"
    assert written(presets.CEVAL_BASE, row) == f"问题：Which is a prime?\n{options}答案："
    assert written(presets.CMMLU_BASE, {**row, "Question": row["question"]}) == written(presets.CEVAL_BASE, row)
    assert written(presets.GSM8K_BASE, {"question": "Q?"}) == "Question: Q?\nLet's think step by step\n"
    assert written(presets.MMLU_CHAT, choices) == (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        f"answer to this question.\n\nWhich is a prime?\n{options}"
    )
    assert written(presets.CEVAL_CHAT, row) == f"Which is a prime?\n\n{options}"


def test_presets_score_replies() -> None:
    row = {"question": "Which is a prime?", "choices": ["4", "7", "9", "12"], "answer": 1}
    assert presets.score_mmlu_chat(row, ["The answer is 7."]) == {"acc": 1.0}
    assert presets.score_mmlu_chat(row, ["B is not correct, C is right"]) == {"acc": 0.0}
    chinese = {"question": "下列哪个是质数____。", "A": "四", "B": "七", "C": "九", "D": "十二", "answer": "B"}
    assert presets.score_ceval_chat(chinese, ["答案是B"]) == {"acc": 1.0}
    assert presets.score_gsm8k_base({"answer": "x #### 8"}, ["so 5+3=8.\nThe answer is 8"]) == {"acc": 1.0}
    assert presets.score_gsm8k_base({"answer": "#### 1,234"}, ["The answer is 1,234"]) == {"acc": 0.0}
    assert presets.score_gsm8k_chat({"answer": "#### 1,234"}, ["1,234 dollars"]) == {"acc": 1.0}


def test_every_preset_task_has_a_name_a_note_and_a_source() -> None:
    for name, members in presets.PRESETS.items():
        assert len({task.name for task in members}) == len(members)
        for task in members:
            assert task.name in presets.SHORT_NAMES and task.note and task.source, (name, task.name)


def test_an_unknown_preset_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no preset 'qwen'"):
        run_tasks(folder, a_run(data_folder(tmp_path / "d"), preset="qwen"), "cpu", no_progress)


# --- through the harness


@needs_hflm
def test_scores_equal_those_of_lm_evals_own_model(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    place = data_folder(tmp_path / "d")
    ours = run_tasks(folder, a_run(place, "tiny_choice", "tiny_write"), "cpu", no_progress)
    monkeypatch.chdir(place)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_defaults=False, include_path=str(place))
    result = evaluate(lm=theirs, task_dict=manager.load(["tiny_choice", "tiny_write"]), bootstrap_iters=0)
    samples = result["samples"]
    assert list(ours["tiny_choice"].scores) == [s["acc"] for s in samples["tiny_choice"]]
    assert 0 < ours["tiny_choice"].scores.sum() < 12
    journal = {}
    for line in (place / "work" / tasks.JOURNAL_FILE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        journal[entry["key"]] = entry["value"]
    identity = model_identity(folder.resolve(), "cpu torch.float32")
    for sample in samples["tiny_choice"]:
        for arguments, response in zip(sample["arguments"], sample["resps"], strict=True):
            value, greedy = journal[request_key(identity, "likelihoods", arguments)]
            assert value == pytest.approx(response[0][0], abs=2e-4) and greedy == response[0][1]
    for sample in samples["tiny_write"]:
        assert journal[request_key(identity, "generate", sample["arguments"][0])] == sample["resps"][0][0]
    warnings = " ".join(ours["tiny_choice"].warnings)
    assert "5 requests were longer than the model's 256 tokens" in warnings


@needs_harness
def test_a_killed_run_continues_and_gives_the_same_scores(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    place = data_folder(tmp_path / "d")
    run = a_run(place, "tiny_choice")
    forward = LanguageModel._forward
    calls: list[int] = []

    def counted(self: LanguageModel, inputs: Any, members: Any) -> list[Answer]:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, inputs, members)

    monkeypatch.setattr(LanguageModel, "_forward", counted)
    monkeypatch.setattr("qwen_quant.evaluation.language_model.BATCH_TOKENS", {"cpu": 300})
    with pytest.raises(KeyboardInterrupt):
        run_tasks(folder, run, "cpu", no_progress)
    calls.extend([0] * 10)
    seen = len(calls)
    second = run_tasks(folder, run, "cpu", no_progress)["tiny_choice"]
    resumed = len(calls) - seen
    seen = len(calls)
    whole = run_tasks(folder, a_run(place, "tiny_choice", work=tmp_path / "other"), "cpu", no_progress)["tiny_choice"]
    assert resumed == len(calls) - seen - 2
    assert second.item_ids == whole.item_ids and list(second.scores) == list(whole.scores)
    assert second.warnings == whole.warnings
    seen = len(calls)
    run_tasks(folder, run, "cpu", no_progress)
    assert len(calls) == seen


@needs_harness
def test_two_models_pair_on_the_same_items(folder: Path, tmp_path: Path) -> None:
    place = data_folder(tmp_path / "d")
    artifact = tmp_path / "int4"
    make_artifact(folder, artifact)
    labels: list[tuple[str, int, int]] = []
    run = a_run(place, "tiny_choice", "tiny_write", limit=8)
    first = run_tasks(folder, run, "cpu", lambda *step: labels.append(step))
    second = run_tasks(artifact, run, "cpu", no_progress)
    result = {row.task: row for row in pair_tasks(first, second, seed=1)}
    assert set(result) == {"tiny_choice", "tiny_write"} and result["tiny_choice"].items == 8
    assert result["tiny_choice"].shots == 0 and result["tiny_choice"].metric == "acc"
    done = [step for step in labels if step[0] == "tiny_choice"]
    assert done[0][1] == 0 and done[-1][1] == done[-1][2] > 0


@needs_harness
def test_a_group_names_its_missing_members_and_lists_subjects_if_asked(folder: Path, tmp_path: Path) -> None:
    place = data_folder(tmp_path / "d")
    got = run_tasks(folder, a_run(place, "tiny_group", limit=3), "cpu", no_progress)
    assert set(got) == {"tiny_group"} and len(got["tiny_group"].scores) == 3
    assert any("tiny_absent" in warning and "1 of 2" in warning for warning in got["tiny_group"].warnings)
    (place / "second.yaml").write_text(CHOICE.replace("tiny_choice", "tiny_second"))
    (place / "both.yaml").write_text("group: tiny_both\ntask: [tiny_choice, tiny_second]\n")
    got = run_tasks(folder, a_run(place, "tiny_both", limit=3, by_subject=True), "cpu", no_progress)
    assert list(got) == ["tiny_both", "tiny_choice", "tiny_second"]
    assert got["tiny_both"].item_ids == got["tiny_choice"].item_ids + got["tiny_second"].item_ids
    assert len(set(got["tiny_both"].item_ids)) == 6 and not got["tiny_both"].warnings


@needs_harness
def test_lower_is_better_is_turned_round(folder: Path, tmp_path: Path) -> None:
    place = data_folder(tmp_path / "d")
    got = run_tasks(folder, a_run(place, "tiny_write", "tiny_lower", limit=3), "cpu", no_progress)
    assert got["tiny_lower"].metric == "1 - exact_match"
    assert list(got["tiny_lower"].scores) == [1 - s for s in got["tiny_write"].scores]


@needs_harness
def test_changed_rows_are_read_again(folder: Path, tmp_path: Path) -> None:
    place = data_folder(tmp_path / "d")
    before = run_tasks(folder, a_run(place, "tiny_choice", limit=2), "cpu", no_progress)["tiny_choice"]
    changed = [dict(row, question="changed " + row["question"]) for row in rows()]
    (place / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    after = run_tasks(folder, a_run(place, "tiny_choice", limit=2), "cpu", no_progress)["tiny_choice"]
    assert not set(before.item_ids) & set(after.item_ids)
    with pytest.raises(InputError, match="same items"):
        pair_tasks({"t": before}, {"t": after}, seed=0)


@needs_harness
def test_errors_say_what_to_do(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import lm_eval.tasks as harness

    place = data_folder(tmp_path / "d")
    small = harness.TaskManager(include_defaults=False, include_path=[place])
    monkeypatch.setattr(tasks, "_whole_catalog", lambda paths: small)

    def fails(*names: str, **changes: Any) -> str:
        with pytest.raises(QwenQuantError) as caught:
            run_tasks(folder, a_run(place, *names, **changes), "cpu", no_progress)
        error = caught.value
        return f"{error} {error.next_step}"

    assert "did you mean tiny_choice" in fails("tiny_chioce")
    assert "did you mean mmlu" in fails("mmul")
    assert "absent.jsonl" in fails("tiny_absent")
    assert "openai/gsm8k" in (text := fails("gsm8k")) and str(place / "openai/gsm8k") in text and "--data-dir" in text
    assert "--allow-code-execution" in fails("humaneval")
    assert "--allow-code-execution" in fails(preset="qwen-base")
    assert "no task to run" in fails()
    assert "not a folder" in fails("tiny_choice", tasks_dirs=(place / "none",))
    assert "--limit" in fails("tiny_choice", limit=0)
    (place / "bad.yaml").write_text(CHOICE.replace("tiny_choice", "tiny_bad") + "no_such_key: 1\n")
    assert "bad.yaml" in fails("tiny_bad")
    sampled = WRITE.replace("tiny_write", "tiny_sampled").replace(
        "do_sample: false, temperature: 0.0", "do_sample: true"
    )
    (place / "sampled.yaml").write_text(sampled, encoding="utf-8")
    assert "sampled answers" in fails("tiny_sampled")


def test_without_the_extra_the_error_names_it(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as caught:
        run_tasks(folder, a_run(data_folder(tmp_path / "d"), "tiny_choice"), "cpu", no_progress)
    assert "qwen-quant[eval]" in caught.value.next_step


@needs_harness
def test_a_model_without_chat_template_cannot_take_the_chat_preset(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    place = data_folder(tmp_path / "d")
    gsm8k = place / "hub" / "openai" / "gsm8k"
    gsm8k.mkdir(parents=True)
    card = (
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: rows.jsonl}\n"
        "  - {split: test, path: rows.jsonl}\n---\n"
    )
    (gsm8k / "README.md").write_text(card)
    (gsm8k / "rows.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": "#### 4"}\n'
    )
    run = a_run(place, preset="chat-gsm8k")
    preset = {"chat-gsm8k": tuple(t for t in presets.PRESETS["qwen-chat"] if t.name == "gsm8k")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", preset)
        patch.setattr("qwen_quant.evaluation.task_catalog.PRESETS", preset)
        patch.setitem(presets.GSM8K_CHAT["generation_kwargs"], "max_gen_toks", 8)
        with pytest.raises(InputError, match="no chat template"):
            run_tasks(bare, run, "cpu", no_progress)
        got = run_tasks(folder, run, "cpu", no_progress)["gsm8k"]
    assert len(got.scores) == 2 and got.metric == "acc" and got.shots == 0
    asked = (place / "work" / tasks.JOURNAL_FILE).read_text()
    assert asked.count("\n") == 2


@needs_harness
def test_short_names_are_in_the_catalog() -> None:
    import lm_eval.tasks as harness

    root = Path(harness.__file__).parent
    own = Path(presets.__file__).parents[1] / "tasks"
    manager = harness.TaskManager(include_defaults=False, include_path=[*(root / f for f in BENCHMARK_FOLDERS), own])
    wanted = {leaf for leaves in presets.SHORT_NAMES.values() for leaf in leaves}
    wanted |= {leaf for members in presets.PRESETS.values() for task in members for leaf in task.tasks}
    assert wanted <= set(manager.task_index)
