"""The engine end to end on tiny checkpoints: exactness, resume, determinism, the audit, every bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_quant import sequential
from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader, file_sha256
from qwen_quant.errors import AuditError, InputError, QwenQuantError
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.packing import unpack_weight
from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.resume import WorkFolder
from qwen_quant.sequential import quantize_checkpoint
from qwen_quant.tokenizer import load_tokenizer
from tests.support.checkpoints import edit_tensors, make_checkpoint, text_file, write_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent


def job_for(model: Path, out: Path, **changes: object) -> QuantizeJob:
    """A quick job; keyword arguments go to the config that has them."""
    text = out.parent / "calibration.txt"
    if not text.exists():
        text_file(text)
    configs = []
    for cls, values in (
        (GPTQConfig, {"group_size": 32}),
        (CalibrationConfig, {"source": str(text), "num_samples": 12, "seq_len": 64}),
        (RunConfig, {"device": "cpu"}),
    ):
        mine = {k: v for k, v in changes.items() if k in cls.__dataclass_fields__}
        configs.append(cls(**{**values, **mine}))
    return QuantizeJob(model, out, *configs, source_id="test/tiny")


def quantize(model: Path, out: Path, **changes: object) -> sequential.QuantizeResult:
    return quantize_checkpoint(job_for(model, out, **changes), no_progress)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file; of the manifest without what was measured (times, memory)."""
    found = {p.name: file_sha256(p) for p in folder.iterdir()}
    manifest = json.loads((folder / "qwen-quant.json").read_text())
    manifest.pop("measured")
    found["qwen-quant.json"] = json.dumps(manifest, sort_keys=True)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "shards"),
    [
        ("qwen2", True, torch.bfloat16, 1),
        ("qwen2", False, torch.float16, 3),
        ("qwen3", True, torch.float32, 1),
        ("qwen3", False, torch.bfloat16, 2),
    ],
)
def test_artifact_of_each_layout(family: str, tied: bool, dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, tied=tied, dtype=dtype, shards=shards)
    out = tmp_path / "out"
    result = quantize(source, out, max_shard_size_bytes=200_000 if shards > 1 else 10**9)
    artifact, original = CheckpointReader(out), CheckpointReader(source)
    spec = read_model_spec(source)
    assert len(result.layers) == len(spec.linear_names()) == 14
    for stats in result.layers:
        packed = {s: artifact.read(f"{stats.name}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")}
        assert f"{stats.name}.weight" not in artifact
        weight = unpack_weight(packed, 4, "gptq").dequantized()
        wanted = original.read(stats.name + ".weight").float()
        assert (weight - wanted).norm() < 0.25 * wanted.norm()
        assert stats.relative_error < 0.8 * stats.rounding_error, stats
        assert packed["g_idx"].tolist() == [k // 32 for k in range(stats.in_features)]
    for name in original.names:
        if name.removesuffix(".weight") not in spec.linear_names():
            assert torch.equal(artifact.read(name), original.read(name)), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["checkpoint_format"], settings["desc_act"]) == (4, "gptq", False)
    manifest = json.loads((out / "qwen-quant.json").read_text())
    assert manifest["source"]["sha256"] and len(manifest["layers"]) == 14
    assert manifest["output"]["sha256"]["config.json"] == file_sha256(out / "config.json")
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(artifact.names) and len(set(index["weight_map"].values())) > 1


