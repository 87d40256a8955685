"""runtime/loading.py: 16-bit and GPTQ folders under the names of the 16-bit model, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_quant.errors import InputError
from qwen_quant.runtime.gptq_folder import dequantized_by_rows
from qwen_quant.runtime.loading import WeightSource, load_model
from tests.support.artifacts import change_config, make_artifact, rounded
from tests.support.checkpoints import edit_tensors, make_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(40)[None] % 256


@pytest.fixture
def artifact(qwen2_folder: Path, tmp_path: Path) -> Path:
    make_artifact(qwen2_folder, tmp_path / "artifact")
    return tmp_path / "artifact"


def transformers_logits(folder: Path, changed: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """transformers' own loader of the 16-bit folder, with some weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, value in (changed or {}).items():
        model.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("fixture", ["qwen2_folder", "qwen3_folder"])
def test_a_16_bit_folder_gives_transformers_logits(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    model = load_model(folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, transformers_logits(folder))
    tied = fixture == "qwen2_folder"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.generation_config.do_sample is False
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 42)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype=dtype)
    source = WeightSource(folder)
    assert source.dense(Q_PROJ + ".weight").dtype == dtype and not source.is_quantized
    with torch.no_grad():
        assert torch.equal(load_model(folder)(IDS).logits, transformers_logits(folder))


@pytest.mark.parametrize(
    ("bits", "sym", "layout"), [(4, True, "gptq"), (4, False, "gptq"), (4, False, "gptq_v2"), (3, False, "gptq")]
)
def test_an_artifact_gives_the_logits_of_its_dequantized_weights(
    qwen2_folder: Path, tmp_path: Path, bits: int, sym: bool, layout: str
) -> None:
    dense = make_artifact(qwen2_folder, tmp_path / "q", bits=bits, sym=sym, checkpoint_format=layout)
    source = WeightSource(tmp_path / "q")
    assert source.is_quantized and source.nbytes < WeightSource(qwen2_folder).nbytes
    for name, value in dense.items():
        assert torch.equal(source.dense(name), value)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "q")(IDS).logits, transformers_logits(qwen2_folder, dense))


def test_dequantizing_in_row_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rounded(torch.randn(96, 64), 4, sym=False)
    monkeypatch.setattr("qwen_quant.runtime.gptq_folder._CHUNK_VALUES", 64 * 7)
    assert torch.equal(dequantized_by_rows(weight), weight.dequantized())


def test_an_older_artifact_without_checkpoint_format_is_v1(artifact: Path) -> None:
    expected = WeightSource(artifact).dense(Q_PROJ + ".weight")
    settings = json.loads((artifact / "config.json").read_text())["quantization_config"]
    del settings["checkpoint_format"]
    change_config(artifact, quantization_config=settings)
    assert torch.equal(WeightSource(artifact).dense(Q_PROJ + ".weight"), expected)


def test_settings_may_be_in_quantize_config_json(artifact: Path) -> None:
    expected = WeightSource(artifact).dense(Q_PROJ + ".weight")
    change_config(artifact, quantization_config=None)
    (artifact / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    assert torch.equal(WeightSource(artifact).dense(Q_PROJ + ".weight"), expected)


def test_act_order_is_read_through_g_idx(artifact: Path) -> None:
    g_idx = load_file(artifact / "model.safetensors")[Q_PROJ + ".g_idx"]
    before = WeightSource(artifact).quantized(Q_PROJ)
    edit_tensors(artifact, **{(Q_PROJ + ".g_idx").replace(".", "__"): g_idx.flip(0).contiguous()})
    after = WeightSource(artifact).dense(Q_PROJ + ".weight")
    column = g_idx.flip(0).long()
    assert torch.equal(after, (before.codes - before.zeros[:, column].float()) * before.scales.float()[:, column])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "laid out for one kernel"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5"),
        ({"quant_method": "gptq", "bits": True}, "bits True"),
        ({"quant_method": "gptq"}, "bits None"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "settings of their own"),
        ("gptq", "not a JSON object"),
    ],
)
def test_other_quantizations_are_refused(artifact: Path, settings: object, message: str) -> None:
    change_config(artifact, quantization_config=settings)
    with pytest.raises(InputError, match=message):
        WeightSource(artifact)


def test_an_unreadable_quantize_config(artifact: Path) -> None:
    change_config(artifact, quantization_config=None)
    (artifact / "quantize_config.json").write_text("{")
    with pytest.raises(InputError, match="quantize_config.json cannot be read"):
        WeightSource(artifact)


def test_packed_tensors_without_settings(artifact: Path) -> None:
    change_config(artifact, quantization_config=None)
    with pytest.raises(InputError, match="no quantization settings"):
        WeightSource(artifact)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_packed_tensor(artifact: Path, suffix: str) -> None:
    edit_tensors(artifact, **{f"{Q_PROJ}.{suffix}".replace(".", "__"): None})
    with pytest.raises(InputError, match=rf"lacks the tensor '{Q_PROJ}.{suffix}'"):
        WeightSource(artifact).dense(Q_PROJ + ".weight")


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("qzeros", torch.zeros(4, 15, dtype=torch.int32), "qzeros' is torch.int32"),
        ("scales", torch.zeros(4, 128, dtype=torch.int32), "scales' is torch.int32"),
        ("scales", torch.zeros(3, 128).half(), "qzeros' is"),
        ("qweight", torch.zeros(32, 128, dtype=torch.int32), "g_idx' is"),
        ("qweight", torch.zeros(16, dtype=torch.int32), "not matrices"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "outside 0..3"),
    ],
)
def test_misshapen_packed_tensors(artifact: Path, suffix: str, value: torch.Tensor, message: str) -> None:
    edit_tensors(artifact, **{f"{Q_PROJ}.{suffix}".replace(".", "__"): value})
    with pytest.raises(InputError, match=message):
        WeightSource(artifact).dense(Q_PROJ + ".weight")


def test_bits_that_do_not_belong_to_the_weights(artifact: Path) -> None:
    change_config(artifact, quantization_config={"quant_method": "gptq", "bits": 8})
    with pytest.raises(InputError, match="is needed at 8 bits"):
        load_model(artifact)


def test_a_weight_both_packed_and_plain(artifact: Path) -> None:
    edit_tensors(artifact, **{(Q_PROJ + ".weight").replace(".", "__"): torch.zeros(128, 128)})
    with pytest.raises(InputError, match="both packed and plain"):
        load_model(artifact)


def test_missing_unexpected_and_misshapen_tensors(qwen2_folder: Path, tmp_path: Path) -> None:
    for k, (name, value, message) in enumerate(
        [
            ("model.norm.weight", None, "lacks the tensor 'model.norm.weight'"),
            ("model.extra.weight", torch.zeros(2), "unexpected tensor 'model.extra.weight'"),
            ("model.norm.weight", torch.zeros(3), "'model.norm.weight' has shape"),
            ("model.norm.weight", torch.zeros(128, dtype=torch.int32), "is torch.int32"),
        ]
    ):
        folder = tmp_path / str(k)
        shutil.copytree(qwen2_folder, folder)
        edit_tensors(folder, **{name.replace(".", "__"): value})
        with pytest.raises(InputError, match=message):
            load_model(folder)


def test_a_zero_of_0_in_the_v1_layout_is_said(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    qzeros = load_file(artifact / "model.safetensors")[Q_PROJ + ".qzeros"]
    edit_tensors(artifact, **{(Q_PROJ + ".qzeros").replace(".", "__"): torch.full_like(qzeros, -1)})
    WeightSource(artifact).dense(Q_PROJ + ".weight")
    assert "zeros of 0" in caplog.text
