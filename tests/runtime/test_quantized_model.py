"""GPTQ folders as runnable models: logits of the dequantized model, memory, reports, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_quant.errors import InputError, UsageError
from qwen_quant.packing import pack_weight
from qwen_quant.runtime.head import Bf16Head
from qwen_quant.runtime.linear import Int4Linear
from qwen_quant.runtime.loading import load_model
from qwen_quant.runtime.quantized_model import bytes_per_token, load_quantized
from tests.runtime.test_kernels import assert_near, needs_native
from tests.support.artifacts import change_config, make_artifact, rounded
from tests.support.checkpoints import edit_tensors, make_checkpoint
from tests.support.qwen1 import copy_checkpoint

IDS = torch.arange(120)[None] * 7 % 256
Q_PROJ = "model.layers.0.self_attn.q_proj"
LINEARS = 14  # 7 in each of two blocks


@pytest.fixture
def artifact(qwen2_folder: Path, tmp_path: Path) -> Path:
    make_artifact(qwen2_folder, tmp_path / "artifact")
    return tmp_path / "artifact"


def compare(folder: Path, bound: float = 2e-4, **options: str | None) -> None:
    """Logits of few rows (the kernels) and of many (tiles) against the dequantized FP32 model."""
    model, dense = load_quantized(folder, dtype=torch.float32, **options), load_model(folder)
    with torch.no_grad():
        for length in (1, 5, 120):
            ids = IDS[:, :length]
            assert_near(model(ids).logits, dense(ids).logits, bound, (folder.name, options, length))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_logits_of_qwen2(qwen2_folder: Path, tmp_path: Path, layout: str, sym: bool) -> None:
    make_artifact(qwen2_folder, tmp_path / "q", sym=sym, checkpoint_format=layout)
    compare(tmp_path / "q")


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_run_exactly_through_the_reference(qwen2_folder: Path, tmp_path: Path, bits: int) -> None:
    make_artifact(qwen2_folder, tmp_path / "q", bits=bits, sym=False)
    compare(tmp_path / "q", 1e-6)
    assert load_quantized(tmp_path / "q").kernel_report.counts() == {"reference": LINEARS}


@pytest.mark.parametrize(("kernel", "bound"), [("torch int4 (CPU)", 3e-2), ("reference", 1e-6)])
def test_every_kernel_by_name(artifact: Path, kernel: str, bound: float) -> None:
    compare(artifact, bound, kernel=kernel)
    assert load_quantized(artifact, kernel=kernel).kernel_report.counts() == {kernel: LINEARS}


def test_logits_of_an_untied_qwen3(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", tied=False)
    make_artifact(folder, tmp_path / "q")
    compare(tmp_path / "q")


def test_act_order_artifacts(artifact: Path) -> None:
    changes = {}
    for name, value in load_file(artifact / "model.safetensors").items():
        if name.endswith("g_idx"):
            order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(0))
            changes[name.replace(".", "__")] = value[order]
    edit_tensors(artifact, **changes)
    compare(artifact)
    assert all(entry.act_order for entry in load_quantized(artifact).kernel_report.linears)


@needs_native
def test_the_report_and_the_bytes_of_a_token(artifact: Path) -> None:
    model = load_quantized(artifact, dtype=torch.float32)
    report = model.kernel_report
    assert report.counts() == {"native": LINEARS} and report.linears[0].linear == Q_PROJ and report.seconds > 0
    assert report.reasons() == {} and report.summary() == f"{LINEARS} x native"
    assert json.loads(json.dumps(report.to_json()))["head"] == "native BF16"
    packed = sum(entry.weight_bytes for entry in report.linears)
    # 4-bit codes, an FP16 scale for each of 32 weights, q/k/v biases in FP32. The kernel's lanes are 64 codes long, so
    # the 224 inputs of down_proj are kept as 256.
    weights = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 128 * 224 * 2 + 128 * 256)
    assert packed == weights * (4 / 8 + 2 / 32) + 2 * (128 + 64 + 64) * 4
    assert bytes_per_token(model) == packed + 320 * 128 * 2 + 5 * 128 * 4
    other = load_quantized(artifact, kernel="torch int4 (CPU)").kernel_report
    assert other.summary() == f"{LINEARS} x torch int4 (CPU)"


@needs_native
@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_head_in_an_fp32_model_is_exact_and_tied(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", tied=tied)
    make_artifact(folder, tmp_path / "q")
    model = load_quantized(tmp_path / "q", dtype=torch.float32)
    assert isinstance(model.lm_head, Bf16Head) and model.lm_head.weight.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for rows in (1, 3, 50):
        inputs = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
        assert_near(model.lm_head(inputs), inputs.double() @ model.lm_head.weight.double().mT, 1e-6, rows)
    odd = Bf16Head(45, 7)  # no multiple of the 32 values of one step
    odd.weight = torch.nn.Parameter(torch.randn(7, 45).bfloat16(), False)
    inputs = torch.randn(2, 45)
    assert_near(odd(inputs), inputs.double() @ odd.weight.double().mT, 1e-6, "width 45")


def test_a_bf16_model(artifact: Path) -> None:
    model = load_quantized(artifact, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert_near(model(IDS).logits, load_model(artifact)(IDS).logits, 3e-2, "BF16")


def test_generate_with_batch_padding_and_beams(artifact: Path) -> None:
    model, dense = load_quantized(artifact, dtype=torch.float32), load_model(artifact)
    ids = torch.cat([IDS[:, :9], IDS[:, 20:29]])
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    for options in ({"max_new_tokens": 8}, {"max_new_tokens": 6, "num_beams": 3}):
        given, expected = (m.generate(ids, attention_mask=mask, do_sample=False, **options) for m in (model, dense))
        assert torch.equal(given, expected)


def test_first_generation(tmp_path: Path) -> None:
    source, folder = copy_checkpoint(tmp_path / "qwen1"), tmp_path / "q"
    make_artifact(source, folder)  # c_proj is packed, c_attn, w1 and w2 follow
    for name, value in load_file(source / "model.safetensors").items():
        if name.endswith((".w1.weight", ".w2.weight", ".c_attn.weight")):
            packed = pack_weight(rounded(value, 4, sym=True), 4, "gptq")
            base = name.removesuffix("weight").replace(".", "__")
            edit_tensors(folder, **{base + suffix: part for suffix, part in packed.items()}, **{base + "weight": None})
    compare(folder)
    assert len(load_quantized(folder).kernel_report.linears) % 5 == 0


def test_a_zero_bias_that_autogptq_wrote(artifact: Path) -> None:
    edit_tensors(artifact, **{"model__layers__0__mlp__down_proj__bias": torch.zeros(128)})
    compare(artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "has shape"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"num_hidden_layers": 3}, "lacks the tensor"),
    ],
)
def test_a_config_that_does_not_fit(artifact: Path, changes: dict[str, int], message: str) -> None:
    change_config(artifact, **changes, layer_types=None)
    with pytest.raises(InputError, match=message):
        load_quantized(artifact)


def test_a_16_bit_folder_is_refused(qwen2_folder: Path) -> None:
    with pytest.raises(InputError, match="is no GPTQ artifact: it is 16-bit"):
        load_quantized(qwen2_folder)


def test_an_unknown_kernel_name(artifact: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_quantized(artifact, kernel="exllama")


def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """Peak memory of loading: the packed model and one linear's temporaries, far below the dense model."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    folder = make_checkpoint(tmp_path / "model", **sizes)
    make_artifact(folder, tmp_path / "q")
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from qwen_quant.environment import peak_rss_bytes\n"
        "from qwen_quant.runtime.quantized_model import load_quantized\n"
        "load_quantized(Path(sys.argv[1])); before = peak_rss_bytes()\n"
        "model = load_quantized(Path(sys.argv[2]))\n"
        "print(peak_rss_bytes() - before, sum(e.weight_bytes for e in model.kernel_report.linears))"
    )
    make_artifact(make_checkpoint(tmp_path / "small"), tmp_path / "small-q")
    command = [sys.executable, "-c", code, str(tmp_path / "small-q"), str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, packed = map(int, done.stdout.split())
    largest_linear = 4096 * 1024
    assert grown < packed + 14 * largest_linear, f"{grown} bytes for {packed} packed"


def test_modules_are_int4_linears(artifact: Path) -> None:
    model = load_quantized(artifact)
    assert isinstance(model.get_submodule(Q_PROJ), Int4Linear)
    assert "bits=4" in repr(model.get_submodule(Q_PROJ))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])


def test_saving_a_packed_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be saved"):
        load_quantized(artifact).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
