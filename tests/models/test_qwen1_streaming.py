"""First-generation folders through the streaming engine: blocks equal the model, artifacts keep names and reload."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_quant.block_solver import _tap
from qwen_quant.checkpoint.families import model_spec, read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.evaluation.validate import validate_pair
from qwen_quant.inspection import inspect_path
from qwen_quant.models import qwen1_config
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.packing import SUFFIXES, unpack_weight
from qwen_quant.plan import make_plan
from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig, ValidationConfig
from qwen_quant.runtime.loading import WeightSource, load_model
from qwen_quant.sequential import quantize_checkpoint
from tests.support.checkpoints import edit_tensors, text_file, write_tokenizer
from tests.support.qwen1 import GOLDEN, copy_checkpoint, use_first_release_keys

ORDER = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original folder, auto_map and Python files included, with a tokenizer."""
    made = copy_checkpoint(tmp_path_factory.mktemp("qwen1") / "tiny7b", auto_map=True)
    write_tokenizer(made)
    return made


def job_for(model: Path, out: Path) -> QuantizeJob:
    text = text_file(out.parent / "calibration.txt")
    calibration = CalibrationConfig(source=str(text), num_samples=12, seq_len=64)
    return QuantizeJob(
        model, out, GPTQConfig(group_size=32), calibration, RunConfig(device="cpu"), source_id="test/tiny"
    )


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    quantize_checkpoint(job_for(folder, folder.parent / "int4"), no_progress)
    return folder.parent / "int4"


@torch.no_grad()
def streamed_logits(source: WeightSource, ids: torch.Tensor) -> torch.Tensor:
    """Logits with one block in memory at a time."""
    skeleton = Skeleton(source.spec, torch.device("cpu"), torch.float32)
    hidden = source.reader.gather_rows(source.spec.family.embedding + ".weight", ids).float()
    for layer in range(source.spec.num_layers):
        hidden = skeleton.block(layer, source.dense)(hidden, **skeleton.context(layer, ids.shape[1]))
    return skeleton.final_norm(source.dense)(hidden) @ source.dense(skeleton.head_name()).float().T


