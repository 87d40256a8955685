"""Families with routed experts and linear attention, end to end on tiny checkpoints: each expert like any linear."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_quant import sequential
from qwen_quant.block_solver import _tap, joined
from qwen_quant.checkpoint.families import SparseBlock, SubBlock, model_spec, read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import AuditError, InputError
from qwen_quant.evaluation.report import layers_of
from qwen_quant.evaluation.streaming import final_hidden
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.plan import make_plan
from qwen_quant.runtime.loading import WeightSource, load_model
from tests.support.checkpoints import edit_tensors
from tests.support.moe import (
    EXPERTS,
    FAMILY_CONFIGS,
    LAYERS,
    SPARSE_FAMILIES,
    TOP_K,
    fuse_experts,
    make_family_checkpoint,
)
from tests.test_interop import SCRIPT, expected_logits
from tests.test_sequential import hashes, interrupted, job_for, quantize

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
TOKENS = 12 * 64
CPU = torch.device("cpu")
KEPT = re.compile(r".*(mlp\.gate|expert_gate|conv1d|A_log|dt_bias|in_proj_(ba|a|b)|norm|embed_tokens|lm_head)\b.*")
NEW = re.compile(r".*\.(ple|indexer|(attn|mlp)_hyper_connection|hyper_connection_mixer)\.")
TWO_BLOCKS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module", params=list(FAMILY_CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_checkpoint(tmp_path_factory.mktemp(family) / "in", family)


@pytest.fixture(scope="module")
def result(source: Path) -> sequential.QuantizeResult:
    return quantize(source, source.parent / "out", expert_min_tokens=8)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3_moe with experts in blocks 1 and 3."""
    return make_family_checkpoint(tmp_path_factory.mktemp("moe") / "in", "qwen3_moe")


def reference_logits(folder: Path) -> torch.Tensor:
    """transformers' own loader of a 16-bit folder, fused experts and all."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def test_streaming_equals_the_whole_model(source: Path) -> None:
    reader, spec = CheckpointReader(source), read_model_spec(source)
    skeleton = Skeleton(spec, CPU, torch.float32)
    hidden = reader.gather_rows(spec.family.embedding + ".weight", IDS).float().repeat(1, 1, spec.stream_copies)
    with torch.no_grad():
        for layer in range(spec.num_layers):
            context = skeleton.context(layer, IDS.shape[1], IDS)
            hidden = skeleton.block(layer, reader.read, reader.gather_rows)(hidden, **context)
        logits = skeleton.final_norm(reader.read)(hidden) @ reader.read(skeleton.head_name()).float().T
    expected = reference_logits(source)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_halves_equal_the_block(source: Path) -> None:
    """The solver's way through every kind of block is the block's own forward pass."""
    reader, spec = CheckpointReader(source), read_model_spec(source)
    skeleton = Skeleton(spec, CPU, torch.float32)
    start = torch.randn(2, 32, spec.stream_width, generator=torch.Generator().manual_seed(1))
    for halves, layers in spec.kinds().items():
        block = skeleton.block(layers[0], reader.read)
        context = skeleton.context(layers[0], 32, IDS[:, :32])
        hidden = start
        with torch.no_grad():
            for half in halves:
                if isinstance(half, SubBlock) and half.lookup:
                    hidden = hidden + block.get_submodule(half.lookup)(hidden, IDS[:, :32], None)
                if isinstance(half, SubBlock):
                    added = block.get_submodule(half.output)(_tap(block, half, hidden, context))
                else:
                    added = block.get_submodule(half.module)(block.get_submodule(half.norm)(hidden))
                hidden = joined(block, half, hidden, added)
            assert torch.equal(hidden, block(start, **context))


def test_every_parameter_is_quantized_or_kept_by_rule(source: Path, result: sequential.QuantizeResult) -> None:
    spec, artifact, original = read_model_spec(source), CheckpointReader(result.out), CheckpointReader(source)
    linears = set(spec.linear_names())
    assert {layer.name for layer in result.layers} == linears and len(result.layers) == len(linears)
    experts = [name for name in linears if ".experts." in name]
    sparse = sum(isinstance(half, SparseBlock) for halves in spec.blocks for half in halves)
    assert len(experts) == sparse * EXPERTS * 3 and bool(sparse) == (spec.family.model_type in SPARSE_FAMILIES)
    for name in original.names:
        base = name.removesuffix(".weight")
        if base in linears:
            assert f"{base}.qweight" in artifact and name not in artifact
        else:
            assert KEPT.fullmatch(name) or name.endswith("bias") or ".visual." in name or NEW.match(name), name
            assert torch.equal(artifact.read(name), original.read(name))
    for layer in result.layers:
        assert layer.relative_error < layer.rounding_error, layer


def test_the_artifact_gives_the_logits_of_its_dequantized_weights(
    source: Path, result: sequential.QuantizeResult, tmp_path: Path
) -> None:
    """A folder of dequantized weights, read by transformers with fused experts, against our reading of the artifact."""
    packed = WeightSource(result.out)
    names = CheckpointReader(source).names
    constants = {name for name in names if CheckpointReader(source).info(name).dtype == torch.int64}
    tensors = {name: packed.dense(name).float().contiguous() for name in names if name not in constants}
    tensors |= {name: packed.reader.read(name) for name in constants}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    expected = reference_logits(tmp_path)
    assert (expected - reference_logits(source)).abs().max() > 1e-3, "nothing was quantized"
    with torch.no_grad():
        logits = load_model(result.out)(IDS).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel serves GPTQ folders")
def test_transformers_loads_the_artifact_as_it_was_written(result: sequential.QuantizeResult) -> None:
    """With its skip lists, for which transformers' own class wants optimum, and without optimum or gptqmodel."""
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    assert len(model.kernel_report.linears) == len(result.layers)
    with torch.no_grad():
        ours, expected = model(IDS).logits, load_model(result.out)(IDS).logits
    assert (ours - expected).abs().max() < 2e-3 * expected.abs().max()


