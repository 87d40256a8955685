"""Questions about a table that the model answers by writing Python (InfiAgent DABench, closed form).

The model gets the question, the constraints, the answer format and the table's name, and writes one program; the
sandbox runs it with the table beside it, and the answers it prints as @name[value] are compared with the labels as
DABench's eval_closed_form.py compares them.  DABench lets an agent see outputs and try again and has another model
rewrite the answer; here there is one program and no second look, so scores are not comparable with DABench's.

`executable_rate` is the share of programs that run to their end (the first-generation Qwen cards' first number for
their own set), `accuracy` the share of questions with every answer right, `accuracy_by_sub_question` the mean share
of right answers. The data (CC BY-NC 4.0) is read where it lies and never copied into this package.
"""

from __future__ import annotations

import json
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.evaluation import scoring
from qwen_quant.evaluation.sandbox import SandboxLimits, SandboxResult, run_code
from qwen_quant.tasks.rows import Row, as_splits, data_file, read_rows, require_code_execution, with_fields

QUESTIONS, LABELS, TABLES = "codeinterp/dabench_questions.jsonl", "codeinterp/dabench_labels.jsonl", "codeinterp/tables"
FIELDS = ("id", "question", "constraints", "format", "file_name")
LIMITS = SandboxLimits(wall_seconds=180, cpu_seconds=45, memory_bytes=4 << 30)


def questions(**_: Any) -> dict[str, Any]:
    """Questions with their labels (JSON text of name -> value), as split `test`."""
    require_code_execution("qq_code_interpreter")
    path = data_file(QUESTIONS)
    labels = {row["id"]: dict(row["common_answers"]) for row in read_rows(data_file(LABELS))}
    rows = with_fields(read_rows(path), FIELDS, path)
    for row in rows:
        if row["id"] not in labels:
            raise InputError(f"{path}: question {row['id']} has no label", next_step="replace dabench_labels.jsonl")
        row["labels"] = json.dumps(labels[row["id"]])
        data_file(f"{TABLES}/{row['file_name']}")  # missing tables are found before the model runs
    return as_splits(test=rows)


def prompt(doc: Row) -> str:
    """The request for one program."""
    return (
        f"Write one Python program that answers a question about the table in the file `{doc['file_name']}` (in the "
        "current directory; pandas, numpy, scipy and scikit-learn are installed). The program must print the answer in "
        "exactly the format given. Reply with the program in a single ```python block and nothing else.\n\n"
        f"Question: {doc['question']}\n\nConstraints: {doc['constraints']}\n\nAnswer format: {doc['format']}\n"
    )


def run_answer(doc: Row, code: str) -> SandboxResult:
    """Runs a program beside the question's table (InputError unless that is allowed)."""
    require_code_execution("qq_code_interpreter")
    return run_code(code, limits=LIMITS, files=[data_file(f"{TABLES}/{doc['file_name']}")])


def score(doc: Row, results: list[str]) -> dict[str, float]:
    """Executable, every answer right, share of answers right."""
    result = run_answer(doc, scoring.code_block(results[0]))
    passed = result.status == "passed"
    share = scoring.answers_right(result.stdout, json.loads(doc["labels"])) if passed else 0.0
    return {
        "executable_rate": float(passed),
        "accuracy": float(share == 1.0),
        "accuracy_by_sub_question": share,
    }
