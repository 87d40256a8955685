"""Our task files: rows, refusals and scores on rows of our own, and (where lm-eval is installed) the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.errors import InputError
from qwen_quant.evaluation.sandbox import SandboxLimits
from qwen_quant.tasks import FOLDER, code_interpreter, coding, rows, summary, tool_use

# Written for this test; the layout is that of the data sets.
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """ Twice x.\n    >>> double(2)\n    4\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_list": [f"assert add({i}) == {i + number}" for i in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 5, 11)
]
TOOL = {
    "id": "p0",
    "prompt": "Question: 天气?",
    "response": 'Thought: t\nAction: w\nAction Input: {"c": 1}\nObservation: ',
}
QUESTION = {
    "id": 7,
    "question": "How many rows?",
    "constraints": "None.",
    "format": "@rows[n] and @name[text]",
    "file_name": "t.csv",
    "concepts": [],
    "level": "easy",
}
FILES: dict[str, list[dict[str, Any]]] = {
    "hub/openai/openai_humaneval/test.jsonl": [HUMANEVAL],
    "hub/google-research-datasets/mbpp/test.jsonl": MBPP[5:],
    "hub/google-research-datasets/mbpp/prompt.jsonl": MBPP[:5],
    "hub/Xnhyacinth/LongBench/vcsum.jsonl": [{"context": "会议", "answers": ["会议总结"], "_id": "a", "length": 2}],
    "tooluse/react_zh_positive.jsonl": [TOOL],
    "tooluse/react_zh_negative.jsonl": [{"id": "n0", "prompt": "Question: 无?", "response": ""}],
    "codeinterp/dabench_questions.jsonl": [QUESTION],
    "codeinterp/dabench_labels.jsonl": [{"id": 7, "common_answers": [["rows", "2"], ["name", "a"]]}],
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one row or so of each set, and code execution allowed."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    (tmp_path / "codeinterp" / "tables").mkdir()
    (tmp_path / "codeinterp" / "tables" / "t.csv").write_text("name\na\nb\n")
    monkeypatch.setenv(rows.DATA_DIR, str(tmp_path))
    monkeypatch.setenv(rows.ALLOW_CODE_EXECUTION, "1")
    monkeypatch.delenv(rows.TOKENIZER_DIR, raising=False)
    return tmp_path


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.DATA_DIR, str(tmp_path))
    with pytest.raises(InputError, match="vcsum.jsonl is not there"):
        summary.vcsum()


def test_the_data_folder_may_be_the_hub_folder_or_the_current_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.DATA_DIR, str(data / "hub"))
    assert rows.data_file(summary.FILE) == data / summary.FILE
    assert rows.data_file("codeinterp/tables") == data / "codeinterp" / "tables"
    monkeypatch.delenv(rows.DATA_DIR)
    monkeypatch.chdir(data)
    assert rows.data_file(summary.FILE) == data / summary.FILE


