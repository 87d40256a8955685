"""Scoring functions against what first-generation Qwen's scripts give, slow answers and hand-computed ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qwen_quant.evaluation import choices, scoring
from qwen_quant.evaluation.fuzzy import plain, weighted_ratio

GOLDEN = json.loads((Path(__file__).parent / "golden" / "qwen1_eval_protocol.json").read_text(encoding="utf-8"))
MMLU, CEVAL = GOLDEN["evaluate_chat_mmlu.py"], GOLDEN["evaluate_chat_ceval.py"]


def slow_lcs(first: str, second: str) -> int:
    """The textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_lcs_equals_the_table() -> None:
    draw = random.Random(5)
    for _ in range(400):
        first, second = ("".join(draw.choices("abcd", k=draw.randint(0, 90))) for _ in range(2))
        assert scoring.lcs_length(first, second) == slow_lcs(first, second), (first, second)


def test_rouge_l_by_hand() -> None:
    # Lin 2004: police killed the gunman / police kill the gunman / the gunman kill police
    reference = "police killed the gunman".split()
    assert scoring.rouge_l(reference, "police kill the gunman".split()) == scoring.RougeL(0.75, 0.75, 0.75)
    assert scoring.rouge_l(reference, "the gunman kill police".split()) == scoring.RougeL(0.5, 0.5, 0.5)
    longer = scoring.rouge_l(list("abcd"), list("xaybzcwd"))
    assert (longer.precision, longer.recall, longer.fmeasure) == (0.5, 1.0, pytest.approx(2 / 3))
    assert scoring.rouge_l(["a"], []) == scoring.rouge_l([], ["a"]) == scoring.RougeL(0.0, 0.0, 0.0)


def test_mixed_tokens_cut_chinese_by_character_and_the_rest_by_word() -> None:
    text = "会议在09年的1月3号,Tom's AI模型。"
    assert scoring.mixed_tokens(text) == [
        *"会议在",
        "09",
        *"年的",
        "1",
        "月",
        "3",
        *"号,",
        "Tom",
        "'",
        "s",
        "AI",
        *"模型。",
    ]
    assert scoring.mixed_tokens("a_b \n") == ["a", "_", "b"]
    assert scoring.mixed_tokens("") == []


def test_a_summary_takes_the_best_reference() -> None:
    assert scoring.summary_rouge_l(["完全不同", "会议总结"], "会议的总结") == pytest.approx(2 * 4 / 9)
    assert scoring.summary_rouge_l([], "x") == 0.0


REACT = 'Thought: 我应该用它。\nAction: Get_Weather\nAction Input: {"city": "杭州", "days": 2}\nObservation: '


def test_react_is_cut_at_its_first_marks() -> None:
    call = scoring.parse_react(REACT)
    assert call == scoring.ReActCall("Get_Weather", '{"city": "杭州", "days": 2}')
    twice = REACT + "晴\nThought: 再来\nAction: other\nAction Input: {}\nObservation: "
    assert scoring.parse_react(twice) == call
    assert scoring.parse_react(REACT.removesuffix("Observation: ")) == call
    assert scoring.parse_react("Thought: none\nFinal Answer: 42") == scoring.ReActCall("", "")
    assert scoring.parse_react("\nAction: x\n") == scoring.ReActCall("", "")


def test_react_inputs_are_json5_with_sorted_keys() -> None:
    written = "\nAction: a\nAction Input: {b: 'x', /* note */ \"a\": [1, 2,],}\nObservation:"
    assert scoring.parse_react(written).action_input == '{"a": [1, 2], "b": "x"}'
    assert scoring.parse_react("\nAction: a\nAction Input: 杭州\nObservation:").action_input == ""


def test_action_and_false_positives_follow_evaluate_plugin() -> None:
    assert scoring.action_is_right("Thought: hm\nAction: GET_weather \nAction Input: {}\n", REACT)
    assert not scoring.action_is_right("Thought: hm\nAction: get_time\nAction Input: {}\n", REACT)
    assert not scoring.action_is_right(
        REACT.removeprefix("Thought: 我应该用它。\n"), REACT
    )  # no line before "Action: "
    assert scoring.calls_a_tool(REACT)
    assert not scoring.calls_a_tool("Thought: done\nFinal Answer: Action: none")


def test_action_input_rouge_by_hand() -> None:
    words = str.split
    other = REACT.replace("杭州", "北京")
    assert scoring.action_input_rouge_l(REACT, REACT, words) == 1.0
    assert scoring.action_input_rouge_l(other, REACT, words) == 0.75  # {"city": | "杭州", | "days": | 2}
    assert scoring.action_input_rouge_l("no call", REACT, words) == 0.0
    assert scoring.action_input_rouge_l(other, REACT) < scoring.action_input_rouge_l(REACT, REACT) == 1.0
    assert scoring.model_tokens(["{", ' "', " a b", " "]) == ["{", '"', "a", "b"]


@pytest.mark.parametrize("case", GOLDEN["evaluate_gsm8k.py"]["cases"], ids=lambda case: case["completion"][:12])
def test_gsm8k_base_is_qwens(case: dict[str, object]) -> None:
    expected = None if case["extracted"] == "[invalid]" else case["extracted"]
    assert scoring.gsm8k_base_number(str(case["completion"])) == expected
    assert scoring.gsm8k_base_is_right(str(case["completion"]), str(case["answer"])) is case["correct"]


