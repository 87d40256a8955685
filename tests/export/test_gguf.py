"""GGUF: blocks against slow readers of their layout, metadata, and whole files read back by gguf-py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_quant.data import bundled_path
from qwen_quant.errors import InputError
from qwen_quant.export import gguf as module
from qwen_quant.export.export import ExportJob, ExportResult, export_artifact
from qwen_quant.export.formats import ExportOptions
from qwen_quant.export.gguf_blocks import BLOCK, encode, encode_q4_0, narrowest
from qwen_quant.export.gguf_metadata import architecture_facts, read_vocabulary, splitting_rule
from qwen_quant.export.pivot import LinearGrid, PackedRows, pack_codes
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


def test_packed_codes_become_the_same_blocks() -> None:
    weight, block = quantized(torch.randn(7, 6 * BLOCK), 4, sym=True), narrowest(4, sym=True)
    grid = LinearGrid(weight.scales, weight.zeros, weight.g_idx)
    assert block is not None
    assert torch.equal(encode_q4_0(PackedRows(pack_codes(weight.codes, 4), 4, grid)), encode(weight, block))


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
    assert field(reader, "tokenizer.ggml.model") == "no_vocab"  # one without merges, which llama.cpp does not load
    leftover = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in leftover and ("LICENSE" in leftover) == (tmp_path / "q" / "LICENSE").exists()


def test_the_first_generation_keeps_its_fused_attention_and_gets_its_vocabulary(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "model", "tiny7b")
    gptq_folder(model, tmp_path / "q")
    result, reader = exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert result.proof.exact and any("seq_length" in note for note in result.notes)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert field(reader, "qwen.feed_forward_length") == config["intermediate_size"]
    assert {"blk.0.attn_qkv.weight", "blk.0.attn_qkv.bias", "blk.0.ffn_up.weight"} <= {t.name for t in reader.tensors}
    planned, size = module.GGUF.plan(ExportSource(tmp_path / "q"), ExportOptions()).weight_bytes, result.output_bytes
    assert (tmp_path / "out" / "model.gguf").stat().st_size <= planned <= 1.05 * size
    leftover = {path.name for path in (tmp_path / "out").iterdir()}
    assert not leftover & {"tokenizer.json", "qwen.tiktoken", "config.json"}  # the vocabulary is in the file


def values(reader: Any, name: str) -> np.ndarray:
    """FP32 values of a tensor, in torch's shape."""
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    made = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(made, np.float32).reshape([int(size) for size in reversed(tensor.shape)])


