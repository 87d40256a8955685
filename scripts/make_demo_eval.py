"""Cut the held-out texts that ship with the package: ``demo_eval.txt`` (English) and ``eval_zh.txt`` (Chinese).

    python scripts/make_demo_eval.py [--data ../shared/data]

English: whole articles from the start of the WikiText-2 raw test split until ``ENGLISH_BYTES`` is reached.
Chinese: the paragraphs of the held-out fold of ``bundled_sources``, joined by a blank line.
Both are UTF-8; neither is read by the training script except to measure perplexity.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bundled_sources import DEFAULT_DATA, PACKAGE_DATA, ZH_HELD_OUT_FOLD, read_wikitext, read_zh_wiki

ENGLISH_BYTES = 150_000
ARTICLE_HEADING = re.compile(r"(?m)^ = [^=\n]+ = \n")


def cut_at_article(text: str, minimum_bytes: int) -> str:
    """The shortest run of whole articles from the start of ``text`` that holds at least ``minimum_bytes``."""
    starts = [match.start() for match in ARTICLE_HEADING.finditer(text)]
    for start in starts:
        if len(text[:start].encode()) >= minimum_bytes:
            return text[:start]
    return text


def main() -> int:
    """Write both files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the public texts")
    data: Path = parser.parse_args().data
    english = cut_at_article(read_wikitext(data, "wiki.test.part1.raw"), ENGLISH_BYTES)
    chinese = "\n\n".join(read_zh_wiki(data, range(ZH_HELD_OUT_FOLD, ZH_HELD_OUT_FOLD + 1))) + "\n"
    (PACKAGE_DATA / "demo_eval.txt").write_text(english, encoding="utf-8")
    (PACKAGE_DATA / "eval_zh.txt").write_text(chinese, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
