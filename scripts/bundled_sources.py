"""The public texts behind the data that ships in the package, and the licence of each.

One module reads them, so that the demo checkpoint, its held-out texts and the calibration bundle agree on which rows
are whose. Every reader takes the folder that holds the collection (``../shared/data`` beside the repository) and
raises ``FileNotFoundError`` when a file is missing. ``calib/chat_nc.json`` (non-commercial) is read by nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_DATA = REPOSITORY.parent / "shared" / "data"
PACKAGE_DATA = REPOSITORY / "qwen_quant" / "data"
PERMISSIVE = frozenset({"Apache-2.0", "MIT", "ODC-By 1.0", "CC BY 4.0"})
ZH_FOLD = 20
"""Chinese rows are dealt into this many folds; ``ZH_TRAIN_FOLDS`` train the demo model, the held-out one never does."""
ZH_TRAIN_FOLDS = range(10)
ZH_HELD_OUT_FOLD = 17


@dataclass(frozen=True)
class Source:
    """Where rows come from: licence, ``repository@commit path``, and kind (en, zh, tools, maths, code or web)."""

    licence: str
    origin: str
    kind: str


_FACTORY = "hiyouga/LLaMA-Factory@ff6d4d12eeb0"
CHAT_SOURCES: dict[str, Source] = {
    "oasst-zh": Source("Apache-2.0", "hiyouga/LLaMA-Factory@465ee8119aa4 data/oaast_sft_zh.json (oasst1, zh)", "zh"),
    "oasst-en": Source(
        "Apache-2.0", "LAION-AI/Open-Assistant@f1e6ed9526f5 model/model_eval/manual/data/en_100_tree.jsonl", "en"
    ),
    "user-oriented-en": Source(
        "Apache-2.0", "yizhongw/self-instruct@0b26ccaa4159 human_eval/user_oriented_instructions.jsonl", "en"
    ),
    "seed-en": Source("Apache-2.0", "yizhongw/self-instruct@0b26ccaa4159 data/seed_tasks.jsonl", "en"),
    "seed-zh": Source("ODC-By 1.0", "LianjiaTech/BELLE@645084d36454 data/1.5M/zh_seed_tasks.json", "zh"),
    "belle-zh": Source("ODC-By 1.0", "LianjiaTech/BELLE@645084d36454 eval/eval_set.json", "zh"),
    "dpo-en": Source("Apache-2.0", f"{_FACTORY} data/dpo_en_demo.json (chosen answer)", "en"),
    "dpo-zh": Source("Apache-2.0", f"{_FACTORY} data/dpo_zh_demo.json (chosen answer)", "zh"),
    "glaive-en": Source(
        "Apache-2.0", f"{_FACTORY} data/glaive_toolcall_en_demo.json (rewritten as ReAct text)", "tools"
    ),
    "glaive-zh": Source(
        "Apache-2.0", f"{_FACTORY} data/glaive_toolcall_zh_demo.json (rewritten as ReAct text)", "tools"
    ),
    "gsm8k-train": Source("MIT", "openai/grade-school-math@3101c7d50724 train.jsonl (<<>> marks removed)", "maths"),
    "math-train": Source("MIT", "brando90/snap-cluster-setup@92976bda8bbf data/MATH/train", "maths"),
    "mbpp-train": Source(
        "CC BY 4.0", "google-research mbpp/mbpp.jsonl, ids 601-974, by way of OckBench/OckBench@b72752a0ba59", "code"
    ),
}
C4_SOURCE = Source("ODC-By 1.0", f"{_FACTORY} data/c4_demo.jsonl (C4)", "web")


@dataclass(frozen=True)
class ChatRow:
    """One conversation: ``row_id`` names its source by prefix; ``messages`` are dicts with ``role`` and ``content``."""

    row_id: str
    messages: tuple[dict[str, str], ...]

    @property
    def source(self) -> str:
        """The id's prefix, a key of ``CHAT_SOURCES``."""
        return self.row_id.rsplit("-", 1)[0]


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The objects of a JSON-lines file, in file order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_chat(data: Path) -> list[ChatRow]:
    """The permissive conversations of ``calib/chat.json``; an id of an unlisted source raises ``KeyError``."""
    rows = []
    for raw in json.loads((data / "calib" / "chat.json").read_text(encoding="utf-8")):
        messages = tuple({"role": turn["from"], "content": turn["value"]} for turn in raw["conversations"])
        row = ChatRow(raw["id"], messages)
        if CHAT_SOURCES[row.source].licence in PERMISSIVE:
            rows.append(row)
    return rows


def read_c4(data: Path) -> list[str]:
    """The English web pages of ``calib/c4_en.jsonl``."""
    return [row["text"] for row in read_jsonl(data / "calib" / "c4_en.jsonl")]


def read_long_documents(data: Path) -> list[dict[str, str]]:
    """The rows of ``longdoc/longdoc.jsonl`` under a permissive licence (share-alike ones are left out)."""
    return [row for row in read_jsonl(data / "longdoc" / "longdoc.jsonl") if row["licence"] in PERMISSIVE]


def read_zh_wiki(data: Path, folds: range) -> list[str]:
    """Chinese Wikipedia paragraphs whose row number modulo ``ZH_FOLD`` is in ``folds``."""
    rows = read_jsonl(data / "zh" / "zh_wiki.jsonl")
    return [row["text"] for number, row in enumerate(rows) if number % ZH_FOLD in folds]


def read_wikitext(data: Path, name: str) -> str:
    """A raw WikiText-2 file as it is, blanks and heading marks included."""
    return (data / "wikitext-2-raw" / name).read_text(encoding="utf-8")


def render_chatml(messages: tuple[dict[str, str], ...]) -> Iterator[str]:
    """Each message framed as ``<|im_start|>role\\ncontent<|im_end|>\\n``, in order."""
    for message in messages:
        yield f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