def test_streaming_equals_the_whole_model(model: Path) -> None:
    """Blocks built one at a time give the hidden states of transformers' own full model, to the last bit."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    reader, spec = CheckpointReader(model), read_model_spec(model)
    skeleton = Skeleton(spec, torch.device("cpu"), torch.float32)
    hidden = reader.gather_rows("model.embed_tokens.weight", ids).float()
    with torch.no_grad():
        for layer in range(spec.num_layers):
            hidden = skeleton.block(layer, reader.read)(hidden, **skeleton.context(layer, 48))
        logits = skeleton.final_norm(reader.read)(hidden) @ reader.read(skeleton.head_name()).float().T
        assert torch.equal(logits, whole(ids).logits)


def test_block_halves_equal_the_block(model: Path) -> None:
    """The solver's way through a block (norm, body, output linear) is the block's own forward pass."""
    from qwen_quant.block_solver import _tap

    reader, spec = CheckpointReader(model), read_model_spec(model)
    skeleton = Skeleton(spec, torch.device("cpu"), torch.float32)
    block, context = skeleton.block(0, reader.read), skeleton.context(0, 32)
    hidden = torch.randn(2, 32, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = block(hidden, **context)
        for sub in spec.family.sub_blocks:
            hidden = hidden + block.get_submodule(sub.output)(_tap(block, sub, hidden, context))
    assert torch.equal(hidden, wanted)


def test_hessians_are_those_of_the_quantized_prefix(model: Path, tmp_path: Path) -> None:
    """Each linear's recorded error is measured on inputs that went through everything quantized before it."""
    out = tmp_path / "out"
    result = quantize(model, out, asymmetric_calibration=False)
    reader, spec = CheckpointReader(model), read_model_spec(model)
    artifact = CheckpointReader(out)
    skeleton = Skeleton(spec, torch.device("cpu"), torch.float32)

    def dense(name: str) -> torch.Tensor:
        base = name.removesuffix(".weight")
        if f"{base}.qweight" not in artifact:
            return artifact.read(name)
        packed = {s: artifact.read(f"{base}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")}
        return unpack_weight(packed, 4, "gptq").dequantized()

    ids = torch.tensor(load_tokenizer(model).encode((tmp_path / "calibration.txt").read_text())[: 12 * 64]).view(12, 64)
    hidden = reader.gather_rows("model.embed_tokens.weight", ids).float()
    block, seen = skeleton.block(0, dense), {}
    block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].flatten(0, 1)))
    with torch.no_grad():
        block(hidden, **skeleton.context(0, 64))
    name = "model.layers.0.mlp.down_proj"
    change = dense(name + ".weight") - reader.read(name + ".weight").float()
    wanted = float((seen["x"] @ change.T).norm() / (seen["x"] @ reader.read(name + ".weight").float().T).norm())
    stats = next(s for s in result.layers if s.name == name)
    assert stats.relative_error == pytest.approx(wanted, rel=0.02)
    assert stats.tokens == 12 * 64


