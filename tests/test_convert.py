"""`convert --to qwen2`: the golden logits, exact splits of packed linears, the proof, resuming, and every bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from qwen_quant import cli, convert
from qwen_quant.checkpoint import moves
from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.checkpoint.writer import PlannedWriter
from qwen_quant.convert import ConvertJob, ConvertResult, convert_to_qwen2
from qwen_quant.errors import AuditError, InputError
from qwen_quant.evaluation import equality
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight
from qwen_quant.progress import no_progress
from qwen_quant.qwen1_to_qwen2 import NAMES, qwen2_quantization, target_bases
from qwen_quant.recipe import RunConfig
from qwen_quant.resume import WorkFolder
from qwen_quant.runtime.loading import WeightSource
from tests.support.artifacts import change_config, rounded
from tests.support.checkpoints import edit_tensors, split
from tests.support.qwen1_vocabulary import write_qwen1_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "qwen1"
TOLERANCE = 2e-5  # of the golden data's README
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
QKV = tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
PUBLISHED = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}


def run(model: Path, out: Path, **settings: Any) -> ConvertResult:
    return convert_to_qwen2(ConvertJob(model, out, "test/tiny", run=RunConfig(**settings)), no_progress)


@pytest.fixture
def tiny7b(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "tiny7b", tmp_path / "tiny7b")


@pytest.fixture
def tiny72b(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "tiny72b", tmp_path / "tiny72b")


def packed_linear(weight: torch.Tensor, bits: int, *, act_order: bool) -> QuantizedWeight:
    """Rounding of [out, in]; with act_order the groups of 32 columns are scattered over the columns."""
    if not act_order:
        return rounded(weight, bits, sym=False)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
    grouped = rounded(weight[:, order], bits, sym=False)
    codes, g_idx = torch.empty_like(grouped.codes), torch.empty_like(grouped.g_idx)
    codes[:, order], g_idx[order] = grouped.codes, grouped.g_idx
    return QuantizedWeight(codes, grouped.scales, grouped.zeros, g_idx)


def quantize(folder: Path, bits: int = 4, *, act_order: bool = False, zero_biases: bool = False) -> None:
    """Make the folder a GPTQ one, as published; `zero_biases` as old AutoGPTQ wrote them."""
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        base = name.removesuffix(".weight")
        if not base.endswith(LINEARS) or base == name:
            tensors[name] = value.half()
            continue
        for suffix, part in pack_weight(packed_linear(value, bits, act_order=act_order), bits, "gptq").items():
            tensors[f"{base}.{suffix}"] = part
        if zero_biases and not base.endswith("c_attn"):
            tensors[f"{base}.bias"] = torch.zeros(value.shape[0], dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={**PUBLISHED, "bits": bits, "desc_act": act_order})


def transformers_logits(folder: Path, **inputs: torch.Tensor) -> torch.Tensor:
    """Every 8th column, as the golden logits are stored."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(**inputs).logits[..., ::8]


@pytest.mark.parametrize("case", ["short", "batch", "len32", "leftpad", "tiny72b.short", "tiny72b.long"])
def test_golden_logits_through_transformers_qwen2(tmp_path: Path, case: str) -> None:
    source = GOLDEN / ("tiny72b" if case.startswith("tiny72b") else "tiny7b")
    result = run(source, tmp_path / "out")
    golden = load_file(GOLDEN / "logits.safetensors")
    inputs = {"input_ids": golden[f"{case}.input_ids"]}
    mask = golden.get(f"{case}.attention_mask")
    real = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    if mask is not None:
        inputs["attention_mask"] = mask
    difference = (transformers_logits(tmp_path / "out", **inputs) - golden[f"{case}.logits"])[real.bool()]
    assert float(difference.abs().max()) <= TOLERANCE
    assert result.source_tensors == len(result.tensors) == 19 and result.output_tensors == 27
    assert result.logits.largest_difference <= result.logits.tolerance
    assert 0 < result.logits.fp32_noise < TOLERANCE


