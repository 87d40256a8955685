"""bnb.py and runtime/bnb_folder.py against bitsandbytes' own folders and dense weights (tests/golden/bnb)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_quant.bnb import NestedAbsmax, decode_absmax, dequantize_4bit, dequantize_int8
from qwen_quant.errors import InputError
from qwen_quant.evaluation.streaming import final_hidden
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.runtime.loading import WeightSource, load_model
from tests.support.artifacts import change_config

GOLDEN = Path(__file__).parent / "golden" / "bnb"
CASES = ("nf4", "nf4_double", "fp4", "int8")
K_PROJ = "model.layers.0.self_attn.k_proj"
KINDS = {"nf4_double": "bitsandbytes nf4 double quant"}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture
def copied(tmp_path: Path):
    def copy(case: str) -> Path:
        shutil.copytree(GOLDEN / case, tmp_path / case)
        return tmp_path / case

    return copy


def edit(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_bitsandbytes_own_to_the_last_bit(case: str) -> None:
    source = WeightSource(GOLDEN / case)
    expected = json.loads((GOLDEN / "dequantized.json").read_text())["sha256"][case]
    whole = load_file(GOLDEN / "k_proj_fp32.safetensors")[case]
    assert torch.equal(source.dense(K_PROJ + ".weight"), whole)
    assert set(expected) == set(source.spec.linear_names())
    for base, digests in expected.items():
        weight = source.dense(base + ".weight")
        assert weight.dtype == torch.float32 and digest(weight) == digests["fp32"], base
        assert digest(weight.bfloat16()) == digests["bf16"], base


@pytest.mark.parametrize("case", CASES)
def test_what_a_folder_says_of_itself(case: str) -> None:
    source = WeightSource(GOLDEN / case)
    assert source.is_quantized and source.packed is None
    assert source.kind == KINDS.get(case, f"bitsandbytes {case}")
    assert source.base_of(K_PROJ + ".weight") == K_PROJ
    assert source.base_of(K_PROJ + ".bias") is None and source.base_of("model.norm.weight") is None
    assert source.dense("model.norm.weight").dtype == torch.bfloat16
    with pytest.raises(InputError, match="it has no GPTQ codes"):
        source.quantized(K_PROJ)


@pytest.mark.parametrize("case", CASES)
def test_the_loaded_model_is_that_of_the_dense_weights(case: str, tmp_path: Path) -> None:
    source = WeightSource(GOLDEN / case)
    model = load_model(GOLDEN / case)
    config = json.loads((GOLDEN / case / "config.json").read_text())
    del config["quantization_config"]
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config), dtype=torch.float32).eval()
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(source.dense(name))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_only_the_state_of_expected_weights_is_used(case: str, copied) -> None:
    folder = copied(case)
    edit(folder, {"model.other.weight.absmax": torch.zeros(2), "model.other.SCB": torch.zeros(2)})
    source = WeightSource(folder)
    expected = {name for name in source.reader.names if name.endswith(("weight", "bias"))}
    assert sorted(source.unused(expected)) == ["model.other.SCB", "model.other.weight.absmax"]
    with pytest.raises(InputError, match="unexpected tensor 'model.other"):
        load_model(folder)


def slow_4bit(packed: list[int], absmax: list[float], table: list[float], blocksize: int, count: int) -> list[float]:
    """One value at a time, in Python floats."""
    values = []
    for i in range(count):
        index = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        values.append(table[index] * absmax[i // blocksize])
    return values


@pytest.mark.parametrize(("shape", "blocksize"), [((3, 7), 4), ((4, 16), 16), ((5, 6), 64), ((1, 1), 2)])
def test_4bit_layout_with_short_blocks_and_odd_counts(shape: tuple[int, int], blocksize: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    count = shape[0] * shape[1]
    packed = torch.randint(0, 256, (-(-count // 2), 1), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-count // blocksize), generator=generator).round(decimals=3)
    table = torch.linspace(-1, 1, 16)
    expected = torch.tensor(
        slow_4bit(packed.flatten().tolist(), absmax.tolist(), table.tolist(), blocksize, count), dtype=torch.float64
    )
    weight = dequantize_4bit(packed, absmax, table, blocksize, shape)
    assert torch.allclose(weight.double().flatten(), expected, rtol=1e-6, atol=0)
    monkeypatch.setattr("qwen_quant.bnb._CHUNK_VALUES", 1)
    assert torch.equal(dequantize_4bit(packed, absmax, table, blocksize, shape), weight)
    if packed.numel() % 2 == 0:
        assert torch.equal(
            dequantize_4bit(packed.flatten().view(torch.bfloat16), absmax, table, blocksize, shape), weight
        )


def test_nested_absmax_by_hand() -> None:
    nested = NestedAbsmax(torch.tensor([2.0, 4.0]), torch.arange(256) / 256, blocksize=3, offset=0.5)
    stored = torch.tensor([0, 128, 64, 64, 255], dtype=torch.uint8)
    assert decode_absmax(stored, nested).tolist() == [0.5, 1.5, 1.0, 1.5, 0.5 + 4 * 255 / 256]
    assert torch.equal(decode_absmax(torch.tensor([[1.5]]), None), torch.tensor([1.5]))


def test_int8_by_hand() -> None:
    weight = dequantize_int8(torch.tensor([[127, -127], [0, 1]], dtype=torch.int8), torch.tensor([2.0, 127.0]))
    assert torch.allclose(weight, torch.tensor([[2.0, -2.0], [0.0, 1.0]]), rtol=1e-6)


STATE = K_PROJ + ".weight.quant_state.bitsandbytes__nf4"


def state_tensor(**changes: object) -> torch.Tensor:
    stored = load_file(GOLDEN / "nf4" / "model.safetensors")[STATE]
    state = {**json.loads(bytes(stored.tolist())), **changes}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        ("nf4", STATE, None, "lacks the tensor '.*quant_state.bitsandbytes__nf4'"),
        ("nf4", STATE, torch.zeros(3, dtype=torch.uint8), "quant_state.bitsandbytes__nf4' cannot be read"),
        ("nf4", STATE, state_tensor(shape=[32]), "cannot be read"),
        ("nf4", STATE, state_tensor(shape=[32, 32]), "holds 1024 bytes"),
        ("nf4", STATE, state_tensor(blocksize=0), "impossible sizes"),
        ("nf4", STATE, state_tensor(blocksize=128), "absmax' is"),
        ("nf4", K_PROJ + ".weight.absmax", torch.zeros(3), "32 values of"),
        ("nf4", K_PROJ + ".weight.absmax", torch.zeros(32, dtype=torch.uint8), "absmax' is torch.uint8"),
        ("nf4", K_PROJ + ".weight.quant_map", None, "lacks the tensor '.*quant_map'"),
        ("nf4_double", K_PROJ + ".weight.nested_quant_map", torch.zeros(16), "256 values of"),
        ("nf4_double", K_PROJ + ".weight.nested_absmax", None, "absmax' is torch.uint8"),
        ("int8", K_PROJ + ".SCB", None, "lacks the tensor '.*SCB'"),
        ("int8", K_PROJ + ".SCB", torch.zeros(31), "32 values of"),
        ("int8", K_PROJ + ".weight_format", torch.tensor(1, dtype=torch.uint8), "one GPU kernel"),
        ("int8", K_PROJ + ".weight", torch.zeros(32, 64, dtype=torch.uint8), "an int8 matrix is needed"),
    ],
)
def test_damaged_tensors(case: str, name: str, value: torch.Tensor | None, message: str, copied) -> None:
    folder = copied(case)
    edit(folder, {name: value})
    with pytest.raises(InputError, match=message):
        WeightSource(folder).dense(K_PROJ + ".weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False}, "does not say whether it is 4 or 8 bit"),
        ({"load_in_8bit": True}, "load_in_4bit is True and load_in_8bit is True"),
        ({"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type 'af4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "none of its tensors is packed"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, object], message: str, copied) -> None:
    folder = copied("nf4")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**settings, **changes})
    with pytest.raises(InputError, match=message):
        WeightSource(folder)


@pytest.mark.parametrize(("case", "suffix"), [("nf4", "weight.absmax"), ("int8", "SCB")])
def test_packed_tensors_without_settings(case: str, suffix: str, copied) -> None:
    folder = copied(case)
    change_config(folder, quantization_config=None)
    with pytest.raises(InputError, match=rf"holds {suffix} tensors \(bitsandbytes\)"):
        WeightSource(folder)


def test_another_type_than_config_json_says(copied) -> None:
    folder = copied("nf4")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**settings, "bnb_4bit_quant_type": "fp4"})
    with pytest.raises(InputError, match="config.json says that its linears are bitsandbytes fp4"):
        WeightSource(folder).dense(K_PROJ + ".weight")


@pytest.mark.parametrize("case", CASES)
def test_streaming_block_by_block_runs_the_dense_weights(case: str) -> None:
    """What `validate` does with a folder: its final states are those of the whole dequantized model."""
    source = WeightSource(GOLDEN / case)
    windows = torch.arange(40).view(2, 20) % 32
    store = final_hidden(source, Skeleton(source.spec, torch.device("cpu"), torch.float32), windows, lambda: None)
    decoder = load_model(GOLDEN / case).get_decoder()
    decoder.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = decoder(windows, use_cache=False).last_hidden_state
    assert torch.allclose(store.load(0, 2), expected, rtol=1e-4, atol=1e-5)
    store.close()
