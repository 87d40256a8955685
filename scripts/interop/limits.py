"""What consumers cannot do, looked up in their own code: rows that fail for such a reason are no defect of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

# A consumer's own words for "I do not know this architecture".
_UNKNOWN = re.compile(
    "unknown model architecture|not supported|isn't supported|does not recognize this architecture|not recognized"
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
        "transformers gguf",
        "tiny-qwen(2_moe|3_moe|3)",
        "gguf",
        "it takes head_dim and the widths of experts from its class, not from the file: only published sizes load",
    ),
)


def why_not(consumer: str, artifact: str, format_name: str, said: str) -> str | None:
    """The known reason why this consumer fails on this row, or None; `said`: its own words."""
    if _UNKNOWN.search(said):
        return f"not known to it: {said}"
    for limit in LIMITS:
        parts = ((limit.consumer, consumer), (limit.artifact, artifact), (limit.format, format_name))
        if all(re.fullmatch(pattern, text) for pattern, text in parts):
            return limit.why
    return None