def test_the_limit_is_stated(tiny7b: Path, tiny72b: Path, tmp_path: Path) -> None:
    result = run(tiny7b, tmp_path / "a")
    assert result.exact_up_to_tokens == 32 and result.lost_beyond == ("dynamic NTK", "LogN")
    assert "EXACT UP TO 32 TOKENS ONLY" in result.warnings[0]
    manifest = json.loads((tmp_path / "a" / "qwen-quant.json").read_text())
    assert manifest["exact"]["up_to_tokens"] == 32 and "dynamic NTK and LogN" in manifest["exact"]["statement"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"], config["intermediate_size"]) == (32, 10000.0, 160)
    assert (config["num_key_value_heads"], config["tie_word_embeddings"], config["hidden_act"]) == (4, False, "silu")
    exact = run(tiny72b, tmp_path / "b")
    assert exact.exact_up_to_tokens is None and not exact.lost_beyond
    change_config(tiny7b, use_dynamic_ntk=False)
    assert run(tiny7b, tmp_path / "c").lost_beyond == ("LogN",)


def test_past_the_limit_the_models_do_differ(tmp_path: Path) -> None:
    """The warning is not idle: 64 tokens on a model trained for 32."""
    run(GOLDEN / "tiny7b", tmp_path / "out")
    golden = load_file(GOLDEN / "logits.safetensors")
    ours = transformers_logits(tmp_path / "out", input_ids=golden["len64.input_ids"])
    assert float((ours - golden["len64.ntk1.logn1.logits"]).abs().max()) > 0.01
    assert float((ours - golden["len64.ntk0.logn0.logits"]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_packed_linears_dequantize_bit_equal(tiny7b: Path, tmp_path: Path, bits: int, act_order: bool) -> None:
    quantize(tiny7b, bits, act_order=act_order)
    result = run(tiny7b, tmp_path / "out")
    source, target = WeightSource(tiny7b), WeightSource(tmp_path / "out")
    assert result.kind == target.kind == f"gptq {bits} bit"
    for base in source.spec.linear_names():
        parts = [target.quantized(name) for name in target_bases(base)]
        whole = source.quantized(base)
        assert torch.equal(torch.cat([part.dequantized() for part in parts]), whole.dequantized())
        assert all(torch.equal(part.g_idx, whole.g_idx) for part in parts)
    bias = source.reader.read("transformer.h.1.attn.c_attn.bias")
    assert torch.equal(torch.cat([target.reader.read(f"{name}.bias") for name in QKV]), bias)
    assert {r.how for r in result.tensors} == {"unchanged", "split by rows", "split by columns", "shared"}


def test_published_settings_are_carried_over(tiny7b: Path, tmp_path: Path) -> None:
    quantize(tiny7b, zero_biases=True)
    blocks = {"modules_in_block_to_quantize": [["attn.c_attn"], ["mlp.w1", "mlp.w2"]], "block_name_to_quantize": "x"}
    blocks["block_name_to_quantize"] = "transformer.h"
    change_config(tiny7b, quantization_config={**PUBLISHED, **blocks})
    result = run(tiny7b, tmp_path / "out")
    assert len(result.dropped) == 8 and "transformer.h.0.attn.c_proj.bias" in result.dropped
    assert len(result.tensors) + len(result.dropped) == result.source_tensors
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED
    assert settings["block_name_to_quantize"] == "model.layers"
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert settings["modules_in_block_to_quantize"] == [qkv, ["mlp.up_proj", "mlp.gate_proj"]]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == settings


def test_settings_from_quantize_config_alone(tiny7b: Path, tmp_path: Path) -> None:
    quantize(tiny7b)
    change_config(tiny7b, quantization_config=None)
    without_method = {key: value for key, value in PUBLISHED.items() if key != "quant_method"}
    (tiny7b / "quantize_config.json").write_text(json.dumps(without_method))
    run(tiny7b, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == PUBLISHED and config["torch_dtype"] == "float16"


def test_a_module_name_without_counterpart_is_refused() -> None:
    assert qwen2_quantization({"modules_to_not_convert": ["lm_head"]})["modules_to_not_convert"] == ["lm_head"]
    with pytest.raises(InputError, match="modules_to_not_convert"):
        qwen2_quantization({"modules_to_not_convert": ["transformer.h.0.attn.rotary"]})


def test_shards_dtypes_and_old_config_keys(tiny72b: Path, tmp_path: Path) -> None:
    tensors = {name: value.bfloat16() for name, value in load_file(tiny72b / "model.safetensors").items()}
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tiny72b / "model.safetensors", metadata={"format": "pt"})
    split(tiny72b, 3)
    old = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    old |= {"intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions"}
    config = json.loads((tiny72b / "config.json").read_text())
    config = {old.get(key, key): value for key, value in config.items()}
    config = {**config, "vocab_size": 500, "padded_vocab_size": 512, "auto_map": {"AutoModel": "modeling_qwen.X"}}
    (tiny72b / "config.json").write_text(json.dumps(config))
    result = run(tiny72b, tmp_path / "out", max_shard_size_bytes=100_000)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["vocab_size"], written["hidden_size"], written["torch_dtype"]) == (512, 64, "bfloat16")
    assert "auto_map" not in written
    assert result.dropped == {"transformer.rotary_emb.inv_freq": "a buffer that runtimes compute"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    target = WeightSource(tmp_path / "out")
    assert torch.equal(target.dense("model.layers.0.mlp.gate_proj.weight"), tensors["transformer.h.0.mlp.w2.weight"])


def test_pieces_smaller_than_a_tensor_change_nothing(
    tiny7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny7b, tmp_path / "a")
    monkeypatch.setattr("qwen_quant.checkpoint.reader._PART_BYTES", 1000)
    run(tiny7b, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_companions_and_tokenizer(tmp_path: Path) -> None:
    """A model with the real vocabulary and its padding rows, beside files that must and must not travel."""
    folder = tmp_path / "chat"
    write_qwen1_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "tiny7b" / name, folder / name)
    wide = {n: torch.randn(151936, 64, generator=generator).bfloat16() for n in ("transformer__wte", "lm_head")}
    edit_tensors(folder, **{f"{name}__weight": value for name, value in wide.items()})
    change_config(folder, vocab_size=151936)
    generation = {"chat_format": "chatml", "max_window_size": 24000, "eos_token_id": 151643, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for name in ("LICENSE", "NOTICE", "modeling_qwen.py", "cache_autogptq_cuda_256.cpp", "README.md"):
        (folder / name).write_text("made up for a test")
    result = run(folder, tmp_path / "out")
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= present
    gone = {"modeling_qwen.py", "tokenization_qwen.py", "cache_autogptq_cuda_256.cpp", "qwen.tiktoken", "README.md"}
    assert not gone & present and gone <= set(result.left_behind)
    assert not (folder / "ran").exists()
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [151645, 151644, 151643] and written["top_p"] == 0.8
    assert "chat_format" not in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (151936, 151643, 151645)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True, return_dict=False)
    assert ids[0] == 151644 and 151645 in ids
    change_config(folder, vocab_size=512)
    edit_tensors(folder, **{f"{name}__weight": value[:512].clone() for name, value in wide.items()})
    with pytest.raises(InputError, match="does not belong to these weights"):
        run(folder, tmp_path / "narrow")


def test_swapped_branches_fail_the_proof(tiny7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up, gate = "transformer.h.{}.mlp.w1", "transformer.h.{}.mlp.w2"
    monkeypatch.setitem(NAMES, up, ("model.layers.{}.mlp.gate_proj",))
    monkeypatch.setitem(NAMES, gate, ("model.layers.{}.mlp.up_proj",))
    with pytest.raises(AuditError, match="not the same model"):
        run(tiny7b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_base_fails_the_proof(tiny72b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = convert.qwen2_config
    monkeypatch.setattr(convert, "qwen2_config", lambda *given: {**made(*given), "rope_theta": 999_000.0})
    with pytest.raises(AuditError, match="not the same model"):
        run(tiny72b, tmp_path / "out")


def test_one_wrong_bit_fails_the_audit(tiny7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(tiny7b)
    write = PlannedWriter.write

    def damaged(self: PlannedWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor ^ 1 if name.endswith("1.self_attn.k_proj.qweight") else tensor)

    monkeypatch.setattr(PlannedWriter, "write", damaged)
    with pytest.raises(AuditError, match="h.1.attn.c_attn.qweight"):
        run(tiny7b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_continues(tiny7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny7b, tmp_path / "whole", max_shard_size_bytes=100_000)
    monkeypatch.setattr(convert, "COMMIT_BYTES", 1)
    copied: list[str] = []

    def copy(reader: Any, writer: PlannedWriter, move: moves.Move) -> str:
        if len(copied) == 9:
            raise KeyboardInterrupt
        copied.append(move.source.name)
        return moves.copy_tensor(reader, writer, move)

    monkeypatch.setattr(convert, "copy_tensor", copy)
    with pytest.raises(KeyboardInterrupt):
        run(tiny7b, tmp_path / "out", max_shard_size_bytes=100_000)
    assert not (tmp_path / "out").exists() and WorkFolder(tmp_path / "out").root.is_dir()
    first, copied[:] = list(copied), []
    monkeypatch.setattr(convert, "copy_tensor", lambda *given: copied.append("x") or moves.copy_tensor(*given))
    run(tiny7b, tmp_path / "out", max_shard_size_bytes=100_000)
    assert len(first) + len(copied) == 19
    assert not WorkFolder(tmp_path / "out").root.exists()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_an_unfinished_run_of_another_source_is_not_continued(tiny7b: Path, tmp_path: Path) -> None:
    WorkFolder(tmp_path / "out").open({"convert": "something else"}, resume=True)
    with pytest.raises(InputError, match="other settings"):
        run(tiny7b, tmp_path / "out")
    run(tiny7b, tmp_path / "out", resume=False)


def test_force_replaces_only_when_complete(tiny7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="exists"):
        run(tiny7b, out)
    with pytest.raises(InputError, match="holds MODEL"):
        run(tiny7b, tmp_path, force=True)
    with pytest.raises(InputError, match="holds MODEL"):
        run(tiny7b, tiny7b, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(equality, "RELATIVE_FLOOR", -1.0)
        patch.setattr(equality, "NOISE_FACTOR", -1.0)
        with pytest.raises(AuditError):
            run(tiny7b, out, force=True)
    assert (out / "precious").is_file()
    run(tiny7b, out, force=True)
    assert not (out / "precious").exists() and (out / "config.json").is_file()


def damage_config(**changes: Any) -> Any:
    return lambda folder: change_config(folder, **changes)


def damage_tensors(**changes: torch.Tensor | None) -> Any:
    return lambda folder: edit_tensors(folder, **changes)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def nonzero_bias(folder: Path) -> None:
    quantize(folder, zero_biases=True)
    edit_tensors(folder, transformer__h__1__mlp__w1__bias=torch.ones(160).half())


def half_packed(folder: Path) -> None:
    quantize(folder)
    edit_tensors(folder, transformer__h__1__mlp__w1__g_idx=None)


def both(folder: Path) -> None:
    quantize(folder)
    edit_tensors(folder, transformer__h__1__mlp__w1__weight=torch.ones(160, 64).half())


def bitsandbytes(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    edit_tensors(folder, transformer__h__0__attn__c_attn__SCB=torch.ones(192))


BAD = {
    "a qwen2 folder": (damage_config(model_type="qwen2"), "nothing to do"),
    "another family": (damage_config(model_type="llama"), "only first-generation Qwen"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "bitsandbytes": (bitsandbytes, "cannot be split"),
    "missing tensor": (damage_tensors(transformer__ln_f__weight=None), "lacks the tensor 'transformer.ln_f.weight'"),
    "missing bias": (damage_tensors(transformer__h__1__attn__c_attn__bias=None), "lacks the tensor .*c_attn.bias"),
    "unexpected tensor": (damage_tensors(transformer__odd=torch.ones(3)), "unexpected tensor 'transformer.odd'"),
    "unexpected bias": (damage_tensors(transformer__h__0__mlp__w1__bias=torch.zeros(160)), "unexpected tensor"),
    "misshapen tensor": (damage_tensors(lm_head__weight=torch.ones(500, 64)), "shape"),
    "wrong dtype": (damage_tensors(transformer__ln_f__weight=torch.ones(64, dtype=torch.int32)), "int32"),
    "truncated shard": (truncate, "truncated or corrupt"),
    "a bias that is not zero": (nonzero_bias, "is not zero"),
    "half a packed linear": (half_packed, "lacks the tensor .*g_idx"),
    "packed and plain": (both, "both packed and plain"),
    "partial rotary": (damage_config(rotary_pct=0.5), "rotary_pct"),
    "more biases": (damage_config(no_bias=False), "no_bias"),
    "tied": (damage_config(tie_word_embeddings=True), "tie_word_embeddings"),
    "windows": (damage_config(attention_windows=[8, None]), "attention_windows"),
    "no seq_length": (damage_config(seq_length=None), "seq_length"),
    "not finite": (damage_tensors(transformer__ln_f__weight=torch.full((64,), torch.nan)), "."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_appears(
    name: str, tiny7b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD[name]
    damage(tiny7b)
    with pytest.raises((InputError, AuditError), match=message):
        run(tiny7b, tmp_path / "out")
    assert cli.run(["convert", str(tiny7b), str(tmp_path / "out"), "--to", "qwen2"]) in (1, 3)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(tiny7b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run(["convert", str(tiny7b), str(out), "--to", "gguf9"]) == 2
    assert cli.run(["convert", str(tiny7b), str(out)]) == 2
    capsys.readouterr()
    assert cli.run(["convert", str(tiny7b), str(out), "--to", "qwen2", "--quiet"]) == 0
    text = capsys.readouterr().out
    for words in ("WARNING: EXACT UP TO 32 TOKENS ONLY", "19 of 19", "FP32 noise of the same logits", "32 of 32"):
        assert words in text
    assert cli.run(["convert", str(tiny7b), str(out), "--to", "qwen2", "--quiet"]) == 3
    capsys.readouterr()
    assert cli.run(["convert", str(tiny7b), str(out), "--to", "qwen2", "--quiet", "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "convert" and document["exact_up_to_tokens"] == 32
    assert document["logits"]["largest_difference"] <= document["logits"]["tolerance"]
    manifest = json.loads((out / "qwen-quant.json").read_text())
    assert manifest["tensors"] == document["tensors"] and len(document["tensors"]) == 19
    for name, digest in manifest["output"]["sha256"].items():
        assert file_sha256(out / name) == digest
