"""Folders with first-generation Qwen's vocabulary, from the compressed copy in tests/golden/qwen1/."""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen_quant.qwen1_fast import write_fast_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen1"
# As in the published repositories: the class and its Python file are named, and must not be needed.
PUBLISHED_TOKENIZER_CONFIG = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}
CHAT_SETTINGS = {"chat_format": "chatml", "eos_token_id": 151643, "max_window_size": 24000, "top_k": 0, "top_p": 0.8}


@functools.cache
def vocabulary_bytes() -> bytes:
    return lzma.decompress((GOLDEN / "qwen.tiktoken.xz").read_bytes())


def write_qwen1_tokenizer(folder: Path) -> Path:
    """qwen.tiktoken, the published tokenizer_config.json, and a tokenization_qwen.py that leaves a trace when run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_bytes(vocabulary_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(PUBLISHED_TOKENIZER_CONFIG))
    trace = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    (folder / "tokenization_qwen.py").write_text(trace + "class QWenTokenizer: ...\n")
    return folder


@functools.cache
def written_files() -> dict[str, bytes]:
    """What write_fast_tokenizer makes of such a folder of a chat model; it takes seconds, so once a run."""
    with TemporaryDirectory() as name:
        source = write_qwen1_tokenizer(Path(name) / "source")
        (source / "generation_config.json").write_text(json.dumps(CHAT_SETTINGS))
        return {path.name: path.read_bytes() for path in write_fast_tokenizer(source, Path(name) / "out")}


@functools.cache
def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def calibration_messages(case: dict[str, Any]) -> list[dict[str, str]]:
    """Messages of a row of sft_preprocess.json; the published scripts drop a first turn that is not the user's."""
    turns = case["conversations"]
    turns = turns if turns[0]["from"] == "user" else turns[1:]
    rows = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
    return [{"role": "system", "content": case["system_message"]}, *rows]