def test_evaluation_streams_the_artifact(source: Path, result: sequential.QuantizeResult) -> None:
    for folder in (source, result.out):
        weights = WeightSource(folder)
        skeleton = Skeleton(weights.spec, CPU, torch.float32)
        hidden = final_hidden(weights, skeleton, IDS, lambda: None).load(0, 2)
        with torch.no_grad():
            states = load_model(folder)(IDS, output_hidden_states=True).hidden_states[-1]
            normed = skeleton.final_norm(weights.dense)(hidden)
        assert torch.allclose(normed, states, atol=1e-4)


def test_the_report_reads_the_statistics_of_every_layer(source: Path, result: sequential.QuantizeResult) -> None:
    layers = layers_of(result.out)
    assert [dataclasses.replace(layer, seconds=0.0) for layer in result.layers] == list(layers)


def test_plan_times_every_kind_of_block(source: Path) -> None:
    estimate = make_plan(job_for(source, source.parent / "planned"))
    assert estimate.seconds > 0 and estimate.peak_memory_bytes < 4 * 2**30


def test_the_timing_of_a_plan_does_not_warn(moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs a few rows with settings of its own: what experts get there is nobody's concern."""
    job = job_for(moe, tmp_path / "planned")
    job = dataclasses.replace(job, calibration=dataclasses.replace(job.calibration, num_samples=1, seq_len=16))
    estimate = make_plan(job)
    assert not [record for record in caplog.records if "experts" in record.getMessage()]
    assert estimate.lines[-1].startswith("free here: ")


def test_routed_tokens_sum_to_all_choices(moe: Path, tmp_path: Path) -> None:
    result = quantize(moe, tmp_path / "out", expert_min_tokens=0)
    for layer in (1, 3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            mine = [
                s for s in result.layers if s.name.startswith(f"model.layers.{layer}.mlp.experts.") and part in s.name
            ]
            assert len(mine) == EXPERTS
            assert sum(s.routed_tokens or 0 for s in mine) == TOKENS * TOP_K
            assert all(s.tokens == s.routed_tokens for s in mine if s.calibrated_by == "routed")
    assert all(s.routed_tokens is None for s in result.layers if ".experts." not in s.name)
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert sum(manifest["experts"]["calibrated_by"].values()) == 2 * EXPERTS
    assert manifest["settings"]["expert_min_tokens"] == 0


def test_an_experts_error_is_over_the_tokens_routed_to_it(moe: Path, tmp_path: Path) -> None:
    """relative_error of an expert's down projection, computed again from the artifact and its own routing."""
    result = quantize(moe, tmp_path / "out", asymmetric_calibration=False, expert_min_tokens=1)
    packed, original, spec = WeightSource(tmp_path / "out"), CheckpointReader(moe), read_model_spec(moe)
    skeleton = Skeleton(spec, CPU, torch.float32)
    from qwen_quant.tokenizer import load_tokenizer

    ids = torch.tensor(load_tokenizer(moe).encode((tmp_path / "calibration.txt").read_text())[:TOKENS]).view(12, 64)
    hidden = original.gather_rows("model.embed_tokens.weight", ids).float()
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        hidden = skeleton.block(0, packed.dense)(hidden, **skeleton.context(0, 64))
        block = skeleton.block(1, packed.dense)
        for k, expert in enumerate(block.mlp.experts):
            expert.down_proj.register_forward_pre_hook(lambda m, a, k=k: seen.update({k: a[0]}))
        block(hidden, **skeleton.context(1, 64))
    for k in range(EXPERTS):
        stats = next(s for s in result.layers if s.name == f"model.layers.1.mlp.experts.{k}.down_proj")
        wanted = original.read(stats.name + ".weight").float()
        change = packed.dense(stats.name + ".weight") - wanted
        error = float((seen[k] @ change.T).norm() / (seen[k] @ wanted.T).norm())
        assert abs((stats.routed_tokens or 0) - seen[k].shape[0]) <= 0.02 * TOKENS
        if seen[k].shape[0] > 100:
            assert stats.relative_error == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("policy", ["route-all", "pool", "round"])
def test_each_policy_is_applied_and_recorded(policy: str, moe: Path, tmp_path: Path) -> None:
    minimum = 100  # for each of 4 groups of 32 columns
    result = quantize(moe, tmp_path / "out", expert_policy=policy, expert_min_tokens=minimum)
    experts = [s for s in result.layers if s.name.endswith("down_proj") and ".experts." in s.name]
    starved = [s for s in experts if (s.routed_tokens or 0) < 4 * minimum]
    assert starved and len(starved) < len(experts)
    assert {s.calibrated_by for s in starved} == {policy}
    assert {s.calibrated_by for s in experts if s not in starved} == {"routed"}
    for stats in starved:
        expected = {"route-all": TOKENS, "pool": 4 * minimum, "round": stats.routed_tokens}[policy]
        assert stats.tokens == expected
        assert (stats.relative_error == stats.rounding_error) == (policy == "round")
    line = f"{len(starved)} of {len(experts)} experts got too few calibration tokens"
    assert any(line in warning and policy in warning for warning in result.warnings)
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert manifest["warnings"] == list(result.warnings)
    assert manifest["experts"]["calibrated_by"][policy] == len(starved)


@pytest.mark.parametrize("policy", ["route-all", "pool", "round"])
def test_an_expert_that_no_token_reaches(policy: str, moe: Path, tmp_path: Path) -> None:
    source = make_family_checkpoint(tmp_path / "in", "qwen3_moe")
    name = "model.layers.3.mlp.gate.weight"
    router = load_file(source / "model.safetensors")[name]
    router[:TOP_K], router[TOP_K:] = 0.0, 0.0  # equal scores: the first experts win every token
    edit_tensors(source, **{name.replace(".", "__"): router})
    result = quantize(source, tmp_path / "out", expert_policy=policy, expert_min_tokens=0)
    mine = [s for s in result.layers if s.name.startswith("model.layers.3.mlp.experts.")]
    unreached = [s for s in mine if s.routed_tokens == 0]
    assert len(unreached) == 3 * (EXPERTS - TOP_K)
    assert {s.calibrated_by for s in unreached} == {policy}
    assert all(0 < s.relative_error < 0.3 and s.tokens == (0 if policy == "round" else s.tokens) for s in unreached)


def test_killed_and_resumed_is_byte_identical(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(moe, tmp_path / "whole")
    interrupted(moe, tmp_path / "out", monkeypatch)
    quantize(moe, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    interrupted(moe, tmp_path / "other", monkeypatch)
    with pytest.raises(InputError, match="expert_policy was 'route-all', is now 'pool'"):
        quantize(moe, tmp_path / "other", expert_policy="pool")


def test_hidden_states_in_a_file_equal_memory(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(moe, tmp_path / "memory")
    monkeypatch.setattr("qwen_quant.memory.RAM_LIMIT_BYTES", 0)
    quantize(moe, tmp_path / "file")
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "file")


def test_the_audit_catches_one_forgotten_expert(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sequential.quantize_block

    def forgetful(*args: object) -> list[object]:
        return [linear for linear in real(*args) if ".experts.5.up_proj" not in linear.name]

    monkeypatch.setattr(sequential, "quantize_block", forgetful)
    with pytest.raises(AuditError, match=r"experts\.5\.up_proj"):
        quantize(moe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_one_expert(tmp_path: Path) -> None:
    source = make_family_checkpoint(tmp_path / "in", "qwen3_moe")
    edit_tensors(source, model__layers__1__mlp__experts__5__up_proj__weight=None)
    with pytest.raises(InputError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight'"):
        quantize(source, tmp_path / "out")


def test_a_family_row_without_its_experts_stops(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_quant.checkpoint import families

    row = families.FAMILIES["qwen3_moe"]
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", dataclasses.replace(row, sparse=False))
    with pytest.raises(AuditError, match=r"mlp\.experts\.\d+|mlp\.(gate|up|down)_proj"):
        quantize(moe, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_moe"])
def test_stacks_of_experts_give_the_same_artifact(name: str, tmp_path: Path) -> None:
    """A checkpoint that stores its experts fused, and one that stores them one by one."""
    changes = TWO_BLOCKS if name == "qwen3_5_moe" else {}
    separate = make_family_checkpoint(tmp_path / "separate", name, **changes)
    fused = make_family_checkpoint(tmp_path / "fused", name, **changes)
    fuse_experts(fused)
    assert set(load_file(fused / "model.safetensors")) != set(load_file(separate / "model.safetensors"))
    assert torch.equal(reference_logits(fused), reference_logits(separate))
    for folder in (separate, fused):
        quantize(folder, tmp_path / f"{folder.name}-out")
    one, other = (load_file(tmp_path / f"{n}-out" / "model.safetensors") for n in ("separate", "fused"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        assert torch.equal(load_model(fused)(IDS).logits, load_model(separate)(IDS).logits)


def test_tensors_without_a_module_are_carried(tmp_path: Path) -> None:
    source = make_family_checkpoint(tmp_path / "in", "qwen3_5_moe_text", **TWO_BLOCKS)
    passenger = torch.randn(3, 4, 5).bfloat16()
    edit_tensors(source, mtp__layers__0__mlp__experts__gate_up_proj=passenger)
    quantize(source, tmp_path / "out")
    name = "mtp.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(CheckpointReader(tmp_path / "out").read(name), passenger)
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert "multi-token" in manifest["audit"]["kept"][name]
    load_model(tmp_path / "out")


def vllm_quantizes(prefix: str, settings: dict[str, object]) -> bool:
    """vLLM's decision for a linear: a negative pattern matches from the start, a listed name anywhere."""
    if any(re.match(pattern.removeprefix("-:"), prefix) for pattern in settings["dynamic"]):
        return False
    return any(name in prefix for group in settings["modules_in_block_to_quantize"] for name in group)


def test_skip_lists_say_what_was_quantized(source: Path, result: sequential.QuantizeResult) -> None:
    settings = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert json.loads((result.out / "quantize_config.json").read_text())["dynamic"] == settings["dynamic"]
    assert not any(settings["dynamic"].values())
    quantized = set(read_model_spec(source).linear_names())
    listed = {name for group in settings["modules_in_block_to_quantize"] for name in group}
    for name in CheckpointReader(source).names:
        prefix = name.removesuffix(".weight")
        if ".layers." in name and name.endswith(("proj.weight", "gate.weight", "qkv.weight", "z.weight", "_ba.weight")):
            assert vllm_quantizes(prefix, settings) == (prefix in quantized), prefix
            assert any(prefix.endswith(end) for end in listed) == (prefix in quantized), prefix
    assert not vllm_quantizes("mtp.layers.0.self_attn.q_proj", {**settings, "dynamic": {"-:.*mtp.*": {}}})


@pytest.mark.interop
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"])
def test_gptqmodel_reads_the_experts(name: str, tmp_path: Path) -> None:
    """GPTQModel loads every family's artifact as it is; its models have experts in every block."""
    python = os.environ.get("QWEN_QUANT_PEER_PYTHON")
    assert python, "run this through `make interop`, which sets QWEN_QUANT_PEER_PYTHON"
    sizes = {"shared_expert_intermediate_size": 128, "mlp_only_layers": [], "decoder_sparse_step": 1}
    model = make_family_checkpoint(tmp_path / "in", name, **sizes)
    quantize(model, tmp_path / "out", expert_min_tokens=8)
    expected_logits(tmp_path / "out", tmp_path / "expected.safetensors")
    command = [python, str(SCRIPT), str(tmp_path / "out"), str(tmp_path / "expected.safetensors"), "--atol", "1e-3"]
    done = subprocess.run([*command, "--backend", "gptqmodel"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "were not used" not in done.stderr, done.stderr[-3000:]


def test_dense_families_get_no_skip_lists(qwen2_folder: Path, tmp_path: Path) -> None:
    quantize(qwen2_folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "dynamic" not in settings and "modules_in_block_to_quantize" not in settings
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert "experts" not in manifest and "expert_policy" not in manifest["settings"]
    assert "routed_tokens" not in manifest["layers"][0]


def test_config_without_the_number_of_experts() -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 8}
    with pytest.raises(InputError, match=r"config\.json lacks 'num_experts'"):
        model_spec(config, "here")


def test_kinds_and_row_parallel_linears(source: Path) -> None:
    spec = read_model_spec(source)
    assert sorted(k for layers in spec.kinds().values() for k in layers) == list(range(LAYERS))
    ends = {"o_proj", "down_proj", "out_proj"}
    assert {name.rsplit(".", 1)[-1] for name in spec.row_parallel()} <= ends
    assert {n for n in spec.linear_names() if n.endswith("down_proj")} <= {
        spec.layer_prefix(k) + name for k in range(LAYERS) for name in spec.row_parallel()
    }
