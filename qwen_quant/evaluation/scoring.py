"""Pure scoring functions: text in, numbers out.

They follow the evaluation scripts of first-generation Qwen (github.com/QwenLM/Qwen, folder eval/, commit 2df8e8a) where
it has one, quirks included, so that a score here means what it means on the model cards; each function says which.
Multiple choice is in `choices.py`.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from qwen_quant.evaluation import json5

Tokenize = Callable[[str], Sequence[Hashable]]
# Han characters and their extensions, kana, and the punctuation written with them: each is a word for ROUGE.
_MIXED = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3040-\u30ff]|[^\W_]+|[^\w\s]|_", re.UNICODE)
_CJK = re.compile(r"([\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3040-\u30ff])")


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L: a longest common subsequence as precision, recall and their harmonic mean, each in [0, 1]."""

    precision: float
    recall: float
    fmeasure: float


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of a longest common subsequence.

    One big integer holds a row of the dynamic programme, a zero bit where the row rises (Hyyro 2004, "Bit-parallel
    LCS-length computation revisited"), so n x m costs m additions of n-bit numbers.
    """
    positions: dict[Hashable, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge_l(reference: Sequence[Hashable], generated: Sequence[Hashable]) -> RougeL:
    """ROUGE-L of token sequences (Lin 2004, with beta = 1 as in the rouge_score package); all 0 when one is empty."""
    common = lcs_length(reference, generated)
    if not common:
        return RougeL(0.0, 0.0, 0.0)
    precision, recall = common / len(generated), common / len(reference)
    return RougeL(precision, recall, 2 * precision * recall / (precision + recall))


def mixed_tokens(text: str) -> list[str]:
    """Each Chinese or Japanese character, each run of other letters and digits, and each punctuation mark is a token.

    Case is kept and nothing is stemmed.  It needs no segmenter: where LongBench cuts Chinese with jieba first, a word
    of two characters weighs one there and two here, so the scores are not comparable with LongBench's.
    """
    return _MIXED.findall(_CJK.sub(r" \1 ", text))


def summary_rouge_l(references: Sequence[str], generated: str) -> float:
    """The best ROUGE-L F-measure over the references (mixed tokens): LongBench's rule with characters for words."""
    tokens = mixed_tokens(generated)
    return max((rouge_l(mixed_tokens(reference), tokens).fmeasure for reference in references), default=0.0)


@dataclass(frozen=True)
class ReActCall:
    """A tool call in ReAct text.

    Args:
        action: what stands between the first "Action:" and the first "Action Input:", stripped.
        action_input: what follows up to "Observation:", as JSON with sorted keys; empty when it is not JSON5.
    """

    action: str
    action_input: str


def parse_react(response: str) -> ReActCall:
    """The first tool call of a response, cut as Qwen's evaluate_plugin.py cuts it; empty where a mark is missing.

    (That script slices with -1 for a missing mark; what is left is neither JSON nor a tool's name and scores nothing.)
    """
    _, found, rest = response.partition("Action:")
    action, has_input, _ = rest.partition("Action Input:")
    given = response.partition("Action Input:")[2].partition("Observation:")[0].strip()
    try:
        action_input = json.dumps(json5.loads(given), ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        action_input = ""
    return ReActCall(action.strip() if found and has_input else "", action_input)


def calls_a_tool(response: str) -> bool:
    """Whether a response takes an action: evaluate_plugin.py counts it as a false positive where no tool fits."""
    return "\nAction: " in response


def action_is_right(response: str, gold: str) -> bool:
    """Whether a response calls the gold response's tool (case ignored): `action_right_rate` of evaluate_plugin.py."""
    return calls_a_tool(response) and parse_react(response).action.lower() == parse_react(gold).action.lower()


def action_input_rouge_l(response: str, gold: str, tokenize: Tokenize = mixed_tokens) -> float:
    """ROUGE-L F-measure of the action inputs as normalised JSON: `action_input_rouge` of evaluate_plugin.py.

    That script cuts with the model's own tokenizer; give `tokenize` for it (see `model_tokens`).
    """
    return rouge_l(tokenize(parse_react(gold).action_input), tokenize(parse_react(response).action_input)).fmeasure


def model_tokens(pieces: Sequence[str]) -> list[str]:
    """Decoded tokens as evaluate_plugin.py scores them: joined by blanks and split at white space."""
    return " ".join(pieces).split()


_CHAT_NUMBER = re.compile(r"[+-]?(?=\.?\d)(?:[1-9]\d{0,2}(?:,\d{3})+|\d*)(?:\.\d*)?(?!\d)")
_GOLD_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def _python_number(text: str) -> float | None:
    """What Python reads `text` as; like Python it refuses 007."""
    if re.fullmatch(r"[+-]?0+[1-9]\d*", text):
        return None
    try:
        return float(text)
    except ValueError:
        return None


def gsm8k_chat_number(text: str) -> str | None:
    """The last number of a text, thousands separators and plus signs removed: evaluate_chat_gsm8k.py."""
    found = [match.group() for match in _CHAT_NUMBER.finditer(text)]
    return found[-1].replace(",", "").replace("+", "") if found else None


def gsm8k_chat_is_right(completion: str, answer: str) -> bool:
    """Whether the last number equals the answer's last number to 1e-4: evaluate_chat_gsm8k.py."""
    given, expected = (_python_number(gsm8k_chat_number(text) or "") for text in (completion, answer))
    return given is not None and expected is not None and math.isclose(given, expected, rel_tol=0, abs_tol=1e-4)


def gsm8k_base_number(completion: str) -> int | None:
    """The last run of digits, so without sign, fraction and thousands: evaluate_gsm8k.py."""
    digits = re.findall(r"\d+", completion)
    number = _python_number(digits[-1]) if digits else None
    return None if number is None else int(digits[-1])


def gsm8k_base_is_right(completion: str, answer: str) -> bool:
    """Whether the last run of digits is the number after "####" in the answer: evaluate_gsm8k.py."""
    gold = _GOLD_NUMBER.search(answer)
    expected = _python_number(gold[1].replace(",", "")) if gold else None
    return expected is not None and gsm8k_base_number(completion) == expected


def humaneval_body(response: str, entry_point: str) -> str:
    """The body of the asked function in a chat model's response: evaluate_chat_humaneval.py.

    In order: from the function's signature to the end of its fenced block; the function's indented lines; the first
    function's indented lines; else the response itself, indented, as a bare body.
    """
    name = re.escape(entry_point)
    indented = r".*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)"
    for pattern in (
        rf"```(?:[Pp]ython\n)?.*?def\s+{name}.*?:\n(.*?)\n```",
        rf"def\s+{name}{indented}",
        rf"def{indented}",
    ):
        if match := re.search(pattern, response, re.DOTALL):
            return match[1]
    return textwrap.indent(response, " " * 4)


def humaneval_program(prompt: str, body: str, tests: str, entry_point: str) -> str:
    """The program whose run to the end is a pass: prompt and body, the tests, the call of `check`."""
    return f"{prompt}{body}\n{tests}\ncheck({entry_point})\n"


def code_block(response: str) -> str:
    """The first fenced block of a response, its language mark removed; the whole response when there is no fence.

    A block that is not closed (the answer was cut) reaches to the end.
    """
    match = re.search(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", response, re.DOTALL)
    return match[1] if match else response


def mbpp_program(code: str, setup: str, tests: Sequence[str]) -> str:
    """The program whose run to the end is a pass: the code, the row's set-up code, its asserts."""
    return "\n".join([code, setup, *tests]) + "\n"


def named_answers(text: str) -> dict[str, str]:
    """Answers written as @name[value], the last of equal names: DABench's format (InfiAgent eval_closed_form.py)."""
    return dict(re.findall(r"@(\w+)\[(.*?)\]", text))


def answer_is_right(given: str | None, label: str) -> bool:
    """Whether an answer is the label's text, or its number within 1e-6: DABench's comparison."""
    if given == label:
        return True
    try:
        return given is not None and abs(float(given) - float(label)) < 1e-6
    except ValueError:
        return False


def answers_right(text: str, labels: Mapping[str, str]) -> float:
    """Share of the labels answered right; 1.0 is a right question in DABench's accuracy by question."""
    given = named_answers(text)
    right = sum(answer_is_right(given.get(name), label) for name, label in labels.items())
    return right / len(labels) if labels else 0.0