def test_same_inputs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "a")
    quantize(model, tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def start(model: Path, out: Path, calibration: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qwen_quant", "gptq", str(model), str(out), "--group-size", "32", "--quiet"]
    command += ["--calibration", str(calibration), "--num-samples", "12", "--seq-len", "64", "--device", "cpu"]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("blocks_before_kill", [1, 3])
def test_killed_and_resumed_is_byte_identical(blocks_before_kill: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", num_hidden_layers=6)
    calibration = text_file(tmp_path / "calibration.txt")
    whole = start(source, tmp_path / "whole", calibration)
    assert whole.wait(180) == 0
    out = tmp_path / "out"
    killed = start(source, out, calibration)
    progress = tmp_path / ".out.partial" / "state" / "progress.json"
    deadline = time.time() + 120
    while time.time() < deadline and killed.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["blocks_done"] >= blocks_before_kill:
            break
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL and not out.exists()
    assert json.loads(progress.read_text())["blocks_done"] < 6
    resumed = start(source, out, calibration)
    assert resumed.wait(180) == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def interrupted(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Run until the first block is committed, then stop as Ctrl-C would."""
    commit = WorkFolder.commit

    def stop(self: WorkFolder, progress: dict[str, object]) -> None:
        commit(self, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, **changes)
    monkeypatch.undo()


def test_resume_with_other_settings_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(model, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"settings\.bits was 4, is now 8"):
        quantize(model, tmp_path / "out", bits=8)
    with pytest.raises(InputError, match=r"calibration\.sha256 was"):
        quantize(model, tmp_path / "out", num_samples=11)
    assert quantize(model, tmp_path / "out", bits=8, resume=False).out.is_dir()


def test_resume_in_a_file_equals_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(model, tmp_path / "memory")
    monkeypatch.setattr("qwen_quant.memory.RAM_LIMIT_BYTES", 0)
    quantize(model, tmp_path / "file")
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "file")
    monkeypatch.setattr("qwen_quant.block_solver.CACHE_BYTES", 0)
    quantize(model, tmp_path / "recomputed")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("memory", "recomputed"))
    name = "model.layers.1.mlp.down_proj.scales"
    assert torch.allclose(first[name].float(), second[name].float(), rtol=0.2, atol=1e-3)


def test_existing_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(InputError, match="exists"):
        quantize(model, out)
    with pytest.raises(InputError, match="out is no model folder"):
        quantize(model, out, force=True)
    (tmp_path / "link").symlink_to(out)
    for force in (False, True):
        with pytest.raises(InputError, match="link is a link"):
            quantize(model, tmp_path / "link", force=force)
    assert (out / "precious").read_text() == "x"
    (out / "qwen-quant.json").write_text("{}")
    quantize(model, out, force=True)
    assert not (out / "precious").exists() and (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rows_longer_than_the_model_was_made_for_are_said(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", max_position_embeddings=48)
    result = quantize(model, tmp_path / "out")
    assert "rows of 64 calibration tokens are longer than the 48 of config.json" in result.warnings


def test_force_never_replaces_the_source(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in" / "model")
    for out in (model, tmp_path / "in"):
        with pytest.raises(InputError, match="holds MODEL"):
            quantize(model, out, force=True)
    assert (model / "model.safetensors").is_file()


def test_the_audit_catches_a_planted_omission(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sequential.quantize_block

    def forgetful(*args: object) -> list[object]:
        return real(*args)[:-1]

    monkeypatch.setattr(sequential, "quantize_block", forgetful)
    with pytest.raises(AuditError, match="never written|should have been quantized") as caught:
        quantize(model, tmp_path / "out")
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("victim", ["model.layers.1.mlp.up_proj.qweight", "model.norm.weight"])
def test_the_audit_catches_flipped_bytes(
    victim: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sequential.audit_artifact

    def tamper(ready: object, folder: Path, *rest: object) -> None:
        info = CheckpointReader(folder).info(victim)
        with open(info.file, "r+b") as file:
            file.seek(info.offset + info.nbytes // 2)
            byte = file.read(1)[0]
            file.seek(info.offset + info.nbytes // 2)
            file.write(bytes([byte ^ 1]))
        real(ready, folder, *rest)

    monkeypatch.setattr(sequential, "audit_artifact", tamper)
    with pytest.raises(AuditError, match=victim.rpartition(".")[0]):
        quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_row_that_forgets_a_linear_stops(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: a linear that the table does not know is an error, not a 16-bit leftover."""
    from qwen_quant.checkpoint import families

    row = families.FAMILIES["qwen2"]
    attention, mlp = row.sub_blocks
    short = dataclasses.replace(row, sub_blocks=(attention, dataclasses.replace(mlp, inputs=("mlp.gate_proj",))))
    monkeypatch.setitem(families.FAMILIES, "qwen2", short)
    with pytest.raises(AuditError, match="up_proj"):
        quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "sym", "group_size"), [(2, True, 32), (3, False, 64), (8, True, -1), (4, False, 128)])
def test_other_grids(bits: int, sym: bool, group_size: int, model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", bits=bits, sym=sym, group_size=group_size, checkpoint_format="gptq_v2")
    artifact = CheckpointReader(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"  # 224 inputs: the last group of 128 is short
    packed = {s: artifact.read(f"{name}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")}
    back = unpack_weight(packed, bits, "gptq_v2")
    assert back.codes.shape == (128, 224) and int(back.codes.max()) <= 2**bits - 1
    assert back.scales.shape[1] == (1 if group_size == -1 else -(-224 // group_size))
    assert all(s.relative_error < s.rounding_error for s in result.layers)


def _damage(name: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if name == "not a checkpoint":
        (folder / "config.json").unlink()
    elif name == "not qwen":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    elif name == "config not json":
        (folder / "config.json").write_text("{")
    elif name == "already quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "corrupt":
        weights.write_bytes(b"\xff" * 1000)
    elif name == "missing tensor":
        edit_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    elif name == "unexpected tensor":
        edit_tensors(folder, model__layers__1__mlp__extra__weight=torch.zeros(4, 4))
    elif name == "wrong shape":
        edit_tensors(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(4, 4))
    elif name == "nan":
        values = torch.zeros(224, 128)
        values[3, 3] = float("nan")
        edit_tensors(folder, model__layers__1__mlp__up_proj__weight=values.bfloat16())
    elif name == "inf in a norm":
        edit_tensors(folder, model__norm__weight=torch.full((128,), float("inf")).bfloat16())
    elif name == "index names an absent file":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
        )
    elif name == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif name == "integer weights":
        edit_tensors(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(224, 128, dtype=torch.int8))
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif name == "odd sizes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": "many"}))


BAD_INPUTS = {
    "not a checkpoint": "is not a checkpoint",
    "not qwen": "model_type 'llama' is not a Qwen family",
    "config not json": "cannot be read",
    "already quantized": "already quantized",
    "truncated": "truncated or corrupt",
    "corrupt": "truncated or corrupt",
    "missing tensor": "lacks the tensor 'model.layers.1.mlp.up_proj.weight'",
    "unexpected tensor": "unexpected tensor 'model.layers.1.mlp.extra.weight'",
    "wrong shape": "has shape",
    "nan": "'model.layers.1.mlp.up_proj.weight' holds NaN or Inf",
    "inf in a norm": "'model.norm.weight' holds NaN or Inf",
    "index names an absent file": "names model-00001-of-00001.safetensors, which is absent",
    "pickle only": "pickle weights only",
    "integer weights": "weights must be BF16, F16 or F32",
    "no tokenizer": "no tokenizer",
    "odd sizes": "config.json",
}


@pytest.mark.parametrize("name", list(BAD_INPUTS))
def test_bad_checkpoints(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in")
    _damage(name, folder)
    before = {p.name: file_sha256(p) for p in folder.iterdir()}
    with pytest.raises(QwenQuantError, match=BAD_INPUTS[name]) as caught:
        quantize(folder, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert {p.name: file_sha256(p) for p in folder.iterdir()} == before, "the source was touched"


def test_token_ids_beyond_the_embedding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", vocab_size=64)
    write_tokenizer(folder)
    with pytest.raises(InputError, match="outside the 64 rows"):
        quantize(folder, tmp_path / "out")


def test_disk_full_before_any_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_quant.resume.free_disk_bytes", lambda path: 1000)
    with pytest.raises(InputError, match="disk of .* is full") as caught:
        quantize(model, tmp_path / "out")
    assert "needed" in str(caught.value) and not (tmp_path / ".out.partial").exists()


def test_no_memory_for_one_block(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_quant.memory.memory_bytes", lambda: (2**30, 2**20))
    with pytest.raises(InputError, match="not enough memory for one block.*GiB needed"):
        quantize(model, tmp_path / "out")


def test_unwritable_output(model: Path, tmp_path: Path) -> None:
    job = job_for(model, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        quantize_checkpoint(dataclasses.replace(job, out=tmp_path / "absent" / "out"), no_progress)
    with pytest.raises(InputError, match="/proc is not writable"):
        quantize_checkpoint(dataclasses.replace(job, out=Path("/proc/out")), no_progress)


def test_memory_stays_inside_the_bound(tmp_path: Path) -> None:
    """Peak of a fresh process above its own start: within the promised bound on a widened tiny model."""
    folder = make_checkpoint(tmp_path / "in", hidden_size=512, intermediate_size=1536, num_hidden_layers=3)
    calibration = text_file(tmp_path / "calibration.txt", 80000)
    code = (
        "import json, sys; from pathlib import Path; import torch;"
        "from qwen_quant.preparation import *; from qwen_quant.plan import bound_bytes;"
        "from qwen_quant.sequential import quantize_checkpoint; from qwen_quant.environment import peak_rss_bytes;"
        "from qwen_quant.recipe import *; a = sys.argv;"
        "job = QuantizeJob(Path(a[1]), Path(a[2]), GPTQConfig(group_size=32), CalibrationConfig(a[3], 32, 256),"
        " RunConfig(device='cpu'), 'x');"
        "ready = prepare(job); start = peak_rss_bytes(); bound = bound_bytes(ready); del ready;"
        "quantize_checkpoint(job, lambda *a: None); print(json.dumps([peak_rss_bytes() - start, bound]))"
    )
    run = [sys.executable, "-c", code, str(folder), str(tmp_path / "out"), str(calibration)]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    used, bound = json.loads(done.stdout.splitlines()[-1])
    assert used < bound, f"{used / 2**20:.0f} MiB used, bound {bound / 2**20:.0f} MiB"


def test_saved_by_hand_lm_head_of_a_tied_model_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(folder, tmp_path / "out")
    assert "lm_head.weight" in CheckpointReader(tmp_path / "out")
