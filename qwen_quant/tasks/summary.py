"""VCSUM: one summary of a whole Chinese meeting transcript, asked as LongBench asks it.

Scored with ROUGE-L (F-measure) over single Chinese characters, runs of other letters and digits, and punctuation
marks. LongBench cuts words with jieba and uses another ROUGE package, and how the cards of first-generation Qwen cut
VCSUM was not published, so absolute values are comparable between models scored here only.  A transcript longer than
the model's window is cut by the harness, from its start.
"""

from __future__ import annotations

from typing import Any

from qwen_quant.evaluation.scoring import summary_rouge_l
from qwen_quant.tasks.rows import Row, as_splits, data_file, read_rows, with_fields

FILE = "hub/Xnhyacinth/LongBench/vcsum.jsonl"


def vcsum(**_: Any) -> dict[str, Any]:
    """The meetings as split `test`: context, answers (list of reference summaries)."""
    path = data_file(FILE)
    return as_splits(test=with_fields(read_rows(path), ("context", "answers", "_id"), path))


def score_vcsum(doc: Row, results: list[str]) -> dict[str, float]:
    """ROUGE-L against the best reference."""
    return {"rouge_l": summary_rouge_l(doc["answers"], results[0])}
