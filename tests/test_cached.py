"""`validate --kv-cache`: one pass over a window against decoding it token by token with the real cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from qwen_quant.errors import InputError
from qwen_quant.evaluation.cached import cache_dtype
from qwen_quant.evaluation.smoke import smoke_cases
from qwen_quant.evaluation.streaming import Head, final_hidden
from qwen_quant.evaluation.validate import validate_pair
from qwen_quant.kv_cache import SCHEMES, attention_layers, held_states, make_cache
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.progress import no_progress
from qwen_quant.recipe import KV_CACHES, ValidationConfig
from qwen_quant.runtime.loading import WeightSource, load_model
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import make_checkpoint, text_file
from tests.support.moe import make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint

TOKENS = 24
CPU = torch.device("cpu")
FAMILIES = ("grouped", "heads of their own norm", "windows", "first generation", "hybrid", "experts")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("cached")
    windows = make_checkpoint(place / "windows", "qwen2")
    types = ["full_attention", "sliding_attention"]
    first = copy_checkpoint(place / "first")
    change_config(first, torch_dtype="bfloat16")
    change_config(windows, use_sliding_window=True, sliding_window=7, max_window_layers=1, layer_types=types)
    return {
        "grouped": make_checkpoint(place / "grouped", "qwen2", num_key_value_heads=1),
        "heads of their own norm": make_checkpoint(place / "qwen3", "qwen3", dtype=torch.float16),
        "windows": windows,
        "first generation": first,
        "hybrid": make_family_checkpoint(place / "hybrid", "qwen3_5_text"),
        "experts": make_family_checkpoint(place / "experts", "qwen2_moe"),
    }


def tokens() -> Tensor:
    return torch.randint(3, 250, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def streamed(folder: Path, kind: str) -> Tensor:
    """FP32 logits [rows, tokens, vocabulary] as `validate` computes them."""
    source = WeightSource(folder)
    skeleton = Skeleton(source.spec, CPU, torch.float32)
    hidden = final_hidden(source, skeleton, tokens(), lambda: None, kv_cache=kind).load(0, 2)
    return Head(source, skeleton).logits(hidden.flatten(0, 1)).unflatten(0, (2, TOKENS))


def cache_in(dtype: torch.dtype, config: Any, kind: str) -> Cache:
    """The real cache, filled in `dtype` by a model that computes in FP32."""
    cache = make_cache(config, kind)
    write = cache.update

    def update(keys: Tensor, values: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        keys, values = write(keys.to(dtype), values.to(dtype), *others, **named)
        return keys.float(), values.float()

    cache.update = update
    return cache


def decoded(folder: Path, kind: str) -> Tensor:
    """The same logits from one forward pass a token with the real cache."""
    model = load_model(folder, dtype=torch.float32)
    cache, parts = cache_in(cache_dtype(WeightSource(folder).spec), model.config, kind), []
    with torch.no_grad():
        for part in tokens().split(1, dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_decoding_token_by_token(family: str, kind: str, folders: dict[str, Path]) -> None:
    wanted, found = decoded(folders[family], kind), streamed(folders[family], kind)
    plain = streamed(folders[family], "")
    # The median: where the noise of FP32 sums moves a value over the edge between two codes, a few logits differ.
    error, effect = (float((found - other).abs().median()) for other in (wanted, plain))
    assert error < 2e-6 * float(plain.abs().max()) and effect > 50 * error, (error, effect)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_what_a_layer_gives_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    keys = torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(0)) * 5 + 2
    layer = make_cache(_config(), kind).layers[0]
    for part in keys.to(dtype).split(1, dim=2):
        back, _ = layer.update(part, part)
    assert torch.equal(held_states(keys, kind, dtype), back.float())
    assert torch.equal(held_states(keys, "bf16", dtype), keys.to(dtype).float())


def _config() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)


def test_hybrid_models_cache_their_attention_layers_only(folders: dict[str, Path]) -> None:
    config = Skeleton(WeightSource(folders["hybrid"]).spec, CPU, torch.float32).model.config
    assert attention_layers(config) == {i for i, kind in enumerate(config.layer_types) if kind == "full_attention"}
    with pytest.raises(InputError, match="no attention layers"):
        config.layer_types = ["linear_attention"] * config.num_hidden_layers
        attention_layers(config)


def test_the_dtype_of_the_cache_is_the_served_models(folders: dict[str, Path]) -> None:
    assert cache_dtype(WeightSource(folders["grouped"]).spec) == torch.bfloat16
    assert cache_dtype(WeightSource(folders["heads of their own norm"]).spec) == torch.float16


def settings(text: Path, **changes: Any) -> ValidationConfig:
    return ValidationConfig((str(text),), **{"window_tokens": 32, "smoke": False, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt", 400)


def test_the_cache_alone_and_together_with_the_weights(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = folders["grouped"]
    make_artifact(folder, tmp_path / "int4")
    found = {kind: validate_pair(folder, folder, settings(text, kv_cache=kind), no_progress) for kind in KV_CACHES}
    kl = {kind: result.texts[0].divergence.kl_mean for kind, result in found.items()}
    assert kl["bf16"] == 0 and 1e-7 < kl["int8"] < kl["qwen"]
    assert [found[kind].kv_cache for kind in KV_CACHES] == list(KV_CACHES)
    assert found["int8"].warnings == ("the smoke prompts were not run",)
    assert any("a prompt loses more" in warning for warning in found["qwen"].warnings)
    assert found["int8"].baseline_sha256 == found["int8"].quantized_sha256
    both = validate_pair(folder, tmp_path / "int4", settings(text, kv_cache="int8"), no_progress)
    weights = validate_pair(folder, tmp_path / "int4", settings(text), no_progress)
    assert weights.kv_cache == "" and both.texts[0].divergence.kl_mean != weights.texts[0].divergence.kl_mean
    assert both.texts[0].perplexity.baseline == found["int8"].texts[0].perplexity.baseline


def test_the_quantized_side_answers_smoke_prompts_with_the_cache(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_quant.evaluation import generation

    made: list[str] = []

    def noted(config: Any, kind: str) -> Cache:
        made.append(kind)
        return make_cache(config, kind)

    monkeypatch.setattr(generation, "make_cache", noted)
    source = WeightSource(folders["grouped"])
    smoke_cases(source, source, CPU, no_progress, max_new_tokens=2, kv_cache="int8")
    smoke_cases(source, source, CPU, no_progress, max_new_tokens=2)
    assert made == ["bf16", "int8", "bf16", "bf16"]


def test_bad_input(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kv_cache is 'fp8'"):
        settings(text, kv_cache="fp8")
    folder = make_checkpoint(tmp_path / "short", "qwen2", max_position_embeddings=16)
    with pytest.raises(InputError, match="longer than .* was made for"):
        validate_pair(folder, folder, settings(text, kv_cache="int8"), no_progress)


def test_another_cache_does_not_continue_a_killed_run(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder, work = folders["grouped"], tmp_path / "work"
    validate_pair(folder, folder, settings(text, kv_cache="int8"), no_progress, work=work)
    assert json.loads((work / "run.json").read_text())["settings"]["kv_cache"] == "int8"
    with pytest.raises(InputError, match="other settings"):
        validate_pair(folder, folder, settings(text, kv_cache="qwen"), no_progress, work=work)
