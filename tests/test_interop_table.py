"""The page that `make interop` writes, and when it calls a difference none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.interop.limits import last_words, verdict, why_not
from scripts.interop.table import Row, render, row_key

REPOSITORY = Path(__file__).parents[1]


def row(**changes: object) -> Row:
    figures = {"max_difference": 0.0276, "largest_logit": 9.3, "floor": 1e-6, "rounding_effect": 0.0284}
    rest = {"max_difference_same_rounding": 0.0074, "greedy_equal": 9, "texts_equal": 295, "versions": {"ggml": "7"}}
    rest |= {"rounding_noise": 0.014, "first_position_same_rounding": 1e-7, "nfc_texts_different": 0}
    names = {"artifact": "a", "consumer": "c", "format": "gguf", "arithmetic": "int8_activations", "verdict": "equal"}
    return {**names, **figures, **rest, **changes}


def test_a_row_shows_its_figures_and_no_rounding_where_there_is_none() -> None:
    assert (
        "| a | c | gguf | 0.028 | 9.3 | 1e-06 | 0.028 | 0.0074 | 0.014 | 1e-07 | 9 of 10 | 295 of 300 | equal |"
        in render([row()])
    )
    plain = render([row(arithmetic="fp32", texts_equal=None, floor=None)])
    assert "| 0.028 | 9.3 | - | - | - | - | - | 9 of 10 | - | equal |" in plain
    assert "- ggml 7" in plain


def test_what_could_not_be_loaded_is_listed_with_the_reason() -> None:
    page = render(
        [
            {**row(), "verdict": "x"},
            {
                "artifact": "b",
                "consumer": "c",
                "format": "f",
                "verdict": "cannot load",
                "arithmetic": "fp32",
                "note": "no | merges",
            },
        ]
    )
    assert "| b | c | f | cannot load | no / merges |" in page


@pytest.mark.parametrize(
    ("changes", "arithmetic", "expected"),
    [
        ({"max_difference": 9e-4, "greedy_equal": 10}, "fp32", "equal"),
        ({"max_difference": 9e-4, "greedy_equal": 9}, "fp32", "DIFFERENT"),
        ({}, "fp32", "DIFFERENT"),
        ({}, "int8_activations", "equal up to its rounding"),
        ({"first_position_same_rounding": 2e-3}, "int8_activations", "DIFFERENT"),
        ({"max_difference_same_rounding": 0.05}, "int8_activations", "DIFFERENT"),
        ({"floor": 0.014}, "fp32", "equal up to its own noise"),
        ({"floor": None}, "fp32", "DIFFERENT"),
        ({"max_difference": 0.0, "nfc_texts_different": 1}, "fp32", "DIFFERENT"),
    ],
)
def test_a_difference_is_forgiven_only_where_it_is_explained(
    changes: dict[str, object], arithmetic: str, expected: str
) -> None:
    assert verdict(row(**changes), arithmetic) == expected


def test_reasons_of_consumers() -> None:
    assert why_not("mlx-lm", "tiny-qwen2-asym", "awq", "") is not None
    assert why_not("mlx-lm", "tiny-qwen2-asym", "mlx", "") is None
    assert "architecture" in (why_not("any", "x", "gguf", "error loading: unknown model architecture: 'a'") or "")
    said = "a.py\nllama: error loading model: no merges\nTraceback\nValueError: Failed\nexit status -6"
    assert last_words(said) == "llama: error loading model: no merges / ValueError: Failed / exit status -6"
    assert last_words("") == "no words"


@pytest.mark.skipif(not (REPOSITORY / "docs" / "interop.json").exists(), reason="no results yet")
def test_the_page_in_docs_is_that_of_the_stored_rows() -> None:
    rows = json.loads((REPOSITORY / "docs" / "interop.json").read_text(encoding="utf-8"))["rows"]
    assert (REPOSITORY / "docs" / "interop.md").read_text(encoding="utf-8") == render(rows)
    assert len({row_key(found) for found in rows}) == len(rows)
