"""GGUF: blocks against slow readers of their layout, metadata, and whole files read back by gguf-py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError
from qwen_quant.export import gguf as module
from qwen_quant.export.export import ExportJob, ExportResult, export_artifact
from qwen_quant.export.gguf_blocks import BLOCK, encode, narrowest
from qwen_quant.export.gguf_metadata import architecture_facts, read_vocabulary, splitting_rule
from qwen_quant.export.source import ExportSource
from qwen_quant.progress import no_progress
from qwen_quant.tokenizer import load_tokenizer
from tests.export.making import gptq_folder, quantized
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'qwen-quant[gguf]'")


def values_of(data: np.ndarray, kind: str) -> np.ndarray:
    """FP32 [rows, in], one block at a time."""
    size = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}[kind]
    rows = []
    for row in data:
        found: list[float] = []
        for start in range(0, len(row), size):
            block = row[start : start + size].tobytes()
            scale, rest = np.frombuffer(block[:2], np.float16)[0].astype(np.float32), block[2:]
            if kind == "Q8_0":
                found += [float(scale) * code for code in np.frombuffer(rest, np.int8).tolist()]
                continue
            high = int.from_bytes(rest[:4], "little") if kind == "Q5_0" else 0
            nibbles = rest[4:] if kind == "Q5_0" else rest
            low = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
            middle = 16 if kind == "Q5_0" else 8
            found += [float(scale) * ((code | (high >> i & 1) << 4) - middle) for i, code in enumerate(low)]
        rows.append(found)
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize(
    ("bits", "sym", "kind"),
    [(4, True, "Q4_0"), (3, True, "Q4_0"), (2, False, "Q4_0"), (4, False, "Q5_0"), (8, True, "Q8_0")],
)
def test_blocks_mean_the_weights(bits: int, sym: bool, kind: str) -> None:
    weight = quantized(torch.randn(6, 4 * BLOCK, generator=torch.Generator().manual_seed(1)), bits, sym=sym)
    block = narrowest(bits, sym=sym)
    assert block is not None and block.name == kind
    data = encode(weight, block).numpy()
    assert np.array_equal(values_of(data, kind), weight.dequantized().numpy())
    assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), weight.dequantized().numpy())


def test_no_type_holds_nine_bits() -> None:
    assert narrowest(8, sym=False) is None


def exported(artifact: Path, out: Path, **settings: Any) -> tuple[ExportResult, Any]:
    result = export_artifact(ExportJob(artifact, out, "gguf", **settings), no_progress)
    return result, gguf.GGUFReader(str(out / "model.gguf"))


def field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_every_weight_comes_back(tmp_path: Path, family: str) -> None:
    if "moe" in family:
        make_family_checkpoint(tmp_path / "model", family, mlp_only_layers=[], decoder_sparse_step=1)
    else:
        make_checkpoint(tmp_path / "model", family)
    gptq_folder(tmp_path / "model", tmp_path / "q", sym=family != "qwen3")
    result, reader = exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert result.proof.exact and result.proof.linears == len(ExportSource(tmp_path / "q").linears)
    name = family.replace("_", "")
    assert field(reader, "general.architecture") == name
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert field(reader, f"{name}.rope.freq_base") == config["rope_parameters"]["rope_theta"]
    assert field(reader, f"{name}.attention.head_count_kv") == config["num_key_value_heads"]
    names = {tensor.name: tensor for tensor in reader.tensors}
    assert names["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert names["token_embd.weight"].tensor_type.name == "BF16"
    if "moe" in family:
        stack = names["blk.1.ffn_gate_exps.weight"]
        count = ExportSource(tmp_path / "q").spec.expert_count
        assert stack.data.shape[0] == field(reader, f"{name}.expert_count") == count
        assert names["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    leftover = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" not in leftover and ("LICENSE" in leftover) == (tmp_path / "q" / "LICENSE").exists()


def test_the_first_generation_keeps_its_fused_attention_and_gets_its_vocabulary(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "model", "tiny7b")
    gptq_folder(model, tmp_path / "q")
    result, reader = exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert result.proof.exact and any("seq_length" in note for note in result.notes)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert field(reader, "qwen.feed_forward_length") == config["intermediate_size"]
    assert {"blk.0.attn_qkv.weight", "blk.0.attn_qkv.bias", "blk.0.ffn_up.weight"} <= {t.name for t in reader.tensors}


def test_the_vocabulary_is_the_tokenizers_own(tmp_path: Path) -> None:
    shutil.copytree(bundled_path("demo_checkpoint"), tmp_path / "demo")
    rows = json.loads((tmp_path / "demo" / "config.json").read_text())["vocab_size"]
    vocabulary, tokenizer = read_vocabulary(tmp_path / "demo", rows), load_tokenizer(tmp_path / "demo")
    assert vocabulary is not None and vocabulary.pre == "qwen2" and len(vocabulary.tokens) == rows
    inner = json.loads(tokenizer.backend_text())
    for text, index in inner["model"]["vocab"].items():
        assert vocabulary.tokens[index] == text
    assert vocabulary.tokens[-1].startswith("[PAD") == (vocabulary.types[-1] == 5)
    assert len(vocabulary.merges) == len(inner["model"]["merges"]) and " " in vocabulary.merges[0]
    assert vocabulary.tokens[vocabulary.special["eos_token_id"]] in ("<|im_end|>", "<|endoftext|>")


def test_unknown_splitting_rules_and_families_are_refused(tmp_path: Path) -> None:
    assert splitting_rule({"type": "Whitespace"}) == ""
    make_family_checkpoint(tmp_path / "hybrid", "qwen3_next")
    gptq_folder(tmp_path / "hybrid", tmp_path / "hq")
    assert any("family qwen3_next" in reason.what for reason in module.GGUF.check(ExportSource(tmp_path / "hq")))
    make_family_checkpoint(tmp_path / "mixed", "qwen2_moe")
    gptq_folder(tmp_path / "mixed", tmp_path / "mq")
    assert any(reason.what == "blocks without experts" for reason in module.GGUF.check(ExportSource(tmp_path / "mq")))
    make_checkpoint(tmp_path / "model", "qwen2")
    gptq_folder(tmp_path / "model", tmp_path / "act", act_order=True)
    with pytest.raises(InputError, match="act-order"):
        exported(tmp_path / "act", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scaled_rotations_are_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen2")
    gptq_folder(tmp_path / "model", tmp_path / "q")
    source = ExportSource(tmp_path / "q")
    theta = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    source.spec.config["rope_parameters"] = theta
    facts = architecture_facts(source)
    assert facts["rope.scaling.type"] == "yarn" and facts["rope.scaling.factor"] == 4.0
    assert facts["rope.scaling.original_context_length"] == 32768
    source.spec.config["rope_parameters"] = {**theta, "rope_type": "dynamic"}
    with pytest.raises(InputError, match="dynamic"):
        architecture_facts(source)


def test_a_killed_export_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "model", "qwen3", tied=False)
    gptq_folder(tmp_path / "model", tmp_path / "q")
    monkeypatch.setattr(module, "COMMIT_BYTES", 1)
    whole, _ = exported(tmp_path / "q", tmp_path / "whole", allow_inexact=True)
    real, calls = module._write_entry, []

    def dies(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_write_entry", dies)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert not (tmp_path / "out").exists()
    before = len(calls)
    exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    entries = len({t.name for t in gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).tensors})
    assert len(calls) - before == entries - 8  # eight were durable
    same = [(tmp_path / name / "model.gguf").read_bytes() for name in ("whole", "out")]
    assert len(same[0]) == len(same[1])
