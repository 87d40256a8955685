"""AutoModelForCausalLM.from_pretrained of GPTQ folders where gptqmodel is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

from qwen_quant.errors import InputError, UsageError
from qwen_quant.runtime import hf_quantizer
from qwen_quant.runtime.hf_quantizer import Int4HfQuantizer, PackedGPTQConfig
from qwen_quant.runtime.loading import load_model
from qwen_quant.runtime.quantized_model import bytes_per_token, load_quantized
from tests.runtime.test_kernels import assert_near
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import edit_tensors, make_checkpoint
from tests.support.moe import make_family_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed and serves GPTQ folders"
)
IDS = torch.arange(120)[None] * 7 % 256


@pytest.fixture
def artifact(qwen2_folder: Path, tmp_path: Path) -> Path:
    make_artifact(qwen2_folder, tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.mark.parametrize(("sym", "layout"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
def test_logits_and_generate(qwen2_folder: Path, tmp_path: Path, sym: bool, layout: str) -> None:
    make_artifact(qwen2_folder, tmp_path / "q", sym=sym, checkpoint_format=layout)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    dense = load_model(tmp_path / "q")
    with torch.no_grad():
        for length in (1, 120):
            assert_near(model(IDS[:, :length]).logits, dense(IDS[:, :length]).logits, 2e-4, (sym, layout, length))
    assert torch.equal(model.generate(IDS, max_new_tokens=6), dense.generate(IDS, max_new_tokens=6))
    assert len(model.kernel_report.linears) == 14 and model.is_quantized
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_sharded_untied_qwen3(tmp_path: Path) -> None:
    make_artifact(make_checkpoint(tmp_path / "qwen3", "qwen3", tied=False), tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        assert_near(model(IDS).logits, load_model(tmp_path / "q")(IDS).logits, 2e-4, "qwen3")


def test_nothing_is_reported_missing_or_unexpected(artifact: Path) -> None:
    edit_tensors(artifact, model__layers__0__mlp__down_proj__bias=torch.zeros(128))  # as AutoGPTQ wrote them
    _, info = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_real_bias_without_a_place_is_reported(artifact: Path) -> None:
    edit_tensors(artifact, model__layers__0__mlp__down_proj__bias=torch.ones(128))
    _, info = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.layers.0.mlp.down_proj.bias"}


def test_scales_stay_exact_in_a_bf16_model(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    dense = load_model(artifact)
    linear = model.model.layers[0].mlp.up_proj
    bound = 0.0 if linear.kernel.name in ("native", "reference") else 5e-3
    assert_near(linear.dequantized(), dense.model.layers[0].mlp.up_proj.weight, bound, linear.kernel.name)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_the_settings_survive(artifact: Path) -> None:
    change_config(
        artifact,
        quantization_config={
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "static_groups": True,
            "meta": {"a": 1},
        },
    )
    config = AutoModelForCausalLM.from_pretrained(artifact).config.quantization_config
    assert isinstance(config, GPTQConfig) and isinstance(config, PackedGPTQConfig)
    assert config.to_dict()["static_groups"] is True and config.to_dict()["meta"] == {"a": 1}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_callers_own_gptq_config_is_taken(artifact: Path) -> None:
    """As transformers' documentation has it for loading attributes; the folder's own settings stay."""
    model = AutoModelForCausalLM.from_pretrained(artifact, quantization_config=GPTQConfig(bits=8, backend="auto"))
    assert model.config.quantization_config.to_dict()["bits"] == 4 and len(model.kernel_report.linears) == 14


def test_saving_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        AutoModelForCausalLM.from_pretrained(artifact).save_pretrained(tmp_path / "saved")


def test_quantizing_on_the_fly_is_refused(qwen2_folder: Path) -> None:
    with pytest.raises(UsageError, match="from_pretrained quantizes nothing here"):
        AutoModelForCausalLM.from_pretrained(qwen2_folder, quantization_config=GPTQConfig(bits=4))


def test_several_devices_are_refused(artifact: Path) -> None:
    with pytest.raises(UsageError, match="runs on one device"):
        hf_quantizer._device({"a": "cpu", "b": "cuda:0"})
    assert hf_quantizer._device({"": 0}) == torch.device("cuda:0")


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
def test_device_maps(artifact: Path, place: object) -> None:
    """What accelerate would spread over devices goes to the one there is."""
    model = AutoModelForCausalLM.from_pretrained(artifact, device_map=place, dtype=torch.float32)
    wanted = "cuda" if torch.cuda.is_available() and place not in ("cpu", {"": "cpu"}) else "cpu"
    assert {part.device.type for part in model.parameters()} == {wanted}
    assert len(model.kernel_report.linears) == 14 and model(IDS.to(wanted)).logits.isfinite().all()


def test_a_config_of_other_sizes(artifact: Path) -> None:
    change_config(artifact, intermediate_size=256)
    with pytest.raises(InputError, match="has no place of its shape in the model"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_settings_per_module_are_refused(artifact: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"x": {"bits": 8}}}
    change_config(artifact, quantization_config=settings)
    with pytest.raises(InputError, match="settings of their own"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_importing_the_package_is_enough_and_touches_gptq_and_bitsandbytes_only(artifact: Path) -> None:
    code = (
        "import sys\n"
        "from transformers.quantizers import auto\n"
        "tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "before = [dict(table) for table in tables]\n"
        "import qwen_quant\n"
        "changed = [{k for k in t if t[k] is not b.get(k)} for t, b in zip(tables, before)]\n"
        "assert changed == [{'gptq', 'bitsandbytes_4bit', 'bitsandbytes_8bit'}, {'gptq'}], changed\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(len(AutoModelForCausalLM.from_pretrained(sys.argv[1]).kernel_report.linears))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "14"


def test_gptqmodel_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", GptqHfQuantizer)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", GPTQConfig)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not hf_quantizer.register() and issubclass(AUTO_QUANTIZER_MAPPING["gptq"], GptqHfQuantizer)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert hf_quantizer.register() and AUTO_QUANTIZER_MAPPING["gptq"] is Int4HfQuantizer


def test_with_gptqmodel_packed_experts_are_refused_and_not_left_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with gptqmodel itself too (docs/consumers.md); here only the guard, which needs neither it nor optimum."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", GptqHfQuantizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    hf_quantizer.register()
    make_artifact(make_family_checkpoint(tmp_path / "model", "qwen3_moe"), tmp_path / "q")
    loader = AUTO_QUANTIZER_MAPPING["gptq"]
    files = [str(tmp_path / "q" / "model.safetensors")]
    with pytest.raises(InputError, match="experts random"):
        loader.__new__(loader)._process_model_before_weight_loading(torch.nn.Module(), checkpoint_files=files)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_packed_experts_and_text_models_of_vision_checkpoints(tmp_path: Path, family: str) -> None:
    """Experts stay separate; names on disk are those of the whole model, of which the text part is loaded."""
    source, folder = make_family_checkpoint(tmp_path / family, family), tmp_path / "q"
    tensors = load_file(source / "model.safetensors")
    tower = {name: tensors[name] for name in tensors if "visual" in name}
    save_file({name: tensors[name] for name in tensors if name not in tower}, source / "model.safetensors")
    make_artifact(source, folder)
    edit_tensors(folder, **{name.replace(".", "__"): value for name, value in tower.items()})
    hooked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed, dense = load_quantized(folder, dtype=torch.float32), load_model(folder)
    with torch.no_grad():
        expected = dense(IDS).logits
        for model in (hooked, packed):
            assert_near(model(IDS).logits, expected, 1e-3, family)
    names = {entry.linear for entry in hooked.kernel_report.linears}
    assert any(".experts.7.down_proj" in name for name in names) and len(packed.kernel_report.linears) == len(names)
    read = bytes_per_token(packed)
    experts = sum(entry.weight_bytes for entry in packed.kernel_report.linears if ".experts." in entry.linear)
    packed.config.get_text_config().num_experts_per_tok = 8
    assert bytes_per_token(packed) - read == experts * 6 / 8  # 2 of 8 experts for a token
