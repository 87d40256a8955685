"""The letter a chat model's reply to a multiple-choice question chooses, as first-generation Qwen's scripts read it.

Two readers: English (evaluate_chat_mmlu.py) and Chinese (evaluate_chat_ceval.py), both of github.com/QwenLM/Qwen,
eval/, commit 2df8e8a.  Each first replaces the options' texts in the response by their letters, then tries rules from
the most explicit to "the first letter that stands alone", and at last takes the option most similar to the response.
The rules are part of the protocol: another reader gives another score for the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwen_quant.evaluation.fuzzy import plain, weighted_ratio

LETTERS = ("A", "B", "C", "D")
_LETTER = "([ABCD])"
_GAP = "[^ABCD]"  # between a phrase and its letter no other letter may stand


def _not_denied(gap: str, denial: str, what: str) -> str:
    """A lookahead: no denial of `what` within the gap."""
    return rf"(?!{gap}(?:{denial}){what})"


_ENGLISH_RULES = (
    # "I choose A", "the answer is A", "choice: A", unless "answer ... not"
    r"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice)"
    + _not_denied(_GAP + "{0,20}?", "n't|not", "")
    + rf"{_GAP}{{0,10}}?\b(?:|is|:|be)\b){_GAP}{{0,20}}?\b{_LETTER}\b",
    # "A is correct"
    rf"\b{_LETTER}\b"
    + _not_denied(_GAP + "{0,8}?", "n't|not", _GAP + "{0,5}?(?:correct|right)")
    + rf"{_GAP}{{0,10}}?\b(?:correct|right)\b",
    rf"^{_LETTER}(?:[.,:]|$)",
    rf"(?<![a-zA-Z]){_LETTER}(?![a-zA-Z=])",
)
_CHINESE_RULES = (
    # 选A, 答案是A, 选项为A, unless 不 or 非 comes between
    r"(?:(?:选|选择|选定)[：:]?\s*|(?:(?:答案|选项)"
    + _not_denied(_GAP + "{0,10}?", "不|非", _GAP + "{0,10}?[是选为：:】]")
    + rf"{_GAP}{{0,10}}?[是选为：:】]){_GAP}{{0,10}}?){_LETTER}(?:选项)?(?:[)。.，,．、ABCD：:）]|$)",
    # A选项正确, A符合题意
    rf"{_LETTER}(?:选?项)?"
    + _not_denied(_GAP + "{0,4}?", "不|非", _GAP + "{0,4}?(?:正确|对[的，。：]|符合)")
    + rf"{_GAP}{{0,4}}?(?:正确|对[的，。：]|符合)",
    rf"^[(（]?{_LETTER}(?:[。)）.，,．：:]|$)",
    rf"(?<![a-zA-Z]){_LETTER}(?![a-zA-Z=])",
)


def mmlu_choice(response: str, options: Mapping[str, str]) -> str:
    """The letter an English response chooses; `options` maps each of A to D to its text."""
    for letter, text in _longest_first(options):
        response = re.sub(re.escape(text.rstrip(".")), letter, response, flags=re.IGNORECASE)
    return _first_letter(_ENGLISH_RULES, response) or most_similar(response, options)


def ceval_choice(response: str, question: str, options: Mapping[str, str]) -> str:
    """The letter a Chinese response chooses; a repeated question is read as "the answer is" before the rules apply."""
    parts = question.rstrip("。").split("。")[-1].split("_")
    for part, meaning in ((parts[0], "答案是"), (parts[-1], "")):
        if len(part.strip()) > 4:
            response = response.replace(part, meaning)
    for letter, text in _longest_first(options):
        response = response.replace(text.rstrip("。"), letter)
    return _first_letter(_CHINESE_RULES, response) or most_similar(response, options)


def most_similar(response: str, options: Mapping[str, str]) -> str:
    """The last resort: the option most similar to the response (`fuzzy.weighted_ratio`), the first of equals."""
    wanted = plain(response)
    # Rounded, so that equals are equal whatever order their floating-point terms came in.
    return max(LETTERS, key=lambda letter: round(weighted_ratio(wanted, plain(options[letter])), 9))


def _longest_first(options: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(options.items(), key=lambda item: len(item[1]), reverse=True)


def _first_letter(rules: tuple[str, ...], response: str) -> str | None:
    """The letter of the first rule that matches."""
    for rule in rules:
        if match := re.search(rule, response):
            return match[1]
    return None