@pytest.mark.parametrize("case", GOLDEN["evaluate_chat_gsm8k.py"]["cases"], ids=lambda case: case["completion"][:12])
def test_gsm8k_chat_is_qwens(case: dict[str, object]) -> None:
    assert scoring.gsm8k_chat_number(str(case["completion"])) == case["extracted"]
    assert scoring.gsm8k_chat_is_right(str(case["completion"]), str(case["answer"])) is case["correct"]


@pytest.mark.parametrize("case", GOLDEN["evaluate_chat_humaneval.py"], ids=lambda case: case["text"][:12])
def test_humaneval_bodies_are_qwens(case: dict[str, str]) -> None:
    assert scoring.humaneval_body(case["text"], case["entry_point"]) == case["out"]


def test_programs_are_put_together_in_order() -> None:
    program = scoring.humaneval_program("def f(x):\n", "    return x", "def check(c):\n    assert c(1) == 1", "f")
    exec(program, {})
    wrong = scoring.humaneval_program("def f(x):\n", "    return 2", "def check(c):\n    assert c(1) == 1", "f")
    with pytest.raises(AssertionError):
        exec(wrong, {})
    assert scoring.mbpp_program("code", "setup", ["t1", "t2"]) == "code\nsetup\nt1\nt2\n"


def test_code_blocks() -> None:
    assert scoring.code_block("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert scoring.code_block("```py\nx = 1\ny = 2") == "x = 1\ny = 2"
    assert scoring.code_block("x = 1\n") == "x = 1\n"


def test_dabench_answers() -> None:
    text = "@mean[34.65], @name[Congo] and @mean_2[1,000]\n@mean[34.650]"
    assert scoring.named_answers(text) == {"mean": "34.650", "name": "Congo", "mean_2": "1,000"}
    assert scoring.answers_right(text, {"mean": "34.65", "name": "Congo"}) == 1.0
    assert scoring.answers_right(text, {"mean": "34.66", "name": "Congo", "absent": "1", "mean_2": "1000"}) == 0.25
    assert scoring.answer_is_right("0.5", "0.5000009") and not scoring.answer_is_right("0.5", "0.500002")
    assert not scoring.answer_is_right(None, "1") and not scoring.answer_is_right("congo", "Congo")


@pytest.mark.parametrize(("row", "response", "letter"), MMLU["extract"])
def test_mmlu_choices_are_qwens(row: int, response: str, letter: str) -> None:
    options = {key: MMLU["rows"][row][key] for key in choices.LETTERS}
    assert choices.mmlu_choice(response, options) == letter


@pytest.mark.parametrize(("row", "response", "letter"), CEVAL["extract"])
def test_ceval_choices_are_qwens(row: int, response: str, letter: str) -> None:
    given = CEVAL["rows"][row]
    assert choices.ceval_choice(response, given["question"], {key: given[key] for key in choices.LETTERS}) == letter


def test_a_repeated_question_is_read_as_the_answer() -> None:
    row = CEVAL["rows"][1]
    options = {key: row[key] for key in choices.LETTERS}
    response = "关于传输层的面向连接服务的特性是既保证可靠，也保证按序交付"
    assert choices.ceval_choice(response, row["question"], options) == "D"


def test_longer_options_are_replaced_first() -> None:
    english = {"A": "7", "B": "17", "C": "8", "D": "9"}
    assert choices.mmlu_choice("17", english) == "B"
    chinese = {"A": "可靠", "B": "不可靠", "C": "有序", "D": "无序"}
    assert choices.ceval_choice("不可靠", "它____。", chinese) == "B"
    assert choices.mmlu_choice("The answer is not A, choose C", english) == "C"


# Values of rapidfuzz 3.14.6 fuzz.WRatio with utils.default_process (what thefuzz 0.22.1 calls), divided by 100.
WEIGHTED = [
    ("the north door", "the south door", 0.857142857),
    ("cat", "dog", 0.0),
    ("red green blue", "blue green red", 0.95),
    ("alpha beta", "alpha beta gamma delta", 0.9),
    ("I think it's Madrid", "不保证可靠，但保证按序交付", 0.0625),
    ("a very long response that names the quick brown fox somewhere near its end", "quick brown fox", 0.9),
    ("seven eight nine", "eight", 0.9),
    ("x_1 3.5", "3.5", 0.9),
    ("abcdefgh", "hgfedcba", 0.125),
    ("one two three four five six seven eight nine ten eleven", "tenn", 0.45),
    ("gamma gamma", "gamma", 0.9),
    ("abcd efgh", "efgh ijkl", 0.584615385),
    ("", "abc", 0.0),
    ("the the cat", "the cat sat on the mat by the door of the house", 0.855),
]


@pytest.mark.parametrize(("first", "second", "expected"), WEIGHTED)
def test_similarity_is_the_weighted_ratio(first: str, second: str, expected: float) -> None:
    assert weighted_ratio(plain(first), plain(second)) == pytest.approx(expected, abs=1e-8)
    assert weighted_ratio(plain(second), plain(first)) == pytest.approx(expected, abs=1e-8)
