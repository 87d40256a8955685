"""`bnb`: kernels against bitsandbytes' own bytes, whole folders against transformers' own, resume, every bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwen_quant import bnb, bnb_convert, bnb_plan, cli
from qwen_quant.bnb_convert import BnbResult, quantize_bnb
from qwen_quant.bnb_plan import BnbJob, settings_of
from qwen_quant.checkpoint import families
from qwen_quant.checkpoint.reader import CheckpointReader, file_sha256
from qwen_quant.checkpoint.writer import PlannedWriter
from qwen_quant.errors import AuditError, InputError
from qwen_quant.progress import no_progress
from qwen_quant.recipe import BnbConfig, RunConfig, load_recipe
from qwen_quant.resume import WorkFolder
from qwen_quant.runtime.kernels.int8 import int8_rows
from qwen_quant.runtime.loading import WeightSource, load_model
from tests.runtime.test_kernels import needs_native
from tests.support.artifacts import change_config
from tests.support.checkpoints import edit_tensors, make_checkpoint
from tests.support.moe import fuse_experts, make_family_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "bnb_quantize"
QWEN1 = Path(__file__).parent / "golden" / "qwen1" / "tiny7b"
SOURCES = {"qwen2": GOLDEN / "qwen2", "qwen3": GOLDEN / "qwen3", "qwen": QWEN1}
CONFIGS = {
    "nf4": BnbConfig(),
    "nf4_double": BnbConfig(double_quant=True),
    "fp4": BnbConfig(quant_type="fp4"),
    "int8": BnbConfig(quant_type="int8", int8_threshold=4.5),
    "nf4_skip": BnbConfig(skip=("o_proj",)),
}
SAVED = json.loads((GOLDEN / "saved.json").read_text())["folders"]
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen4_exp")
BNB_SCRIPT = Path(__file__).parent / "support" / "bnb_peer.py"
HERE = {"PYTHONPATH": str(REPOSITORY)}
K_PROJ = "model.layers.0.self_attn.k_proj"


def convert(model: Path, out: Path, config: BnbConfig | None = None, **run: object) -> BnbResult:
    return quantize_bnb(BnbJob(model, out, config or BnbConfig(), RunConfig(**run), "test/tiny"), no_progress)


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert content(tensor) == content(other), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file; of the manifest without what was measured (time, memory)."""
    found = {path.name: file_sha256(path) for path in folder.iterdir()}
    manifest = json.loads((folder / "qwen-quant.json").read_text())
    manifest.pop("measured")
    return {**found, "qwen-quant.json": json.dumps(manifest, sort_keys=True)}


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, torch.Tensor]]:
    """ "weight/case" -> tensors by their suffix; "weight/" -> the weight."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(GOLDEN / "kernels.safetensors").items():
        name, _, rest = key.partition("/")
        case, _, suffix = rest.rpartition("/")
        found.setdefault(f"{name}/{case}", {})[suffix] = tensor
    return found


@pytest.mark.parametrize("chunk", [1 << 20, 512])
@pytest.mark.parametrize("name", ["wide", "odd", "zeros", "ties", "tail", "one"])
def test_kernels_are_bitsandbytes_own_to_the_last_bit(
    name: str, chunk: int, kernels: dict[str, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb, "_QUANTIZE_VALUES", chunk)
    weight = kernels[f"{name}/"]["weight"]
    for kind in bnb.QUANT_TYPES:
        for size in (64, 256):
            plain = bnb.tensors_4bit(bnb.quantize_4bit(weight, kind, size))
            same(plain, kernels[f"{name}/{kind}_{size}"])
            double = bnb.tensors_4bit(bnb.quantize_4bit(weight, kind, size, double_quant=True))
            same(double, kernels[f"{name}/{kind}_{size}_double"])
    codes = bnb.tensors_int8("layers.0.k_proj", *bnb.quantize_int8(weight))
    assert codes.pop("weight_format").item() == 0
    same(codes, kernels[f"{name}/int8"])


@needs_native
@pytest.mark.parametrize("name", ["wide", "odd", "zeros", "ties", "tail", "one"])
def test_the_native_int8_kernel_gives_the_same_bytes(name: str, kernels: dict[str, dict[str, torch.Tensor]]) -> None:
    weight = kernels[f"{name}/"]["weight"]
    codes, scb, error = int8_rows(weight)
    wanted = kernels[f"{name}/int8"]
    same({"weight": codes, "SCB": scb}, {key: wanted[key] for key in ("weight", "SCB")})
    lost = (bnb.dequantize_int8(codes, scb) - weight.float()).norm()
    assert error == pytest.approx(float(lost / weight.float().norm()) if weight.any() else 0.0, rel=1e-5, abs=1e-7)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_native_int8_codes_of_every_dtype_and_of_tiny_values(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 77, generator=torch.Generator().manual_seed(3))
    weight *= torch.logspace(-9, 3, 7)[:, None]  # the first rows become FP16's subnormals, and zeros
    for part in (weight.to(dtype), weight.to(dtype)[:, 5:70]):  # the second is not contiguous
        codes, scb = bnb.quantize_int8(part)
        same(dict(zip("ab", int8_rows(part)[:2], strict=True)), {"a": codes, "b": scb})


@needs_native
def test_native_and_torch_make_the_same_folder(qwen3_folder: Path, tmp_path: Path, monkeypatch) -> None:
    config = BnbConfig(quant_type="int8")
    for name, native in (("native", True), ("torch", False)):
        monkeypatch.setattr(bnb_convert, "takes_int8", lambda _, native=native: native)
        convert(qwen3_folder, tmp_path / name, config)
    same(tensors_of(tmp_path / "native"), tensors_of(tmp_path / "torch"))
    first, second = (json.loads((tmp_path / name / "qwen-quant.json").read_text()) for name in ("native", "torch"))
    for ours, theirs in zip(first["linears"], second["linears"], strict=True):
        assert ours["relative_error"] == pytest.approx(theirs["relative_error"], rel=1e-5)
        assert ours["sha256"] == theirs["sha256"]


def test_the_kernel_of_double_quantization_at_its_steps() -> None:
    tensors = load_file(GOLDEN / "kernels.safetensors")
    indices, nested = bnb.quantize_absmax(tensors["nested/values"], 0.0)
    assert torch.equal(indices, tensors["nested/indices"]) and torch.equal(nested.absmax, tensors["nested/absmax"])


@pytest.mark.parametrize("kind", bnb.QUANT_TYPES)
def test_codes_are_the_nearest_table_entries(kind: str) -> None:
    """Against a search over all 16 entries in FP64."""
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(7))
    coded = bnb.quantize_4bit(weight, kind, 64)
    blocks = weight.view(-1, 64).double()
    entries = bnb.quant_map(kind).double()[None, None] * blocks.abs().amax(1)[:, None, None]
    best = (blocks[..., None] - entries).abs().amin(2)
    back = bnb.dequantize_4bit(coded.packed, coded.absmax, bnb.quant_map(kind), 64, (96, 80)).view(-1, 64)
    assert torch.allclose((blocks - back).abs(), best, atol=1e-6)


def test_absmax_in_8_bit_is_close_and_zeros_are_defined() -> None:
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 0.5
    indices, nested = bnb.quantize_absmax(absmax, bnb.absmax_offset(absmax))
    assert (bnb.decode_absmax(indices, nested) - absmax).abs().max() < 0.01
    indices, nested = bnb.quantize_absmax(torch.full((300,), 0.25), 0.25)
    assert not indices.any() and torch.equal(bnb.decode_absmax(indices, nested), torch.full((300,), 0.25))


@pytest.mark.parametrize(("family", "case"), [(f, c) for f in SOURCES for c in CONFIGS if c in SAVED[f]])
def test_a_folder_is_what_transformers_saves(family: str, case: str, tmp_path: Path) -> None:
    result = convert(SOURCES[family], tmp_path / "out", CONFIGS[case])
    expected = SAVED[family][case]
    found = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), hashlib.sha256(content(t)).hexdigest()]
        for name, t in tensors_of(tmp_path / "out").items()
    }
    assert found == expected["tensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == expected["quantization_config"]
    source = json.loads((SOURCES[family] / "config.json").read_text())
    assert config == {key: value for key, value in source.items() if key != "auto_map"}
    assert len(result.linears) == sum(".SCB" in n or n.endswith("quant_map") and "nested" not in n for n in found)
    assert result.quantized_share == (1.0 if case != "nf4_skip" else pytest.approx(0.9, abs=0.05))


@pytest.mark.parametrize("config", [*CONFIGS.values(), BnbConfig(block_size=256, double_quant=True)], ids=str)
def test_the_folder_loads_as_the_dequantized_model(config: BnbConfig, tmp_path: Path) -> None:
    convert(GOLDEN / "qwen2", tmp_path / "out", config)
    source, model = WeightSource(tmp_path / "out"), load_model(tmp_path / "out")
    plain, ids = load_model(GOLDEN / "qwen2"), torch.arange(30)[None]
    errors = []
    for name in (f"{base}.weight" for base in source.spec.linear_names()):
        dense, weight = source.dense(name).float(), CheckpointReader(GOLDEN / "qwen2").read(name).float()
        errors.append(float((dense - weight).norm() / weight.norm()))
    limit = 0.02 if config.quant_type == "int8" else 0.2
    assert max(errors) < limit and (min(errors) == 0) == bool(config.skip)
    with torch.no_grad():
        ours, theirs = model(ids).logits, plain(ids).logits
    assert not torch.equal(ours, theirs) and torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.9


def test_manifest_and_result(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in")
    result = convert(model, tmp_path / "out", BnbConfig(double_quant=True))
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert manifest["method"] == "bitsandbytes" and manifest["settings"]["double_quant"] is True
    assert manifest["source"]["sha256"]["model.safetensors"] == file_sha256(model / "model.safetensors")
    assert manifest["output"]["sha256"]["model.safetensors"] == file_sha256(tmp_path / "out" / "model.safetensors")
    assert manifest["audit"]["kept"]["model.embed_tokens.weight"] == "embeddings stay 16-bit"
    assert [linear["name"] for linear in manifest["linears"]] == [linear.name for linear in result.linears]
    source = WeightSource(tmp_path / "out")
    for linear in result.linears:
        weight = CheckpointReader(model).read(f"{linear.name}.weight").float()
        error = (source.dense(f"{linear.name}.weight") - weight).norm() / weight.norm()
        assert linear.relative_error == pytest.approx(float(error), rel=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "LICENSE").is_file()
    assert result.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    parameters = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert result.quantized_parameters + result.kept_parameters == parameters


def test_weights_are_cast_to_what_config_json_says(tmp_path: Path) -> None:
    """transformers loads the model in that dtype before bitsandbytes sees it."""
    model = make_checkpoint(tmp_path / "wide", dtype=torch.float32)
    narrow = shutil.copytree(model, tmp_path / "narrow")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    for folder in (model, narrow):
        change_config(folder, dtype="bfloat16")
    result = convert(model, tmp_path / "a", BnbConfig(double_quant=True))
    assert any("are cast to BF16" in line for line in result.warnings)
    assert not any("cast" in line for line in convert(narrow, tmp_path / "b", BnbConfig(double_quant=True)).warnings)
    assert file_sha256(tmp_path / "a" / "model.safetensors") == file_sha256(tmp_path / "b" / "model.safetensors")


def test_files_whose_names_no_json_can_hold_stay_behind(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in")
    for name in ("extra\udcff.dat", "extra\udcff.txt"):
        (model / name).write_text("x")
    assert convert(model, tmp_path / "out").left_behind == ("'extra\\udcff.dat'", "'extra\\udcff.txt'")


@pytest.mark.parametrize("changes", [{"hidden_size": -128}, {"dtype": ["bfloat16"]}])
def test_a_config_that_no_model_can_have(changes: dict[str, object], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in")
    change_config(model, **changes)
    with pytest.raises(InputError, match=r"config\.json does not describe a model"):
        convert(model, tmp_path / "out")


def test_dtype_is_written_where_config_json_says_none(tmp_path: Path) -> None:
    """A loader would otherwise take it from the first tensor, which may be FP32 absmax."""
    model = make_checkpoint(tmp_path / "in", dtype=torch.float16)
    change_config(model, dtype=None)
    convert(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_shards_hold_the_same_tensors(qwen3_folder: Path, tmp_path: Path) -> None:
    convert(qwen3_folder, tmp_path / "one")
    convert(qwen3_folder, tmp_path / "many", max_shard_size_bytes=50_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and (tmp_path / "many" / "model.safetensors.index.json").is_file()
    same(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))


def start(model: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qwen_quant", "bnb", str(model), str(out), "--double-quant", "--quiet"]
    return subprocess.Popen([*command, "--max-shard-size", "500KB"], cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def test_killed_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in", num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    whole = start(model, tmp_path / "whole")
    assert whole.wait(120) == 0
    out, progress = tmp_path / "out", tmp_path / ".out.partial" / "state" / "progress.json"
    killed = start(model, out)
    deadline = time.time() + 60
    while time.time() < deadline and killed.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["tensors_done"] >= 20:
            break
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL and not out.exists()
    assert 20 <= json.loads(progress.read_text())["tensors_done"] < 12 * 12
    assert start(model, out).wait(120) == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def interrupted(model: Path, out: Path, config: BnbConfig, commits: int, patch: pytest.MonkeyPatch) -> None:
    """Run until `commits` commits, then stop as Ctrl-C would."""
    commit, left = WorkFolder.commit, [commits]

    def stop(self: WorkFolder, progress: dict[str, object]) -> None:
        commit(self, progress)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(WorkFolder, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(model, out, config, max_shard_size_bytes=20_000)


@pytest.mark.parametrize("commits", [1, 3, 6])
def test_finished_files_are_not_made_again(
    commits: int, qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = BnbConfig(double_quant=True), []
    interrupted(qwen2_folder, tmp_path / "out", config, commits, monkeypatch)
    real = bnb_convert._quantized
    monkeypatch.setattr(bnb_convert, "_quantized", lambda r, name, o: (made.append(name), real(r, name, o))[1])
    with monkeypatch.context() as context:
        context.delattr(bnb_convert, "absmax_offset")  # found once, and kept
        result = convert(qwen2_folder, tmp_path / "out", config, max_shard_size_bytes=20_000)
    assert len(made) == len(result.linears) if commits == 1 else 0 < len(made) < len(result.linears)
    convert(qwen2_folder, tmp_path / "whole", config, max_shard_size_bytes=20_000)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_resume_with_other_settings_is_refused(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(qwen2_folder, tmp_path / "out", BnbConfig(), 1, monkeypatch)
    with pytest.raises(InputError, match=r"bnb\.quant_type was 'nf4', is now 'fp4'"):
        convert(qwen2_folder, tmp_path / "out", BnbConfig(quant_type="fp4"), max_shard_size_bytes=20_000)
    assert convert(qwen2_folder, tmp_path / "out", BnbConfig(quant_type="fp4"), resume=False).out.is_dir()


def test_the_audit_sees_a_flipped_bit(qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = PlannedWriter.write_bytes
    for name, message in ((f"{K_PROJ}.weight", "other codes or scales"), ("model.norm.weight", "bytes differ")):

        def damage(self: PlannedWriter, key: str, at: int, part: torch.Tensor, name: str = name) -> None:
            changed = part.clone()
            if key == name:
                changed.view(torch.uint8).flatten()[0] ^= 1
            write_bytes(self, key, at, changed)

        monkeypatch.setattr(PlannedWriter, "write_bytes", damage)
        with pytest.raises(AuditError, match=message):
            convert(qwen2_folder, tmp_path / "out", resume=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("o_proj", r".*\.o_proj"),
        ("model.layers.0", r"model\.layers\.0\..*"),
        (r"model.*mlp.down_proj", r".*\.down_proj"),
        ("layers.1.mlp.up_proj", r"model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_skip_follows_transformers_rule(pattern: str, kept: str, qwen2_folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in", num_hidden_layers=3)
    result = convert(model, tmp_path / "out", BnbConfig(skip=(pattern,)))
    names = WeightSource(model).spec.linear_names()
    assert {linear.name for linear in result.linears} == {name for name in names if not re.fullmatch(kept, name)}
    assert result.skip_modules == ("lm_head", "model.embed_tokens", pattern)
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    skipped = {name for name, why in manifest["audit"]["kept"].items() if why == "kept by --skip"}
    assert skipped == {f"{name}.weight" for name in names if re.fullmatch(kept, name)}


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (("o_porj",), r"'o_porj' matches no linear.*nearest name is 'o_proj'"),
        (("self_attn.qproj",), r"nearest name is 'self_attn\.q_proj'"),
        (("layers[0",), "is not a pattern"),
        (("",), "matches no linear"),
        (("o_proj", "embed"), "'embed' matches no linear"),
        (("mlp",), None),
        (("mlp.*",), None),
        (("model.*mlp",), "--skip leaves .*% of the weights in 16 bit"),
        (("model",), "--skip leaves 100% of the weights in 16 bit"),
    ],
)
def test_skip_that_cannot_be_followed(
    skip: tuple[str, ...], message: str | None, qwen2_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message or "matches no linear"):
        convert(qwen2_folder, tmp_path / "out", BnbConfig(skip=skip))
    assert not any(tmp_path.iterdir())


def test_a_linear_that_the_table_keeps_goes_to_the_skip_list(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As routers and gates of the families to come: transformers would replace it, the family's rules keep it."""
    row = families.FAMILIES["qwen2"]
    halves = (dataclasses.replace(row.sub_blocks[0], inputs=("self_attn.q_proj", "self_attn.v_proj")),)
    rules = (*row.keep_rules, (r".*k_proj\.weight", "kept for a test"))
    changed = dataclasses.replace(row, sub_blocks=(*halves, *row.sub_blocks[1:]), keep_rules=rules)
    monkeypatch.setitem(families.FAMILIES, "qwen2", changed)
    result = convert(qwen2_folder, tmp_path / "out")
    assert result.skip_modules == ("lm_head", "model.embed_tokens", "self_attn.k_proj")
    assert not any("k_proj" in linear.name for linear in result.linears) and len(result.linears) == 12


IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def dequantized_logits(source: Path, artifact: Path, folder: Path) -> torch.Tensor:
    """Logits of transformers' own model, experts fused, of a 16-bit folder that holds the artifact's dense weights."""
    packed = WeightSource(artifact)
    stored = {name: CheckpointReader(source).info(name).dtype for name in CheckpointReader(source).names}
    constants = {name: packed.reader.read(name) for name, dtype in stored.items() if dtype == torch.int64}
    tensors = {name: packed.dense(name).float().contiguous() for name in stored if name not in constants}
    tensors |= constants
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder / "config.json")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("config", [BnbConfig(double_quant=True), BnbConfig(quant_type="int8")], ids=["nf4", "int8"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_routed_experts_are_quantized_one_by_one(family: str, config: BnbConfig, tmp_path: Path) -> None:
    model = make_family_checkpoint(tmp_path / "in", family)
    result = convert(model, tmp_path / "out", config)
    artifact, spec = CheckpointReader(tmp_path / "out"), WeightSource(model).spec
    assert {linear.name for linear in result.linears} == set(spec.linear_names())
    assert result.quantized_share > (0.9 if spec.family.hyper else 0.98)
    experts = [name for name in spec.linear_names() if ".mlp.experts." in name]
    assert len(experts) > 40 and all(artifact.info(f"{name}.weight").shape[1] == 1 for name in experts), "no stacking"
    kept = set(CheckpointReader(model).names) - {f"{name}.weight" for name in spec.linear_names()}
    assert all(torch.equal(artifact.read(name), CheckpointReader(model).read(name)) for name in kept)
    assert any("import qwen_quant" in line for line in result.warnings)
    manifest = json.loads((tmp_path / "out" / "qwen-quant.json").read_text())
    assert manifest["warnings"] == list(result.warnings)
    with torch.no_grad():
        ours = load_model(tmp_path / "out")(IDS).logits
    expected = dequantized_logits(model, tmp_path / "out", tmp_path / "dense")
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = load_model(model)
    with torch.no_grad():
        assert (ours - plain(IDS).logits).abs().max() > 1e-3, "nothing was quantized"


def test_stacks_of_experts_give_the_same_artifact(tmp_path: Path) -> None:
    separate = make_family_checkpoint(tmp_path / "separate", "qwen3_moe")
    fused = shutil.copytree(separate, tmp_path / "fused")
    fuse_experts(fused)
    for model in (separate, fused):
        convert(model, tmp_path / f"{model.name}-out", BnbConfig(quant_type="int8"))
    same(tensors_of(tmp_path / "fused-out"), tensors_of(tmp_path / "separate-out"))


def test_experts_left_in_16_bit_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader that holds them fused would leave them: most of the weights, without a word."""
    found = bnb_plan._linears

    def fused(model: PreTrainedModel) -> bnb_plan._Linears:
        linears = found(model)
        every = tuple(name for name in linears.every if ".experts." not in name)
        return bnb_plan._Linears(every, frozenset(every) & linears.replaced, linears.default_skip)

    monkeypatch.setattr(bnb_plan, "_linears", fused)
    model = make_family_checkpoint(tmp_path / "in", "qwen2_moe")
    with pytest.raises(InputError, match=r"6\d% of the weights would stay in 16 bit, among them .*mlp\.experts"):
        convert(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_an_experts_codes_that_fit_no_rows(tmp_path: Path) -> None:
    model = make_family_checkpoint(tmp_path / "in", "qwen3_moe")
    convert(model, tmp_path / "out", BnbConfig(quant_type="int8"))
    name = "model.layers.1.mlp.experts.5.up_proj"
    edit_tensors(tmp_path / "out", **{f"{name}.SCB".replace(".", "__"): torch.ones(63)})
    with pytest.raises(InputError, match=r"experts\.5\.up_proj\.weight' holds 8192 codes.*SCB' has 63 values"):
        WeightSource(tmp_path / "out").dense(f"{name}.weight")


def peer_command(folder: Path, ids: torch.Tensor) -> list[str]:
    """The command that loads a folder where bitsandbytes is, with the weights and logits that it must give."""
    python = os.environ.get("QWEN_QUANT_BNB_PYTHON")
    assert python, "set QWEN_QUANT_BNB_PYTHON to a Python with bitsandbytes, accelerate and transformers"
    weights = WeightSource(folder)
    stored = CheckpointReader(folder)
    packed = [n for n in weights.spec.linear_names() if f"{n}.weight.absmax" in stored or f"{n}.SCB" in stored]
    expected = {name: weights.dense(f"{name}.weight") for name in packed}
    with torch.no_grad():
        logits = load_model(folder)(ids).logits
    place = folder.with_name("expected.safetensors")
    save_file({**expected, "ids": ids, "logits": logits}, place)
    return [python, str(BNB_SCRIPT), str(folder), str(place)]


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_transformers_and_bitsandbytes_load_the_experts(family: str, kind: str, tmp_path: Path) -> None:
    """After `import qwen_quant` with every weight as dequantized here; without it not at all, and it says so."""
    model = make_family_checkpoint(tmp_path / "in", family, dtype=torch.float32)
    config = BnbConfig(kind) if kind == "int8" else BnbConfig(kind, double_quant=True, compute_dtype="fp32")
    convert(model, tmp_path / "out", config)
    command = peer_command(tmp_path / "out", IDS)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **HERE})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    stock = subprocess.run([*command, "--stock"], capture_output=True, text=True, check=False)
    assert stock.returncode != 0 and "RuntimeError" in stock.stderr and "size mismatch" in stock.stderr + stock.stdout


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5"])
def test_linear_attention(family: str, tmp_path: Path) -> None:
    """Its small projections stay in 16 bit, as does the tower of a vision model, by a skip list that says so."""
    result = convert(make_family_checkpoint(tmp_path / "in", family), tmp_path / "out")
    assert result.skip_modules is not None and result.quantized_share > 0.95
    assert {"lm_head", "linear_attn.in_proj_a", "linear_attn.in_proj_b"} <= set(result.skip_modules)
    source = CheckpointReader(tmp_path / "in")
    kept = {name for name in CheckpointReader(tmp_path / "out").names if name in source}
    kept -= {f"{linear.name}.weight" for linear in result.linears}
    assert any("in_proj_a" in name for name in kept) and any("visual" in name for name in kept) == (family == "qwen3_5")
    linears = {f"{name}.weight" for name in WeightSource(tmp_path / "in").spec.linear_names()}
    assert kept | linears == set(source.names) and not kept & linears


def with_value(model: Path, name: str, value: float, dtype: torch.dtype | None = None) -> None:
    tensor = load_file(model / "model.safetensors")[name].clone()
    tensor = tensor if dtype is None else tensor.to(dtype)
    tensor.flatten()[-1] = value
    edit_tensors(model, **{name.replace(".", "__"): tensor})


@pytest.mark.parametrize("config", [BnbConfig(), BnbConfig(double_quant=True), BnbConfig(quant_type="int8")], ids=str)
@pytest.mark.parametrize("name", [f"{K_PROJ}.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers(config: BnbConfig, name: str, value: float, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in")
    with_value(model, name, value)
    with pytest.raises(InputError, match=f"'{name}' holds NaN or Inf"):
        convert(model, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_int8_refuses_what_fp16_cannot_hold(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in")
    with_value(model, f"{K_PROJ}.weight", -70000.0)
    with pytest.raises(InputError, match=r"holds a value of 7\.01e\+04.*FP16"):
        convert(model, tmp_path / "out", BnbConfig(quant_type="int8"))
    assert convert(model, tmp_path / "out", resume=False).linears


def test_bad_folders(qwen2_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(qwen2_folder, tmp_path / "in")
    out = tmp_path / "out"
    convert(model, out)
    with pytest.raises(InputError, match="out is already quantized"):
        convert(out, tmp_path / "again")
    with pytest.raises(InputError, match="exists: nothing is overwritten"):
        convert(model, out)
    assert convert(model, out, BnbConfig(quant_type="int8"), force=True).quant_type == "int8"
    assert WeightSource(out).kind == "bitsandbytes int8"
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated or corrupt"):
        convert(model, tmp_path / "cut")
    change_config(model, model_type="llama")
    with pytest.raises(InputError, match="'llama' is not a Qwen family"):
        convert(model, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_is_said_before_the_work(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_quant.resume.free_disk_bytes", lambda path: 1000)
    with pytest.raises(InputError, match="the disk of .* is full"):
        convert(qwen2_folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_type": "nf8"}, "quant_type is 'nf8'"),
        ({"block_size": 32}, "block_size is 32"),
        ({"block_size": 96}, "block_size is 96"),
        ({"block_size": 8192}, "block_size is 8192"),
        ({"compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
        ({"quant_type": "int8", "double_quant": True}, "double_quant does not go with int8"),
        ({"quant_type": "int8", "block_size": 128}, "block_size does not go with int8"),
        ({"quant_type": "int8", "compute_dtype": "bf16"}, "compute_dtype does not go with int8"),
        ({"int8_threshold": 5.0}, "int8_threshold does not go with nf4"),
        ({"quant_type": "int8", "int8_threshold": -1.0}, "int8_threshold is -1.0"),
        ({"quant_type": "int8", "int8_threshold": float("nan")}, "int8_threshold is nan"),
    ],
)
def test_settings_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BnbConfig(**values)


def test_settings_as_transformers_saves_them() -> None:
    saved = settings_of(BnbConfig(compute_dtype="fp16", double_quant=True), ["lm_head"])
    assert saved["bnb_4bit_compute_dtype"] == "float16" and saved["llm_int8_skip_modules"] == ["lm_head"]
    assert json.loads(json.dumps(saved)) == saved and list(saved) == sorted(saved)


def test_recipe_table(tmp_path: Path) -> None:
    path = tmp_path / "qwen-quant.toml"
    path.write_text('[bnb]\nquant_type = "fp4"\nskip = ["o_proj", "lm_head"]\nblock_size = 128\n')
    assert load_recipe(path).bnb == BnbConfig("fp4", block_size=128, skip=("o_proj", "lm_head"))
    path.write_text("[bnb]\nskip = [1]\n")
    with pytest.raises(InputError, match=r"\[bnb\] skip = \[1\]"):
        load_recipe(path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line."""
    code = cli.run(["bnb", *arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_command_line(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(qwen2_folder)
    code, out, _ = call(capsys, model, "out", "--json", "--quant-type", "fp4", "--skip", "o_proj")
    assert code == 0
    document = json.loads(out)
    assert document["command"] == "bnb" and document["quant_type"] == "fp4"
    assert document["skip_modules"] == ["lm_head", "model.embed_tokens", "o_proj"]
    Path("qwen-quant.toml").write_text('[bnb]\nquant_type = "int8"\nint8_threshold = 5.5\n')
    code, out, _ = call(capsys, model, "out", "--force")
    assert code == 0 and "bitsandbytes int8\n" in out and "14 linears" in out
    settings = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert settings["load_in_8bit"] is True and settings["llm_int8_threshold"] == 5.5


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("a", "b", "--quant-type", "nf8"), 2, "--quant-type"),
        (("a", "b", "--compute-dtype", "fp8"), 2, "--compute-dtype"),
        (("a", "b", "--block-size", "small"), 2, "--block-size"),
        (("a", "b", "--quant-type", "int8", "--double-quant"), 3, "double_quant does not go with int8"),
        (("a", "b", "--block-size", "32"), 3, "block_size is 32"),
        (("a", "b", "--max-shard-size", "much"), 2, "'much' is not a size"),
        (("./absent", "b"), 3, "absent"),
        (("a",), 2, "OUT is missing"),
        ((".", "."), 3, "nothing is overwritten"),
    ],
)
def test_command_lines_that_are_refused(
    arguments: tuple[str, ...],
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, error = call(capsys, *arguments)
    assert (found, out) == (code, "") and word in error and "Traceback" not in error
    assert error.count("error: ") == 1 and "next: " in error


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for word in ("--json", "--quiet", "Examples:", "    qwen-quant bnb", "--int8-threshold", "--skip"):
        assert word in out


@pytest.mark.interop
@pytest.mark.parametrize("config", [*CONFIGS.values(), BnbConfig(block_size=256, double_quant=True)], ids=str)
def test_transformers_loads_it_with_bitsandbytes(config: BnbConfig, tmp_path: Path) -> None:
    """Stock transformers, in a Python that has bitsandbytes: every weight as dequantized here, logits near ours."""
    convert(GOLDEN / "qwen3", tmp_path / "out", config)
    done = subprocess.run(
        [*peer_command(tmp_path / "out", torch.arange(20)[None]), "--stock", "--near"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
