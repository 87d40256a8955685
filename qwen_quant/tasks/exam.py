"""GSM8K, MMLU and C-Eval as the first-generation Qwen chat cards report them: zero-shot, the answer read from a free response.

Questions are those of Qwen's evaluate_chat_gsm8k.py, evaluate_chat_mmlu.py and evaluate_chat_ceval.py, and so is the reading of the
responses (`scoring.py`, `choices.py`).  MMLU and C-Eval rows go through the subjects in turn (first row of each, second row
of each, ...), so that a limit takes a like share of every subject; the scripts average C-Eval over subjects, here over rows.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from qwen_quant.evaluation import choices, scoring
from qwen_quant.tasks.rows import Row, as_splits, data_file, read_rows, with_fields

GSM8K_FILE = "hub/openai/gsm8k/test.jsonl"
MMLU_FOLDER, CEVAL_FOLDER = "hub/cais/mmlu", "hub/ceval/ceval-exam"


def gsm8k(**_: Any) -> dict[str, Any]:
    """GSM8K's rows as split `test`."""
    path = data_file(GSM8K_FILE)
    return as_splits(test=with_fields(read_rows(path), ("question", "answer"), path))


def score_gsm8k(doc: Row, results: list[str]) -> dict[str, float]:
    """Whether the last number of the response is the answer's."""
    return {"exact_match": float(scoring.gsm8k_chat_is_right(results[0], doc["answer"]))}


def _in_turn(folder: str, split: str, fields: tuple[str, ...]) -> list[Row]:
    """Rows of every subject's file, one subject after the other, with the subject's name."""
    subjects = []
    for path in sorted(data_file(folder).glob(f"*/{split}.jsonl")) or [data_file(f"{folder}/SUBJECT/{split}.jsonl")]:
        rows = with_fields(read_rows(path), fields, path)
        subjects.append([row | {"subject": path.parent.name} for row in rows])
    return [row for turn in zip_longest(*subjects) for row in turn if row is not None]


def mmlu(**_: Any) -> dict[str, Any]:
    """MMLU's test rows of all subjects found, as split `test`."""
    rows = _in_turn(MMLU_FOLDER, "test", ("question", "choices", "answer"))
    lettered = [row | dict(zip(choices.LETTERS, row["choices"], strict=True)) for row in rows]
    return as_splits(test=[row | {"answer": choices.LETTERS[row["answer"]]} for row in lettered])


def ceval(**_: Any) -> dict[str, Any]:
    """C-Eval's validation rows of all subjects found, as split `test`."""
    return as_splits(test=_in_turn(CEVAL_FOLDER, "val", ("question", *choices.LETTERS, "answer")))


def _options(doc: Row) -> dict[str, str]:
    return {letter: doc[letter] for letter in choices.LETTERS}


def _lines(doc: Row) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in _options(doc).items())


def mmlu_prompt(doc: Row) -> str:
    """The English question."""
    ask = "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the answer"
    return f"{ask} to this question.\n\n{doc['question']}\n{_lines(doc)}"


def ceval_prompt(doc: Row) -> str:
    """The Chinese question, with no instruction."""
    return f"{doc['question']}\n\n{_lines(doc)}"


def score_mmlu(doc: Row, results: list[str]) -> dict[str, float]:
    """Whether the chosen letter is the answer's."""
    return {"acc": float(choices.mmlu_choice(results[0], _options(doc)) == doc["answer"])}


def score_ceval(doc: Row, results: list[str]) -> dict[str, float]:
    """Whether the chosen letter is the answer's."""
    return {"acc": float(choices.ceval_choice(results[0], doc["question"], _options(doc)) == doc["answer"])}
