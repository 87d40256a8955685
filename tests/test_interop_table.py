"""The page that `make interop` writes: every row appears, with its figures or with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.interop.table import Row, render, row_key

REPOSITORY = Path(__file__).parents[1]


def row(**changes: object) -> Row:
    figures = {"max_difference": 0.0276, "largest_logit": 9.3, "floor": 1e-6, "rounding_effect": 0.0284}
    rest = {"max_difference_same_rounding": 0.0074, "greedy_equal": 9, "texts_equal": 295, "versions": {"ggml": "7"}}
    names = {"artifact": "a", "consumer": "c", "format": "gguf", "arithmetic": "int8_activations", "verdict": "equal"}
    return {**names, **figures, **rest, **changes}


def test_a_row_shows_its_figures_and_no_rounding_where_there_is_none() -> None:
    assert "| a | c | gguf | 0.028 | 9.3 | 1e-06 | 0.028 | 0.0074 | 9 of 10 | 295 of 300 | equal |" in render([row()])
    plain = render([row(arithmetic="fp32", texts_equal=None, floor=None)])
    assert "| 0.028 | 9.3 | - | - | - | 9 of 10 | - | equal |" in plain
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


@pytest.mark.skipif(not (REPOSITORY / "docs" / "interop.json").exists(), reason="no results yet")
def test_the_page_in_docs_is_that_of_the_stored_rows() -> None:
    rows = json.loads((REPOSITORY / "docs" / "interop.json").read_text(encoding="utf-8"))["rows"]
    assert (REPOSITORY / "docs" / "interop.md").read_text(encoding="utf-8") == render(rows)
    assert len({row_key(found) for found in rows}) == len(rows)
