"""Make the calibration set that ships with the package, and the list of its licences.

    python scripts/make_calibration_bundle.py [--data ../shared/data]

Writes ``qwen_quant/data/calibration_bundled.jsonl``, one object a line: ``{"id", "source", "messages": [{"role",
"content"}]}`` for conversations, ``{"id", "source", "text"}`` for web pages; and ``CALIBRATION_LICENCES.md`` beside it.
The choice is balanced by kind (English, Chinese, tools, maths, code, web) under ``BYTE_BUDGETS`` and, within a kind,
takes its sources in turn so that none crowds out another. It depends on ``SEED`` and the input files only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from bundled_sources import C4_SOURCE, CHAT_SOURCES, DEFAULT_DATA, PACKAGE_DATA, Source, read_c4, read_chat

SEED = 20240921
BUNDLE = "calibration_bundled.jsonl"
LICENCES = "CALIBRATION_LICENCES.md"
C4_NAME = "c4-en"
SOURCES: dict[str, Source] = {**CHAT_SOURCES, C4_NAME: C4_SOURCE}
BYTE_BUDGETS = {"en": 400_000, "zh": 420_000, "tools": 180_000, "maths": 250_000, "code": 120_000, "web": 210_000}
"""UTF-8 bytes of JSON per kind; a kind that has less gives all it has."""
MAX_ROW_BYTES = 12_000
"""Longer rows are left out: one document must not stand for a kind."""

Row = dict[str, object]


def read_rows(data: Path) -> list[Row]:
    """All permissive candidate rows in the bundle's own layout."""
    rows: list[Row] = [
        {"id": row.row_id, "source": row.source, "messages": list(row.messages)} for row in read_chat(data)
    ]
    rows += [{"id": f"{C4_NAME}-{n:04d}", "source": C4_NAME, "text": text} for n, text in enumerate(read_c4(data))]
    return rows


def encode(row: Row) -> bytes:
    """One line of the bundle, newline included."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def is_usable(row: Row) -> bool:
    """Whether every text of the row holds something besides blanks and the row is not overlong."""
    texts = [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]
    return all(text.strip() for text in texts) and len(encode(row)) <= MAX_ROW_BYTES


def take_in_turn(queues: dict[str, list[Row]]) -> Iterator[Row]:
    """One row of each queue in turn, by name, until all are empty."""
    pending = {name: iter(rows) for name, rows in sorted(queues.items())}
    while pending:
        for name in list(pending):
            row = next(pending[name], None)
            if row is None:
                del pending[name]
            else:
                yield row


def choose(rows: list[Row], seed: int) -> list[Row]:
    """The bundle: per kind as many shuffled rows as its byte budget holds, all kinds shuffled together at the end."""
    generator = random.Random(seed)
    kinds: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if is_usable(row):
            kinds[SOURCES[str(row["source"])].kind][str(row["source"])].append(row)
    chosen: list[Row] = []
    for kind, queues in sorted(kinds.items()):
        for name in sorted(queues):
            generator.shuffle(queues[name])
        left = BYTE_BUDGETS[kind]
        for row in take_in_turn(queues):
            size = len(encode(row))
            if size <= left:
                chosen.append(row)
                left -= size
    generator.shuffle(chosen)
    return chosen


def licence_page(rows: list[Row], digest: str) -> str:
    """Markdown: per source its licence, origin, rows and bytes in the bundle."""
    counts = Counter(str(row["source"]) for row in rows)
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[str(row["source"])] += len(encode(row))
    lines = [
        "# Licences of the bundled calibration set\n",
        f"`{BUNDLE}`: {len(rows)} rows, {sum(sizes.values())} bytes, sha256 `{digest}`, made by",
        "`scripts/make_calibration_bundle.py`. The `source` field of a row names its line below. Rows keep the licence",
        "of their source; all allow commercial use. Changes made: rows chosen, conversations put into role/content",
        "messages, GSM8K calculator marks removed, tool calls rewritten as ReAct text.\n",
        "| source | kind | licence | rows | bytes | origin |",
        "|---|---|---|---:|---:|---|",
    ]
    for name, source in sorted(SOURCES.items()):
        lines.append(
            f"| {name} | {source.kind} | {source.licence} | {counts[name]} | {sizes[name]} | {source.origin} |"
        )
    lines += [
        "\nLicence texts:\n",
        "- Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0",
        "- MIT: https://opensource.org/license/mit",
        "- ODC-By 1.0: https://opendatacommons.org/licenses/by/1-0/",
        "- CC BY 4.0: https://creativecommons.org/licenses/by/4.0/\n",
        "C4 text is also subject to the Common Crawl terms of use.\n",
        "GSM8K: Copyright (c) 2021 OpenAI. MATH: Copyright (c) 2021 Dan Hendrycks. MBPP: Google Research authors.",
        "BELLE: LianjiaTech. OpenAssistant: LAION and contributors. Self-Instruct: Yizhong Wang et al.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the public texts")
    rows = choose(read_rows(parser.parse_args().data), SEED)
    content = b"".join(encode(row) for row in rows)
    (PACKAGE_DATA / BUNDLE).write_bytes(content)
    page = licence_page(rows, hashlib.sha256(content).hexdigest())
    (PACKAGE_DATA / LICENCES).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