def test_damaged_files_are_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content, message in (("{}\n{", "line 2 is not JSON"), ("[1]\n", "not a JSON object"), ("\n", "has no rows")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            rows.read_rows(path)
    with pytest.raises(InputError, match="row 1 has no field text"):
        rows.with_fields([{"id": 1}], ("id", "text"), path)


@pytest.mark.parametrize("load", [coding.humaneval, coding.mbpp, code_interpreter.questions])
def test_code_tasks_refuse_to_start_without_permission(load: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.ALLOW_CODE_EXECUTION, "0")
    with pytest.raises(InputError, match="executes code") as caught:
        load()
    assert "--allow-code-execution" in caught.value.next_step


@pytest.mark.parametrize(
    ("score", "doc"),
    [(coding.score_humaneval, HUMANEVAL), (coding.score_mbpp, MBPP[5]), (code_interpreter.score, QUESTION)],
)
def test_scoring_refuses_without_permission_too(
    score: Any, doc: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(rows.ALLOW_CODE_EXECUTION)
    with pytest.raises(InputError, match="executes code"):
        score(doc | {"labels": "{}"}, ["print(1)"])


def test_humaneval_scores(data: Path) -> None:
    answers = {"    return 2 * x\n": 1.0, "    return x + 2\n": 0.0, "    import sys; sys.exit(0)\n": 0.0, "": 0.0}
    for answer, expected in answers.items():
        assert coding.score_humaneval(HUMANEVAL, [answer]) == {"pass@1": expected}, answer


def test_humaneval_chat_asks_and_reads_as_qwen_does(data: Path) -> None:
    assert coding.humaneval_chat_prompt(HUMANEVAL) == (
        "Write a Python function `double(x: int) -> int` to solve the following problem:\n"
        "Twice x.\n>>> double(2)\n4\n\n" + str(HUMANEVAL["prompt"])
    )
    reply = "Here:\n```python\ndef double(x):\n    return x + x\n```\nDone"
    assert coding.score_humaneval_chat(HUMANEVAL, [reply]) == {"pass@1": 1.0}


def test_mbpp_scores(data: Path) -> None:
    row = MBPP[5]
    assert coding.score_mbpp(row, [row["code"] + "\n"]) == {"pass@1": 1.0}
    assert coding.score_mbpp(row, ["def add(x):\n  return x"]) == {"pass@1": 0.0}
    assert coding.score_mbpp_chat(row, [f"```python\n{row['code']}\n```"]) == {"pass@1": 1.0}
    demonstration = f"{row['code']}\nif __name__ == '__main__':\n  raise SystemExit"
    assert coding.score_mbpp(row, [demonstration]) == {"pass@1": 1.0}
    needy = row | {"test_setup_code": "zero = 0", "test_list": ["assert add(zero) == 11"]}
    assert coding.score_mbpp(needy, [row["code"]]) == {"pass@1": 1.0}


def test_code_interpreter_scores(data: Path) -> None:
    doc = QUESTION | {"labels": json.dumps({"rows": "2", "name": "a"})}
    program = "lines = open('t.csv').read().split()\nprint(f'@rows[{len(lines) - 1}.0]', f'@name[{lines[1]}]')"
    fenced = f"```python\n{program}\n```"
    full = {"executable_rate": 1.0, "accuracy": 1.0, "accuracy_by_sub_question": 1.0}
    assert code_interpreter.score(doc, [fenced]) == full
    half = code_interpreter.score(doc, ["print('@rows[2]')"])
    assert half == {"executable_rate": 1.0, "accuracy": 0.0, "accuracy_by_sub_question": 0.5}
    broken = code_interpreter.score(doc, ["print('@rows[2] @name[a]')\n1 / 0"])
    assert broken == {"executable_rate": 0.0, "accuracy": 0.0, "accuracy_by_sub_question": 0.0}


def test_pandas_fits_into_the_code_interpreters_limits(data: Path) -> None:
    pytest.importorskip("pandas")
    result = code_interpreter.run_answer(QUESTION, "import pandas\nprint(len(pandas.read_csv('t.csv')))")
    assert (result.status, result.stdout) == ("passed", "2\n"), result
    assert isinstance(code_interpreter.LIMITS, SandboxLimits)


def test_vcsum_and_tool_use_scores(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert summary.score_vcsum({"answers": ["会议总结"]}, ["会议总结"]) == {"rouge_l": 1.0}
    tool_use._warn_of_other_tokens.cache_clear()
    right = tool_use.score_positive(TOOL, [TOOL["response"]])
    assert right == {"action_right_rate": 1.0, "action_input_rouge": 1.0}
    assert "QWEN_QUANT_TOKENIZER_DIR is not set" in caplog.text
    assert tool_use.score_negative({}, ["Thought: x\nAction: w\n"]) == {"false_positive_rate": 1.0}
    assert tool_use.score_negative({}, ["Final Answer: x"]) == {"false_positive_rate": 0.0}


def test_tool_use_counts_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pieces:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    monkeypatch.setattr(rows, "_tokenizer", lambda folder: Pieces())
    monkeypatch.setenv(rows.TOKENIZER_DIR, "anywhere")
    assert tool_use.tokens('{"a": 12}') == list('{"a":12}')


ANSWERS = {
    "qq_humaneval": lambda doc: doc["canonical_solution"],
    "qq_humaneval_chat": lambda doc: f"```python\n{doc['prompt']}{doc['canonical_solution']}```",
    "qq_mbpp": lambda doc: doc["code"] + "\n",
    "qq_mbpp_chat": lambda doc: f"```python\n{doc['code']}\n```",
    "qq_vcsum": lambda doc: doc["answers"][0],
    "qq_tool_react_positive": lambda doc: doc["response"],
    "qq_tool_react_negative": lambda doc: "Thought: none fits\nFinal Answer: no",
    "qq_code_interpreter": lambda doc: "```python\nprint('@rows[2] @name[a]')\n```",
}


def test_every_task_file_is_tested() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == set(ANSWERS) | {"qq_tool_react"}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_harness_runs_the_task(name: str, data: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (extra eval)")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    prompts: list[str] = []
    stops: list[list[str]] = []

    class Canned(LM):  # type: ignore[misc]
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            prompts.extend(request.args[0] for request in requests)
            stops.extend(request.args[1]["until"] for request in requests)
            return [ANSWERS[name](request.doc) for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model=Canned(), tasks=[name], task_manager=manager, bootstrap_iters=0, confirm_run_unsafe_code=True
    )
    scores = {key.split(",")[0]: value for key, value in result["results"][name].items() if key.endswith(",none")}
    expected = 0.0 if name == "qq_tool_react_negative" else 1.0
    assert {key: value for key, value in scores.items() if "stderr" not in key}.values()
    assert all(value == expected for key, value in scores.items() if "stderr" not in key), scores
    assert ("Observation:" in stops[0]) is name.startswith("qq_tool_react")
    if name == "qq_mbpp":  # three shots, then the question
        assert [prompts[0].index(f"adds {number}.") for number in (2, 3, 4, 11)] == sorted(
            prompts[0].index(f"adds {number}.") for number in (2, 3, 4, 11)
        )
        assert prompts[0].count("[DONE]") == 3 and "adds 1." not in prompts[0] and prompts[0].endswith("[BEGIN]\n")