def test_linear_attention_has_the_order_of_heads_that_llama_cpp_reads(tmp_path: Path) -> None:
    make_family_checkpoint(tmp_path / "model", "qwen3_5", linear_num_value_heads=6)
    dense = gptq_folder(tmp_path / "model", tmp_path / "q", sym=False)
    result, reader = exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert result.proof.exact and all("visual" in name for name in result.dropped)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    block, keys, heads, width = "model.language_model.layers.1", 2, 6, 32
    attention = f"{block}.linear_attn"
    # llama.cpp's value head j belongs to key head j % keys; transformers' value head h to key head h // (heads // keys)
    order = [j % keys * (heads // keys) + j // keys for j in range(heads)]
    rows = [head * width + k for head in order for k in range(width)]
    start = 2 * keys * width
    mixed = [*range(start), *(start + row for row in rows)]
    assert np.array_equal(values(reader, "blk.1.attn_qkv.weight"), dense[f"{attention}.in_proj_qkv"].numpy()[mixed])
    assert np.array_equal(values(reader, "blk.1.attn_gate.weight"), dense[f"{attention}.in_proj_z"].numpy()[rows])
    assert np.array_equal(values(reader, "blk.1.ssm_out.weight"), dense[f"{attention}.out_proj"].numpy()[:, rows])
    convolution = stored[f"{attention}.conv1d.weight"].float().squeeze(1).numpy()
    assert np.array_equal(values(reader, "blk.1.ssm_conv1d.weight"), convolution[mixed])
    assert np.array_equal(
        values(reader, "blk.1.ssm_alpha.weight"), stored[f"{attention}.in_proj_a.weight"].float().numpy()[order]
    )
    assert np.array_equal(values(reader, "blk.1.ssm_dt.bias"), stored[f"{attention}.dt_bias"].float().numpy()[order])
    assert np.array_equal(values(reader, "blk.1.ssm_a"), (-stored[f"{attention}.A_log"].float().exp()).numpy()[order])
    assert np.array_equal(values(reader, "blk.1.ssm_norm.weight"), stored[f"{attention}.norm.weight"].float().numpy())
    assert np.array_equal(
        values(reader, "blk.1.post_attention_norm.weight"),
        (1 + stored[f"{block}.post_attention_layernorm.weight"].float()).numpy(),
    )
    assert field(reader, "qwen35.ssm.group_count") == keys and field(reader, "qwen35.ssm.inner_size") == heads * width
    assert field(reader, "qwen35.full_attention_interval") == 4
    assert field(reader, "qwen35.rope.dimension_sections") == [11, 11, 10, 0]


def test_a_fused_projection_is_divided(tmp_path: Path) -> None:
    make_family_checkpoint(tmp_path / "model", "qwen3_next")
    dense = gptq_folder(tmp_path / "model", tmp_path / "q")
    result, reader = exported(tmp_path / "q", tmp_path / "out", allow_inexact=True)
    assert result.proof.exact
    fused = dense["model.layers.0.linear_attn.in_proj_qkvz"].numpy()
    parts: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": [], "z": []}
    row = 0
    for _ in range(2):  # key heads, each with 32 rows of q and of k and 2 value heads of v and of z
        for part, count in (("q", 32), ("k", 32), ("v", 64), ("z", 64)):
            parts[part].append(fused[row : row + count])
            row += count
    expected = np.concatenate([*parts["q"], *parts["k"], *parts["v"]])
    assert row == len(fused) and np.array_equal(values(reader, "blk.0.attn_qkv.weight"), expected)
    assert np.array_equal(values(reader, "blk.0.attn_gate.weight"), np.concatenate(parts["z"]))


def test_a_large_file_is_split_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen3", tied=False)
    gptq_folder(tmp_path / "model", tmp_path / "q")
    _, whole = exported(tmp_path / "q", tmp_path / "whole", allow_inexact=True)
    job = ExportJob(tmp_path / "q", tmp_path / "out", "gguf", allow_inexact=True, split_bytes=150_000)
    assert export_artifact(job, no_progress).proof.exact
    paths = sorted((tmp_path / "out").glob("*.gguf"))
    count = len(paths)
    assert count > 2 and [p.name for p in paths] == [f"model-{k + 1:05d}-of-{count:05d}.gguf" for k in range(count)]
    readers = [gguf.GGUFReader(str(path)) for path in paths]
    for k, reader in enumerate(readers):
        assert field(reader, "split.no") == k and field(reader, "split.count") == count
        assert field(reader, "split.tensors.count") == len(whole.tensors)
        assert ("qwen3.block_count" in reader.fields) == (k == 0)  # the first file speaks for all
        assert sum(int(tensor.n_bytes) for tensor in reader.tensors) <= 150_000 or len(reader.tensors) == 1
    found = {tensor.name: tensor.data.tobytes() for reader in readers for tensor in reader.tensors}
    assert found == {tensor.name: tensor.data.tobytes() for tensor in whole.tensors}


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
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    make_family_checkpoint(tmp_path / "hybrid", "qwen3_5_text", layer_types=kinds)
    gptq_folder(tmp_path / "hybrid", tmp_path / "hq")
    found = [reason.what for reason in module.GGUF.check(ExportSource(tmp_path / "hq"))]
    assert found == ["the order of attention kinds", "a tokenizer without merges"]
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
    assert not any("rotation" in reason.what for reason in module.GGUF.check(source))
    source.spec.config["rope_parameters"] = {**theta, "rope_type": "dynamic"}
    assert any("'dynamic'" in reason.what for reason in module.GGUF.check(source))  # before anything is written


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
