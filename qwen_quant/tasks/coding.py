"""HumanEval and MBPP: prompts and shots of the harness's own tasks, scored in our sandbox; pass@1 of one greedy answer.

The stock tasks score with `evaluate.load("code_eval")`, a script that has to be fetched and that runs code with no
more than a time limit.  Ours differ from it in the limits (60 s wall, 10 s CPU, 2 GiB) and in one rule: code that
ends its process before the tests have run fails.  MBPP rows with set-up code get it (the stock task leaves it out).
"""

from __future__ import annotations

import re
from typing import Any

from qwen_quant.evaluation import scoring
from qwen_quant.evaluation.sandbox import SandboxLimits, run_code
from qwen_quant.tasks.rows import Row, as_splits, data_file, read_rows, require_code_execution, with_fields

HUMANEVAL_FILE = "hub/openai/openai_humaneval/test.jsonl"
MBPP_FILE = "hub/google-research-datasets/mbpp/{split}.jsonl"
HUMANEVAL_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
MBPP_FIELDS = ("task_id", "text", "code", "test_list", "test_setup_code")
SHOT_IDS = (2, 3, 4)  # of MBPP's ten prompt rows, the stock task's three


def _pass_at_1(program: str) -> dict[str, float]:
    require_code_execution("pass@1")  # here too: where it runs is where permission counts
    # Not "__main__": a chat model's demonstration under `if __name__ == "__main__"` is not part of the answer.
    result = run_code(program, limits=SandboxLimits(), module_name="solution")
    return {"pass@1": float(result.status == "passed")}


def humaneval(**_: Any) -> dict[str, Any]:
    """HumanEval's rows as split `test`."""
    require_code_execution("humaneval")
    path = data_file(HUMANEVAL_FILE)
    return as_splits(test=with_fields(read_rows(path), HUMANEVAL_FIELDS, path))


def score_humaneval(doc: Row, results: list[str]) -> dict[str, float]:
    """pass@1 of a continuation of the prompt."""
    return _pass_at_1(scoring.humaneval_program(doc["prompt"], results[0], doc["test"], doc["entry_point"]))


def humaneval_chat_prompt(doc: Row) -> str:
    """The question of Qwen's evaluate_chat_humaneval.py: signature, first docstring, prompt."""
    signature = re.search(rf"def\s+({re.escape(doc['entry_point'])}.*?):\s*\n", doc["prompt"])
    docstring = re.search(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", doc["prompt"], re.DOTALL)
    description = "\n".join(line.strip() for line in docstring[1].split("\n")) if docstring else ""
    name = signature[1] if signature else doc["entry_point"]
    return f"Write a Python function `{name}` to solve the following problem:\n{description}\n{doc['prompt']}"


def score_humaneval_chat(doc: Row, results: list[str]) -> dict[str, float]:
    """pass@1 of the function body in a chat model's response."""
    body = scoring.humaneval_body(results[0], doc["entry_point"])
    return _pass_at_1(scoring.humaneval_program(doc["prompt"], body, doc["test"], doc["entry_point"]))


def mbpp(**_: Any) -> dict[str, Any]:
    """MBPP's rows as split `test`; the shots as split `prompt`, in the stock task's order."""
    require_code_execution("mbpp")
    paths = {split: data_file(MBPP_FILE.format(split=split)) for split in ("test", "prompt")}
    rows = {split: with_fields(read_rows(path), MBPP_FIELDS, path) for split, path in paths.items()}
    shots = [row for row in rows["prompt"] if row["task_id"] in SHOT_IDS]
    return as_splits(test=rows["test"], prompt=shots)


def mbpp_program(doc: Row, code: str) -> str:
    """The code with the row's first three tests, as the prompt shows them."""
    return scoring.mbpp_program(code, doc["test_setup_code"] or "", doc["test_list"][:3])


def score_mbpp(doc: Row, results: list[str]) -> dict[str, float]:
    """pass@1 of a continuation of the prompt."""
    return _pass_at_1(mbpp_program(doc, results[0]))


def score_mbpp_chat(doc: Row, results: list[str]) -> dict[str, float]:
    """pass@1 of the first fenced block of a chat model's response."""
    return _pass_at_1(mbpp_program(doc, scoring.code_block(results[0])))