@pytest.mark.parametrize("tokens", [20, 32, 33, 100])
def test_streaming_equals_the_whole_model(tokens: int, folder: Path) -> None:
    """To the last bit, with the NTK factor and LogN of the rows' own length past S = 32."""
    ids = torch.randint(0, 512, (2, tokens), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        assert torch.equal(streamed_logits(WeightSource(folder), ids), whole(ids).logits)


def test_block_halves_equal_the_block(folder: Path) -> None:
    """The solver's way through a block (norm, body, output linear) is the block's own forward pass."""
    reader, spec = CheckpointReader(folder), read_model_spec(folder)
    skeleton = Skeleton(spec, torch.device("cpu"), torch.float32)
    block, context = skeleton.block(0, reader.read), skeleton.context(0, 48)
    hidden = torch.randn(2, 48, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = block(hidden, **context)
        for sub in spec.family.sub_blocks:
            hidden = hidden + block.get_submodule(sub.output)(_tap(block, sub, hidden, context))
    assert torch.equal(hidden, wanted)


def test_an_artifact_keeps_names_and_order(folder: Path, artifact: Path) -> None:
    original, written = CheckpointReader(folder), CheckpointReader(artifact)
    manifest = json.loads((artifact / "qwen-quant.json").read_text())
    wanted = [f"transformer.h.{layer}.{name}" for layer in range(2) for name in ORDER]
    assert [layer["name"] for layer in manifest["layers"]] == wanted
    packed = {f"{name}.{suffix}" for name in wanted for suffix in SUFFIXES}
    kept = set(original.names) - {f"{name}.weight" for name in wanted}
    assert set(written.names) == packed | kept
    assert all(torch.equal(written.read(name), original.read(name)) for name in kept)
    config = json.loads((artifact / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    settings = json.loads((artifact / "quantize_config.json").read_text())
    assert (settings["model_file_base_name"], settings["true_sequential"]) == ("model", True)
    assert not list(artifact.glob("*.py"))
    for layer in manifest["layers"]:
        assert layer["relative_error"] < 0.8 * layer["rounding_error"], layer


def test_an_artifact_loads_and_streams(folder: Path, artifact: Path) -> None:
    """load_model gives the dequantized weights under the original names; streaming the artifact gives its logits."""
    model, source = load_model(artifact), WeightSource(artifact)
    name = "transformer.h.1.attn.c_attn"
    parts = {suffix: source.reader.read(f"{name}.{suffix}") for suffix in SUFFIXES}
    assert torch.equal(model.get_submodule(name).weight, unpack_weight(parts, 4, "gptq").dequantized())
    ids = torch.randint(0, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(streamed_logits(source, ids), logits)
        full = load_model(folder)(ids).logits
    assert 0 < float((logits - full).norm() / full.norm()) < 0.6
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 43)


def test_inspect_and_plan(folder: Path, artifact: Path) -> None:
    seen = inspect_path(folder)
    assert (seen.model_type, seen.num_layers, seen.hidden_size) == ("qwen", 2, 64)
    assert not seen.accounting.missing and not seen.accounting.unaccounted
    assert inspect_path(artifact).accounting.quantized_linears == 10
    plan = make_plan(job_for(folder, folder.parent / "planned"))
    assert plan.seconds > 0 and plan.output_bytes == sum(i.nbytes for i in map_infos(artifact))


def map_infos(folder: Path) -> list:
    reader = CheckpointReader(folder)
    return [reader.info(name) for name in reader.names]


def test_validate(folder: Path, artifact: Path) -> None:
    """The two models streamed against each other are closer than two unrelated ones and not equal."""
    text = text_file(folder.parent / "evaluation.txt")
    config = ValidationConfig(texts=(str(text),), window_tokens=48, max_windows=3, smoke=False, device="cpu")
    found = [validate_pair(folder, other, config, no_progress).texts[0].divergence for other in (artifact, folder)]
    assert 0 < found[0].kl_mean < 1 and abs(found[1].kl_mean) < 1e-6


def test_first_release_folder(folder: Path, tmp_path: Path) -> None:
    old = copy_checkpoint(tmp_path / "old")
    use_first_release_keys(old)
    spec = read_model_spec(old)
    assert (spec.num_layers, spec.hidden_size, spec.tied_head) == (2, 64, False)
    ids = torch.arange(40)[None]
    assert torch.equal(streamed_logits(WeightSource(old), ids), streamed_logits(WeightSource(folder), ids))


def test_auto_map_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    qwen1_config.say_auto_map_is_ignored.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Skeleton(read_model_spec(folder), torch.device("cpu"), torch.float32)
    assert sum("auto_map" in record.getMessage() for record in caplog.records) == 1


def test_a_missing_bias_is_named(folder: Path, tmp_path: Path) -> None:
    damaged = copy_checkpoint(tmp_path / "damaged")
    write_tokenizer(damaged)
    edit_tensors(damaged, transformer__h__1__attn__c_attn__bias=None)
    with pytest.raises(InputError, match=r"transformer\.h\.1\.attn\.c_attn\.bias"):
        load_model(damaged)
    with pytest.raises(InputError, match=r"lacks the tensor 'transformer\.h\.1\.attn\.c_attn\.bias'"):
        quantize_checkpoint(job_for(damaged, tmp_path / "out"), no_progress)


def test_a_config_that_fits_no_model(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "tiny7b" / "config.json").read_text())
    with pytest.raises(InputError, match="does not describe a model"):
        Skeleton(model_spec({**config, "kv_channels": 24}, "here"), torch.device("cpu"), torch.float32)


def test_zero_biases_of_published_artifacts_load(artifact: Path, tmp_path: Path) -> None:
    """AutoGPTQ of 2023 gave every packed linear a bias, of zeros where the model has none."""
    tensors = load_file(artifact / "model.safetensors")
    for layer in range(2):
        for name, width in (("attn.c_proj", 64), ("mlp.w1", 160), ("mlp.w2", 160), ("mlp.c_proj", 64)):
            tensors[f"transformer.h.{layer}.{name}.bias"] = torch.zeros(width, dtype=torch.float16)
    published = tmp_path / "published"
    published.mkdir()
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((artifact / "config.json").read_text())
    settings = config["quantization_config"]
    settings.pop("checkpoint_format")
    (published / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(published)(ids).logits, load_model(artifact)(ids).logits)
    tensors["transformer.h.0.mlp.w1.bias"] += 1
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected tensor 'transformer\.h\.0\.mlp\.w1\.bias'"):
        load_model(published)
