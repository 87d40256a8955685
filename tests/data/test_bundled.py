"""The bundled data is whole, balanced, permissive, and the demo checkpoint has really learned something."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError

SOURCES = {
    *("oasst-zh", "oasst-en", "user-oriented-en", "seed-en", "seed-zh", "belle-zh", "dpo-en", "dpo-zh"),
    *("glaive-en", "glaive-zh", "gsm8k-train", "math-train", "mbpp-train", "c4-en"),
}
NON_COMMERCIAL = ("alpaca", "codealpaca", "code-alpaca")
ROWS = 1255
MEASURED_PERPLEXITY = 113.26
"""Of the bundled checkpoint over the first 20 kB of demo_eval.txt, windows of 256 tokens, FP32 arithmetic."""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The bundle's rows."""
    lines = bundled_path("calibration_bundled.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def test_bundle_has_every_source_and_its_row_count(rows: list[dict]) -> None:
    counts = Counter(row["source"] for row in rows)
    assert set(counts) == SOURCES
    assert len(rows) == ROWS
    assert min(counts.values()) >= 30


def test_bundle_rows_are_unique_filled_and_of_one_of_two_layouts(rows: list[dict]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) in ({"id", "source", "text"}, {"id", "source", "messages"})
        assert row["id"].rsplit("-", 1)[0] == row["source"]
        messages = row.get("messages") or [{"role": "user", "content": row["text"]}]
        assert all(message["role"] in {"user", "assistant"} and message["content"].strip() for message in messages)


def test_bundle_holds_no_non_commercial_row(rows: list[dict]) -> None:
    assert not [row["id"] for row in rows if row["id"].startswith(NON_COMMERCIAL)]


def test_bundle_is_the_one_the_licence_page_describes() -> None:
    content = bundled_path("calibration_bundled.jsonl").read_bytes()
    page = bundled_path("CALIBRATION_LICENCES.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in page
    assert len(content) < 2_000_000
    listed = re.findall(r"^\| ([a-z0-9-]+) \| \w+ \| (Apache-2\.0|MIT|ODC-By 1\.0|CC BY 4\.0) \|", page, re.MULTILINE)
    assert {name for name, _ in listed} == SOURCES


def test_missing_bundled_name_raises_with_a_next_step() -> None:
    with pytest.raises(InputError, match="no_such_file") as caught:
        bundled_path("no_such_file")
    assert caught.value.next_step


def test_demo_tokenizer_round_trips_and_renders_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("demo_checkpoint"), trust_remote_code=False)
    text = "def f(x):\n    return x + 1  # 中文 naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_demo_checkpoint_perplexity_is_as_measured_when_it_was_made() -> None:
    folder = bundled_path("demo_checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = bundled_path("demo_eval.txt").read_bytes()[:20_000].decode(errors="ignore")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)]
    perplexity = math.exp(sum(losses) / len(windows))
    assert perplexity < 1.1 * MEASURED_PERPLEXITY
    assert perplexity > 0.9 * MEASURED_PERPLEXITY, "other weights than those measured"
