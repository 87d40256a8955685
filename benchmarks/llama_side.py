"""llama.cpp as the other side of benchmarks/int4.py: the same codes in a GGUF file, and a process that decodes with it.

Q4_0 holds 32 weights a block: an FP16 scale d, then 16 bytes, the low nibbles those of weights 0 to 15, the high ones
those of 16 to 31; value = d * (code - 8). A symmetric GPTQ weight of group 64 or 128 fits exactly: its scale is
repeated. The output head and the embedding stay in BF16 and norms in FP32, as in the artifact.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_quant.gptq import QuantizedWeight
from qwen_quant.runtime.loading import WeightSource

CHILD = Path(__file__).resolve().parent / "peers" / "llama_decode.py"
BLOCK, BLOCK_BYTES = 32, 18
F32, Q4_0, BF16 = 0, 2, 30  # ggml's type numbers
ALIGNMENT = 32
_U32, _FLOAT, _TEXT = 4, 6, 8  # types of GGUF metadata
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def q4_0_blocks(weight: QuantizedWeight) -> Tensor:
    """uint8 [out, in / 32 * 18]: the weight in Q4_0, exactly (SystemExit where Q4_0 cannot hold it)."""
    rows, width = weight.codes.shape
    consecutive = bool((weight.g_idx.diff() >= 0).all()) and width % BLOCK == 0
    blocks = weight.g_idx.view(-1, BLOCK) if consecutive else weight.g_idx[:0].view(0, 1)
    if not consecutive or bool((blocks != blocks[:, :1]).any()) or bool((weight.zeros != 8).any()):
        raise SystemExit("Q4_0 holds symmetric weights with groups of whole blocks of 32 columns, in order")
    scales = weight.scales.half()[:, blocks[:, 0].long()].contiguous().view(torch.uint8).view(rows, -1, 2)
    halves = weight.codes.view(rows, -1, 2, BLOCK // 2)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    return torch.cat((scales, packed), 2).view(rows, -1)


def tensors(source: WeightSource) -> Iterator[tuple[str, int, tuple[int, ...], Tensor]]:
    """(GGUF name, type, shape as torch has it, bytes) of every tensor of a dense Qwen2 or Qwen3 folder."""
    yield _plain(source, "model.embed_tokens.weight", "token_embd.weight")
    yield _plain(source, "model.norm.weight", "output_norm.weight")
    if not source.spec.tied_head:
        yield _plain(source, "lm_head.weight", "output.weight")
    for layer in range(source.spec.num_layers):
        prefix = source.spec.layer_prefix(layer)
        for name, other in NORMS.items():
            yield _plain(source, f"{prefix}{name}.weight", f"blk.{layer}.{other}.weight")
        for part in ("q_norm", "k_norm"):
            if f"{prefix}self_attn.{part}.weight" in source.reader:
                yield _plain(source, f"{prefix}self_attn.{part}.weight", f"blk.{layer}.attn_{part}.weight")
        for name, other in NAMES.items():
            weight = source.quantized(prefix + name)
            yield f"blk.{layer}.{other}.weight", Q4_0, tuple(weight.codes.shape), q4_0_blocks(weight)
            if f"{prefix}{name}.bias" in source.reader:
                yield _plain(source, f"{prefix}{name}.bias", f"blk.{layer}.{other}.bias")


def _plain(source: WeightSource, name: str, other: str) -> tuple[str, int, tuple[int, ...], Tensor]:
    value = source.dense(name)
    kind = BF16 if value.dim() == 2 else F32
    stored = value.to(torch.bfloat16 if kind == BF16 else torch.float32).contiguous()
    return other, kind, tuple(value.shape), stored.view(torch.uint8).flatten()


def metadata(source: WeightSource) -> dict[str, Any]:
    """What llama.cpp must know of the model; without a vocabulary, which decoding token ids does not need."""
    config, family = source.spec.config, source.spec.family.model_type
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    found = {
        "block_count": source.spec.num_layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.value_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    general = {"general.architecture": family, "general.alignment": ALIGNMENT, "tokenizer.ggml.model": "no_vocab"}
    return {**general, **{f"{family}.{key}": value for key, value in found.items()}}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    return struct.pack("<If", _FLOAT, value) if isinstance(value, float) else struct.pack("<II", _U32, value)


def write_q4_0(folder: Path, path: Path) -> None:
    """Write the GPTQ folder as GGUF (version 3): header, metadata, tensor table, then the tensors, aligned."""
    source = WeightSource(folder)
    found = list(tensors(source))
    facts = metadata(source)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(found), len(facts))
    head += b"".join(_text(key) + _value(value) for key, value in facts.items())
    offset = 0
    for name, kind, shape, data in found:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += _text(name) + dims + struct.pack("<IQ", kind, offset)
        offset += _padded(data.numel())
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for _, _, _, data in found:
            file.write(data.numpy().tobytes().ljust(_padded(data.numel()), b"\0"))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class LlamaSide:
    """A process of llama-cpp-python with the model loaded, which decodes when it is asked and sleeps otherwise.

    Attributes:
        facts: version, vocabulary and what instructions it was built for.
    """

    def __init__(self, python: Path, gguf: Path, threads: int, context: int) -> None:
        command = [str(python), str(CHILD), str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{CHILD.name} ended with code {self._process.wait()}: run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def decode(self, first: int, count: int) -> dict[str, Any]:
        """{"tokens": count ids, "seconds": count - 1 times between them}, greedy, from an empty cache."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"first": first, "count": count}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
