"""docs/interop.md out of the rows of docs/interop.json."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

HEAD = """# Who reads what `qwen-quant export` writes, run and compared

Made by `make interop` (scripts/interop.py); the rows with every figure are in interop.json. Each consumer ran in an
environment of its own (scripts/interop/*.txt) on a CPU, on the folder that `export` wrote, with 20 fixed tokens. The
reference is our own runtime on the artifact, dequantized, in FP32.

- **difference**: the largest absolute difference of a logit over all 20 positions and the whole vocabulary.
- **floor**: the same consumer on the same weights stored as FP32: its own noise. A dash: it has no such path.
- **rounding**: what the consumer's documented rounding alone does to the logits in our runtime. GPTQModel rounds
  scale * (code - zero) to FP16, and for awq the inputs and outputs of quantized linears too; transformers with
  compressed-tensors does that with routed experts; llama.cpp rounds the inputs of quantized linears to int8 blocks and
  those of BF16 linears to BF16. A dash: it has none.
- **same rounding**: the largest difference from our runtime with that same rounding. **its noise**: how far our
  runtime with that rounding moves when the embeddings move by 1e-6 of their size: rounding makes a model
  discontinuous, and two programs that sum in another order part by about as much. **first position**: the same
  rounding where attention sees one token only, before the programs part.
- **tokens**: how many of ten greedily generated tokens are those of the reference; they must all be where the consumer
  computes in FP32.
- **texts**: on how many of the tokenizer's 300 golden strings the consumer's tokenizer, read from the file, agrees with
  ours. Five of them are not in Unicode NFC, and GGUF has no place for a normalizer: those differ.
- **verdict**: "equal" is within 0.001 (GPTQModel: 0.02; transformers with compressed-tensors, for its experts: 0.002).
  "up to its rounding": equal to our runtime with the same rounding at the first position, and within three times the
  noise of that rounding everywhere. "up to its own noise": within twice the floor. (1): a limit of the consumer, found
  in its code. (2): vLLM's packed product exists in its AVX-512 build only, and this CPU has none; a product in torch of
  the tensors as vLLM loaded, merged and repacked them stood in for that one kernel. vLLM gives log-probabilities and
  runs in FP16: both sides are compared as log-probabilities.

"""
COLUMNS = (
    "artifact",
    "consumer",
    "format",
    "difference",
    "of",
    "floor",
    "rounding",
    "same rounding",
    "its noise",
    "first position",
    "tokens",
    "texts",
)


def row_key(row: Row) -> str:
    """What a row is about, in words."""
    return f"{row['artifact']} | {row['format']} | {row['consumer']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _cells(row: Row) -> list[str]:
    start = [row["artifact"], row["consumer"], row["format"]]
    rounds = row["arithmetic"] != "fp32"
    effect = _number(row["rounding_effect"] if rounds else None)
    keys = ("max_difference_same_rounding", "rounding_noise", "first_position_same_rounding")
    same = [_number(row.get(key) if rounds else None) for key in keys]
    texts = "-" if row["texts_equal"] is None else f"{row['texts_equal']} of 300"
    figures = [_number(row["max_difference"]), _number(row["largest_logit"]), _number(row["floor"]), effect, *same]
    return [*start, *figures, f"{row['greedy_equal']} of 10", texts, _verdict(row)]


def _verdict(row: Row) -> str:
    replaced = row.get("facts", {}).get("kernel_replaced")
    return row["verdict"] + (" (2)" if replaced else "") + (f" (1): {row['note']}" if row.get("note") else "")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def render(rows: list[Row]) -> str:
    """The whole page."""
    found = [row for row in rows if "max_difference" in row]
    text = HEAD + _line([*COLUMNS, "verdict"]) + _line(["---"] * (len(COLUMNS) + 1))
    text += "".join(_line(_cells(row)) for row in found)
    quantized = [row for row in found if row.get("gguf-q8_0") is not None]
    if quantized:
        text += "\n## llama.cpp on other types of the same weights\n\n"
        text += _line(
            ["artifact", "as exported", "all F32", "linears Q8_0 (rounds weights too)", "int8 inputs in ours"]
        )
        text += _line(["---"] * 5)
        for row in quantized:
            parts = [row["max_difference"], row["floor"], row["gguf-q8_0"], row["rounding_effect"]]
            text += _line([row["artifact"], *map(_number, parts)])
    others = [row for row in rows if "max_difference" not in row]
    if others:
        text += "\n## Not exported, or not loaded\n\n" + _line(["artifact", "consumer", "format", "", "why"])
        text += _line(["---"] * 5)
        for row in others:
            note = row["note"].replace("|", "/")
            text += _line([row["artifact"], row["consumer"], row["format"], row["verdict"], note])
    versions: dict[str, set[str]] = {}
    for row in found:
        for name, value in row["versions"].items():
            versions.setdefault(name, set()).add(value)
    text += "\n## Versions\n\n" + "".join(f"- {name} {', '.join(sorted(v))}\n" for name, v in sorted(versions.items()))
    return text
