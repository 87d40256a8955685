"""Benchmarks by short name, and the sets of them that the Qwen cards report, with their shots, prompts and scoring.

A preset gives both models the prompts and the scoring rule of the published figures. It does not promise the published
figures themselves: each task's `note` says where it is known to differ. Source of all of them:
QwenLM/Qwen eval/*.py at commit 2df8e8ac450fa185c421a08b0090ef81826caa6e.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_quant.evaluation.choices import LETTERS, ceval_choice, mmlu_choice
from qwen_quant.evaluation.scoring import gsm8k_base_is_right, gsm8k_chat_is_right

Row = Mapping[str, Any]
_MATH_TYPES = (
    "algebra",
    "counting_and_prob",
    "geometry",
    "intermediate_algebra",
    "num_theory",
    "prealgebra",
    "precalc",
)
# Short name -> names in lm-eval or in qwen_quant/tasks.
SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "mmlu": ("mmlu",),
    "ceval": ("ceval-valid",),
    "cmmlu": ("cmmlu",),
    "gsm8k": ("gsm8k",),
    "humaneval": ("qq_humaneval",),
    "mbpp": ("qq_mbpp",),
    "bbh": ("bbh_cot_fewshot",),
    "vcsum": ("qq_vcsum",),
    "tool_use": ("qq_tool_react_positive", "qq_tool_react_negative"),
    "code_interpreter": ("qq_code_interpreter",),
    "math": tuple(f"minerva_math_{kind}" for kind in _MATH_TYPES),
}
# Which of a stock task's answers is scored, (metric, filter), where lm-eval's first one is not the usual figure.
STOCK_SCORES: dict[str, tuple[str, str]] = {"gsm8k": ("exact_match", "flexible-extract")}
_GENERATE = {"do_sample": False, "max_gen_toks": 512}
_QWEN_EVAL = "QwenLM/Qwen eval/"


@dataclass(frozen=True)
class PresetTask:
    """One benchmark of a preset.

    Attributes:
        name: a key of SHORT_NAMES. tasks: other lm-eval tasks than that name stands for (empty: those).
        shots: worked examples in the prompt. chat: the prompt goes through the model's chat template.
        note: how it is scored, and where that differs from the published figure. source: where the protocol is from.
        settings: lm-eval task settings that replace the stock ones.
        metric, filter: which of the task's scores is taken ("": its first).
    """

    name: str
    shots: int
    note: str
    source: str
    tasks: tuple[str, ...] = ()
    chat: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""
    filter: str = ""


def _score(right: bool) -> dict[str, float]:
    """One item's score in the form of lm-eval's process_results."""
    return {"acc": float(right)}


def score_mmlu_chat(row: Row, replies: list[str]) -> dict[str, float]:
    """1 where the letter read out of the reply is MMLU's answer (`answer` is an index into `choices`)."""
    options = dict(zip(LETTERS, row["choices"], strict=True))
    return _score(mmlu_choice(replies[0], options) == LETTERS[row["answer"]])


def score_ceval_chat(row: Row, replies: list[str]) -> dict[str, float]:
    """1 where the letter read out of the reply is C-Eval's `answer`."""
    options = {letter: row[letter] for letter in LETTERS}
    return _score(ceval_choice(replies[0], row["question"], options) == row["answer"])


def score_gsm8k_base(row: Row, replies: list[str]) -> dict[str, float]:
    """1 where the last run of digits of the reply equals the marked answer."""
    return _score(gsm8k_base_is_right(replies[0], row["answer"]))


def score_gsm8k_chat(row: Row, replies: list[str]) -> dict[str, float]:
    """1 where the last number of the reply equals the last number of the solution."""
    return _score(gsm8k_chat_is_right(replies[0], row["answer"]))


def _reply(doc_to_text: str, score: Callable[[Row, list[str]], dict[str, float]], until: list[str]) -> dict[str, Any]:
    """Settings of a task that is answered in free text and scored by `score`."""
    return {
        "output_type": "generate_until",
        "doc_to_text": doc_to_text,
        "description": "",
        "process_results": score,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": None,
        "generation_kwargs": {**_GENERATE, "until": until},
    }


