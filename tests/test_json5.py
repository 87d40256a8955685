"""The JSON5 reader: what json reads, what only JSON5 reads (spec.json5.org), and what neither does."""

from __future__ import annotations

import json
import math

import pytest

from qwen_quant.evaluation import json5

SAME_AS_JSON = [
    '{"a": [1, 2.5, -3e2, true, false, null, "x\\n\\u4e2d\\ud83d\\ude00"], "b": {}}',
    "[]",
    '" "',
    "-0",
    "12",
]
ONLY_JSON5 = [
    ("{a: 1, $b_: 'two', 中: [3,],}", {"a": 1, "$b_": "two", "中": [3]}),
    ("// note\n{/* more */ x: .5, y: 5., z: +0x1F}\n", {"x": 0.5, "y": 5.0, "z": 31}),
    ("'it\\'s \"so\"'", 'it\'s "so"'),
    ("'one \\\nline'", "one line"),
    ("['\\x41', '\\v', '\\q']", ["A", "\v", "q"]),
    ("-Infinity", -math.inf),
    ("{a: 1, a: 2}", {"a": 2}),
]
WRONG = [
    "",
    "{",
    "[1 2]",
    "{a 1}",
    "{a: }",
    "[,]",
    "'open",
    "'a\nb'",
    "{1a: 2}",
    "1 2",
    "tru",
    "007",
    "'\\u12'",
    "'\\1'",
    "}",
]


@pytest.mark.parametrize("text", SAME_AS_JSON)
def test_json_reads_the_same(text: str) -> None:
    assert json5.loads(text) == json.loads(text)
    assert type(json5.loads(text)) is type(json.loads(text))


@pytest.mark.parametrize(("text", "value"), ONLY_JSON5)
def test_json5_is_read(text: str, value: object) -> None:
    assert json5.loads(text) == value


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_json5_raises(text: str) -> None:
    with pytest.raises(ValueError, match="JSON5"):
        json5.loads(text)
