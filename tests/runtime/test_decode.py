"""The greedy decode loop against generate, its cache, its refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qwen_quant.errors import UsageError
from qwen_quant.runtime.decode import PreallocatedLayer, decode, preallocated_cache
from qwen_quant.runtime.loading import load_model
from qwen_quant.runtime.quantized_model import load_quantized
from tests.support.artifacts import make_artifact

IDS = (torch.arange(18) * 7 % 256).view(2, 9)


@pytest.fixture(scope="module")
def artifact(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decode") / "artifact"
    make_artifact(qwen2_folder, folder)
    return folder


@pytest.mark.parametrize("load", [load_model, load_quantized])
def test_the_tokens_are_those_of_generate(artifact: Path, load: object) -> None:
    model = load(artifact, dtype=torch.float32)
    expected = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 9:]
    seen: list[int] = []
    result = decode(model, IDS, 12, on_token=seen.append)
    assert torch.equal(result.tokens, expected)
    assert seen == list(range(2, 13)) and len(result.token_seconds) == 11
    assert result.decode_seconds == pytest.approx(sum(result.token_seconds))
    assert result.tokens_per_second == pytest.approx(11 / result.decode_seconds) and result.compile_seconds == 0
    assert decode(model, IDS, 1).tokens_per_second == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_give_the_same_tokens(artifact: Path) -> None:
    model = load_quantized(artifact, dtype=torch.float32)
    result = decode(model, IDS, 8, compiled=True)
    assert torch.equal(result.tokens, decode(model, IDS, 8).tokens) and result.compile_seconds > 0


def test_the_cache_keeps_its_storage_and_grows_beyond_its_capacity() -> None:
    layer, states = PreallocatedLayer(4), torch.randn(2, 3, 11, 8)
    places = []
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5), (5, 11)):
        keys, values = layer.update(states[:, :, start:stop], -states[:, :, start:stop])
        assert torch.equal(keys, states[:, :, :stop]) and torch.equal(values, -states[:, :, :stop])
        places.append(keys.data_ptr())
    assert len(set(places[:3])) == 1 and layer.capacity == 16 and layer.get_seq_length() == 11


def test_the_cache_after_reordering_cropping_and_reset() -> None:
    layer, states = PreallocatedLayer(8), torch.randn(2, 3, 6, 8)
    layer.update(states[:, :, :4], states[:, :, :4])
    layer.batch_select_indices(torch.tensor([1, 1]))
    keys, _ = layer.update(states[:, :, 4:5], states[:, :, 4:5])
    assert torch.equal(keys, torch.cat([states[[1, 1], :, :4], states[:, :, 4:5]], 2))
    layer.crop(-2)
    keys, _ = layer.update(states[:, :, 5:], states[:, :, 5:])
    assert torch.equal(keys, torch.cat([states[[1, 1], :, :3], states[:, :, 5:]], 2))
    layer.reset()
    keys, _ = layer.update(states, states)
    assert torch.equal(keys, states)


def test_beams_with_the_preallocated_cache(artifact: Path) -> None:
    model = load_model(artifact)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    given = model.generate(IDS, past_key_values=preallocated_cache(model, 4), **options)
    assert torch.equal(given, model.generate(IDS, **options))


@pytest.mark.parametrize(("ids", "count"), [(IDS, 0), (IDS[:, :0], 2), (IDS[0], 2)])
def test_nothing_to_decode(artifact: Path, ids: torch.Tensor, count: int) -> None:
    with pytest.raises(UsageError, match="cannot decode"):
        decode(load_model(artifact), ids, count)