_MMLU_OPTIONS = "A. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\n"
_OPTIONS = "A. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n"
MMLU_BASE = {"doc_to_text": "Question: {{question}}\n" + _MMLU_OPTIONS + "Answer:"}
CEVAL_BASE = {"doc_to_text": "问题：{{question}}\n" + _OPTIONS + "答案：", "description": "", "target_delimiter": ""}
CMMLU_BASE = {**CEVAL_BASE, "doc_to_text": "问题：{{Question}}\n" + _OPTIONS + "答案："}
GSM8K_BASE = {
    **_reply("Question: {{question}}\nLet's think step by step\n", score_gsm8k_base, ["\n\n", "Question:"]),
    "target_delimiter": "",
}
MMLU_CHAT = _reply(
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
    "answer to this question.\n\n{{question}}\n" + _MMLU_OPTIONS,
    score_mmlu_chat,
    [],
)
CEVAL_CHAT = _reply("{{question}}\n\n" + _OPTIONS, score_ceval_chat, [])
GSM8K_CHAT = _reply("{{question}}", score_gsm8k_chat, [])

_POOLED = "items of all subjects pooled"
_PASS_AT_1 = "pass@1, greedy, run against the data set's tests"
_BASE = (
    PresetTask(
        "mmlu",
        5,
        f"the most likely of ' A' to ' D' after 'Answer:'; {_POOLED}",
        _QWEN_EVAL + "evaluate_mmlu.py",
        settings=MMLU_BASE,
        metric="acc",
    ),
    PresetTask(
        "ceval",
        5,
        f"the most likely of 'A' to 'D' after '答案：', validation split; {_POOLED} (the cards average over subjects)",
        _QWEN_EVAL + "evaluate_ceval.py",
        settings=CEVAL_BASE,
        metric="acc",
    ),
    PresetTask(
        "cmmlu",
        5,
        f"the most likely of 'A' to 'D' after '答案：'; {_POOLED} (the cards average over subjects)",
        _QWEN_EVAL + "evaluate_cmmlu.py",
        settings=CMMLU_BASE,
        metric="acc",
    ),
    PresetTask(
        "gsm8k",
        8,
        "the last integer of the reply (signs, points and thousands separators ignored, as in the original); the eight "
        "worked examples are lm-eval's gsm8k_cot ones, not Qwen's own prompt file",
        _QWEN_EVAL + "evaluate_gsm8k.py",
        tasks=("gsm8k_cot",),
        settings=GSM8K_BASE,
        metric="acc",
    ),
    PresetTask(
        "math",
        4,
        "Minerva's four examples and its symbolic comparison of the final answer; items of the seven types pooled",
        "lm-eval minerva_math",
        metric="exact_match",
    ),
    PresetTask("humaneval", 0, _PASS_AT_1, _QWEN_EVAL + "evaluate_humaneval.py"),
    PresetTask("mbpp", 3, _PASS_AT_1, "lm-eval mbpp"),
    PresetTask(
        "bbh",
        3,
        f"chain of thought; exact match of what follows 'the answer is'; {_POOLED}",
        "lm-eval bbh_cot_fewshot",
        metric="exact_match",
    ),
)
_CHAT = (
    PresetTask(
        "mmlu",
        0,
        f"the letter read out of a free reply; {_POOLED}",
        _QWEN_EVAL + "evaluate_chat_mmlu.py",
        chat=True,
        settings=MMLU_CHAT,
        metric="acc",
    ),
    PresetTask(
        "ceval",
        0,
        f"the letter read out of a free reply, validation split; {_POOLED} (the cards average over subjects)",
        _QWEN_EVAL + "evaluate_chat_ceval.py",
        chat=True,
        settings=CEVAL_CHAT,
        metric="acc",
    ),
    PresetTask(
        "gsm8k",
        0,
        "the last number of a free reply equals the solution's",
        _QWEN_EVAL + "evaluate_chat_gsm8k.py",
        chat=True,
        settings=GSM8K_CHAT,
        metric="acc",
    ),
    PresetTask(
        "humaneval",
        0,
        _PASS_AT_1,
        _QWEN_EVAL + "evaluate_chat_humaneval.py",
        tasks=("qq_humaneval_chat",),
        chat=True,
    ),
)
PRESETS: dict[str, tuple[PresetTask, ...]] = {"qwen-base": _BASE, "qwen-chat": _CHAT}
