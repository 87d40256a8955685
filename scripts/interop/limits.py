"""When a difference is none, and what consumers cannot do, found in their own code: such rows are no defect of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOGIT_LIMIT = 1e-3  # FP32 sums in another order, over 30 blocks and logits of 30
GREEDY_TOKENS = 10
FLOOR_FACTOR = 2.0  # a difference may be this many times what the consumer does to the same weights in FP32
NOISE_FACTOR = 3.0  # a consumer may differ from the same rounding in our runtime by this many times its noise
# A consumer's own words for "I do not know this architecture" (vLLM: "... these settings").
_UNKNOWN = re.compile(
    "unknown model architecture|not supported|isn't supported|does not recognize this architecture|not recognized"
    "|Unsupported quantization config|No WNA16 MoE backend"
)


@dataclass(frozen=True)
class Limit:
    """Regular expressions, matched in full, of rows that `why` concerns."""

    consumer: str
    artifact: str
    format: str
    why: str


LIMITS = (
    Limit(
        "mlx-lm",
        ".*asym|tiny-qwen1",
        "awq",
        "its reader of awq rounds -zero * scale and every tensor that is not quantized to FP16; --format mlx does not",
    ),
    Limit(
        "mlx-lm",
        "tiny-qwen(2_moe|3_moe|3_next|3_5_moe|3_5-vision)",
        "awq",
        "its reader of awq does not stack routed experts and wants keys of older config.json; --format mlx has both",
    ),
    Limit(
        "transformers \\+ gptqmodel",
        "tiny-qwen(2_moe|3_moe|3_next|3_5_moe|4_exp)",
        "gptq",
        "stock transformers keeps routed experts in one tensor and fills linears only: its experts are random, with a"
        " warning; GPTQModel.load and transformers after `import qwen_quant` read them",
    ),
    Limit(
        "GPTQModel|transformers \\+ compressed-tensors",
        "tiny-qwen4_exp",
        "gptq|gptq_v2|awq|compressed-tensors",
        "with a quantizer, transformers 5.23 loses the parts of the n-gram table (the same tensors load without one)",
    ),
    Limit(
        "GPTQModel",
        "tiny-qwen3_5-vision",
        "gptq|gptq_v2|awq",
        "it asks for the image processor that published checkpoints have and the tiny one has not;"
        " transformers + gptqmodel reads the same folder",
    ),
    Limit(
        r"vLLM \(CPU\)",
        "tiny-qwen3_5.*",
        ".*",
        "its code for this family imports torchvision, of which no build fitted torch 2.13.0+cpu here",
    ),
    Limit(
        "transformers gguf",
        "tiny-qwen(2_moe|3_moe|3)",
        "gguf",
        "it takes head_dim and the widths of experts from its class, not from the file: only published sizes load",
    ),
)


def why_not(consumer: str, artifact: str, format_name: str, said: str) -> str | None:
    """The known reason why this consumer fails on this row, or None; `said`: its own words."""
    if _UNKNOWN.search(said):
        return f"its words: {said}"
    for limit in LIMITS:
        parts = ((limit.consumer, consumer), (limit.artifact, artifact), (limit.format, format_name))
        if all(re.fullmatch(pattern, text) for pattern, text in parts):
            return limit.why
    return None


def verdict(figures: Mapping[str, Any], arithmetic: str, limit: float = LOGIT_LIMIT) -> str:
    """ "equal", "equal up to its own noise", "equal up to its rounding" or "DIFFERENT", by the limits above."""
    if figures["nfc_texts_different"]:
        return "DIFFERENT"
    if figures["max_difference"] <= limit and figures["greedy_equal"] == GREEDY_TOKENS:
        return "equal"
    allowed = max(limit, NOISE_FACTOR * figures["rounding_noise"])
    explained = figures["first_position_same_rounding"] <= limit and figures["max_difference_same_rounding"] <= allowed
    if arithmetic != "fp32" and explained:
        return "equal up to its rounding"
    quiet = figures["max_difference"] <= FLOOR_FACTOR * (figures["floor"] or 0.0)
    return "equal up to its own noise" if quiet else "DIFFERENT"


def last_words(said: str) -> str:
    """The reason in one line: the last line of stderr, after llama.cpp's own where it has one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no words"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines[-1:]
    reasons = [line for line in lines if "error loading" in line or "Value error," in line][:1]  # before Python's own
    crash = lines[-1:] if lines[-1].startswith("exit status") and errors[-1:] != lines[-1:] else []
    return " / ".join([*reasons, errors[-1][:300], *crash])
