"""Tool use in ReAct form, scored as Qwen's evaluate_plugin.py scores it.

Positive rows (a tool fits): `action_right_rate` (the right tool was called) and `action_input_rouge` (ROUGE-L of the
tool's input).  Negative rows (none fits): `false_positive_rate` (any tool was called).  That script lets the model go
on after "Observation:"; here it stops there, since nothing after the first one is scored.

ROUGE is over the tokens of QWEN_QUANT_TOKENIZER_DIR's tokenizer, as in that script; where that is not set, over
characters and words (`scoring.mixed_tokens`), which a warning says.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from qwen_quant.evaluation import scoring
from qwen_quant.tasks.rows import TOKENIZER_DIR, Row, as_splits, data_file, read_rows, tokenizer_pieces, with_fields

FILE = "tooluse/react_zh_{kind}.jsonl"


def _rows(kind: str) -> dict[str, Any]:
    path = data_file(FILE.format(kind=kind))
    return as_splits(test=with_fields(read_rows(path), ("id", "prompt", "response"), path))


def positive(**_: Any) -> dict[str, Any]:
    """Rows whose response calls a tool, as split `test`."""
    return _rows("positive")


def negative(**_: Any) -> dict[str, Any]:
    """Rows for which no tool fits, as split `test`."""
    return _rows("negative")


def score_positive(doc: Row, results: list[str]) -> dict[str, float]:
    """Right tool (0 or 1) and ROUGE-L of its input."""
    return {
        "action_right_rate": float(scoring.action_is_right(results[0], doc["response"])),
        "action_input_rouge": scoring.action_input_rouge_l(results[0], doc["response"], tokens),
    }


def score_negative(doc: Row, results: list[str]) -> dict[str, float]:
    """1 when a tool was called all the same."""
    return {"false_positive_rate": float(scoring.calls_a_tool(results[0]))}


def tokens(text: str) -> Sequence[str]:
    """What ROUGE counts."""
    pieces = tokenizer_pieces(text)
    if pieces is None:
        _warn_of_other_tokens()
        return scoring.mixed_tokens(text)
    return scoring.model_tokens(pieces)


@functools.lru_cache(maxsize=1)
def _warn_of_other_tokens() -> None:
    logging.getLogger(__name__).warning(
        "action_input_rouge is over characters and words, not over the model's tokens: %s is not set", TOKENIZER_DIR
    )
