"""kv_cache.py: the original scheme bit for bit, ours closer to the plain cache, the surface of transformers' own."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qwen_quant.errors import InputError
from qwen_quant.kv_cache import (
    GROWTH_TOKENS,
    Int8Cache,
    Int8IndexedLayer,
    Int8Layer,
    dequantize_cache_torch,
    dequantize_per_token,
    make_cache,
    quantize_cache_v,
    quantize_per_token,
)
from qwen_quant.models.qwen1 import QWenLMHeadModel
from qwen_quant.profiling.cache_size import cache_size
from qwen_quant.runtime.quantized_model import load_quantized
from tests.support.artifacts import make_artifact
from tests.support.checkpoints import random_model
from tests.support.moe import make_family_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "qwen1"
COLUMNS = 8  # every eighth column of the golden logits is kept
LOGIT_TOLERANCE = 5e-2  # the golden README's: a truncated code may flip by one
FAMILIES = ("qwen", "qwen2", "qwen3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "kvquant.safetensors")


def load_qwen1(**changes: Any) -> QWenLMHeadModel:
    config = AutoConfig.from_pretrained(GOLDEN / "tiny7b", **changes)
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny7b", config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def original() -> QWenLMHeadModel:
    """The golden checkpoint with the original's cache switched on in its config."""
    return load_qwen1(use_cache_quantization=True)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {"qwen": load_qwen1(), **{family: random_model(family, tied=True) for family in ("qwen2", "qwen3")}}


def states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, one channel much larger and shifted, as keys are."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[..., 3] = 6 * values[..., 3] + 9
    return values.to(dtype)


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# The original scheme.


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["prefill", "step", "wide", "offset"])
def test_the_original_quantizer_bit_for_bit(dtype: str, name: str, golden: dict[str, Tensor]) -> None:
    case = {part: golden[f"pairs.{dtype}.{name}.{part}"] for part in ("x", "q", "scale", "zero", "deq")}
    codes, scale, zero = quantize_cache_v(case["x"])
    for ours, theirs in ((codes, "q"), (scale, "scale"), (zero, "zero")):
        assert ours.dtype == case[theirs].dtype and torch.equal(ours, case[theirs])
    assert torch.equal(dequantize_cache_torch(codes, scale, zero), case["deq"])


@pytest.mark.parametrize("case", ["q_prefill", "q_long", "q_mask"])
def test_the_original_model_with_its_cache(case: str, original: QWenLMHeadModel, golden: dict[str, Tensor]) -> None:
    mask = golden.get(f"{case}.attention_mask")
    with torch.no_grad():
        logits = original(golden[f"{case}.input_ids"], attention_mask=mask).logits
    difference = (logits[..., ::COLUMNS] - golden[f"{case}.logits"]).abs()
    assert float(difference[slice(None) if mask is None else mask == 1].max()) < LOGIT_TOLERANCE


def test_the_original_model_decoding_with_its_cache(original: QWenLMHeadModel, golden: dict[str, Tensor]) -> None:
    tokens, cache, parts = golden["q_decode.input_ids"], None, []
    with torch.no_grad():
        for part in tokens.split([26] + [1] * 16, dim=1):
            output = original(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert isinstance(cache, Int8Cache) and cache.scheme == "qwen"
    logits = torch.cat(parts, 1)[..., ::COLUMNS]
    wanted, plain = golden["q_decode.logits"], golden["q_decode.logits_noquant"]
    assert float((logits - wanted).abs().max()) < LOGIT_TOLERANCE
    assert float((plain - wanted).abs().max()) > 3 * LOGIT_TOLERANCE, "the plain cache would pass as well"
    for half, kind in zip(cache.layer_past(0), ("key", "value"), strict=True):
        codes, scale, zero = (golden[f"q_decode.past_0_{kind}_{part}"] for part in ("q", "scale", "zero"))
        flips = (half[0].int() - codes.int()).abs()
        assert int(flips.max()) <= 1 and float(flips.float().mean()) < 0.02
        torch.testing.assert_close(half[1], scale, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half[2], zero, rtol=1e-4, atol=1e-3)


def test_generate_takes_the_cache_that_the_config_asks_for(original: QWenLMHeadModel) -> None:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    made = original.generate(ids(2, 9), pad_token_id=0, **settings)
    assert isinstance(made.past_key_values, Int8Cache)
    given = original.generate(ids(2, 9), pad_token_id=0, past_key_values=DynamicCache(), **settings)
    assert type(given.past_key_values) is DynamicCache
    assert original(ids(1, 5), use_cache=False).past_key_values is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-7, 1000.0])
def test_constant_chunks_come_back_in_both_schemes(dtype: torch.dtype, value: float) -> None:
    chunk = torch.full((2, 2, 3, 8), value, dtype=dtype)
    codes, scale, zero = quantize_cache_v(chunk)
    assert torch.equal(dequantize_cache_torch(codes, scale, zero), chunk)
    ours = dequantize_per_token(*quantize_per_token(chunk), dtype)
    torch.testing.assert_close(ours, chunk, rtol=2**-7, atol=1e-7)


def test_a_range_too_small_for_the_dtype_is_no_infinity() -> None:
    chunk = torch.full((1, 1, 1, 8), 1000.0, dtype=torch.float16)
    chunk[..., 0] = 1000.5
    back = dequantize_cache_torch(*quantize_cache_v(chunk))
    assert bool(torch.isfinite(back).all()) and float((back - chunk).abs().max()) <= 0.5


# Our scheme.


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_within_half_a_step(dtype: torch.dtype) -> None:
    values = states(2, 3, 40, 32, dtype=dtype)
    codes, scale = quantize_per_token(values)
    assert codes.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (2, 3, 40, 1)
    exact = codes.double() * scale.double()
    assert bool(((exact - values.double()).abs() <= scale.double() * 0.500001).all())
    assert float((exact.abs().amax(-1) / values.double().abs().amax(-1)).min()) > 0.995
    stored = dequantize_per_token(codes, scale, dtype).double()
    assert float((stored - exact).abs().max()) <= float(exact.abs().max()) * torch.finfo(dtype).eps


def test_every_decade_of_values_keeps_its_relative_error() -> None:
    """From the smallest F16 numbers to its largest ones: the stored scale never cuts the largest value."""
    for exponent in range(-7, 4):
        values = (states(1, 2, 20, 16, seed=exponent + 7) * 10.0**exponent / 3).to(torch.float16)
        back = dequantize_per_token(*quantize_per_token(values), torch.float16)
        step = values.abs().amax(-1, keepdim=True).float() / 127
        bound = 0.52 * step + 2**-10 * values.float().abs() + 4e-6
        assert bool(((back.float() - values.float()).abs() <= bound).all()), exponent


def test_ours_is_closer_than_the_original_scheme() -> None:
    values = states(2, 4, 300, 64)
    ours = dequantize_per_token(*quantize_per_token(values), values.dtype)
    theirs = dequantize_cache_torch(*quantize_cache_v(values))
    assert float((ours - values).square().mean()) < 0.5 * float((theirs - values).square().mean())


def test_a_token_does_not_depend_on_its_chunk() -> None:
    values = states(1, 2, 2 * GROWTH_TOKENS + 5, 16)
    whole, parts = Int8Layer(), Int8Layer()
    whole.update(values, values)
    for part in values.split(37, dim=2):
        parts.update(part, part)
    assert torch.equal(whole.dequantized()[0], parts.dequantized()[0])


# The surface of transformers' cache.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "qwen"])
def test_logits_stay_close_and_padding_changes_nothing(
    family: str, scheme: str, models: dict[str, PreTrainedModel]
) -> None:
    model, prompt = models[family], ids(2, 12)
    with torch.no_grad():
        plain = model(prompt, past_key_values=make_cache(model.config, "bf16")).logits
        alone = model(prompt, past_key_values=Int8Cache(model.config, scheme)).logits
        padded = torch.cat((torch.full((2, 5), 7), prompt), 1)
        mask = (torch.arange(17) >= 5).long().repeat(2, 1)
        positions = (torch.arange(17) - 5).clamp(min=0).repeat(2, 1)
        beside = model(
            padded, attention_mask=mask, position_ids=positions, past_key_values=Int8Cache(model.config, scheme)
        ).logits[:, 5:]
    assert 0 < float((alone - plain).abs().max()) < 0.05 * float(plain.abs().max()) * (8 if scheme == "qwen" else 1)
    if scheme == "int8":  # the original's range spans the padding too
        torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "sampling", "chunks"],
)
def test_generate(family: str, settings: dict[str, Any], models: dict[str, PreTrainedModel]) -> None:
    """A batch with left padding: greedy and beams say with Int8 codes what they say without."""
    model = models[family]
    prompt = ids(2, 9, seed=3)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    common: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **settings}
    common.setdefault("do_sample", False)
    out = model.generate(prompt, attention_mask=mask, past_key_values=Int8Cache(model.config), **common)
    rows = 2 * settings.get("num_return_sequences", 1)
    assert out.shape == (rows, 17)
    if not common["do_sample"]:
        plain = model.generate(prompt, attention_mask=mask, **common)
        assert float((out == plain).float().mean()) > 0.8


def test_packed_weights_and_packed_cache_together(qwen2_folder: Path, tmp_path: Path) -> None:
    make_artifact(qwen2_folder, tmp_path / "int4")
    model, prompt = load_quantized(tmp_path / "int4", dtype=torch.float32), ids(2, 9)
    with torch.no_grad():
        plain = model(prompt).logits
        ours = model(prompt, past_key_values=Int8Cache(model.config)).logits
    assert 0 < float((ours - plain).abs().max()) < 0.05 * float(plain.abs().max())


def test_beam_search_reorders_the_codes(models: dict[str, PreTrainedModel]) -> None:
    """A cache whose rows are reordered goes on as if its rows had been computed in that order."""
    model, prompt = models["qwen2"], ids(3, 10)
    order = torch.tensor([2, 0, 0])
    cache, wanted = Int8Cache(model.config), Int8Cache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(prompt[order], past_key_values=wanted)
        cache.reorder_cache(order)
        step = ids(3, 1, seed=9)
        one, two = (model(step, past_key_values=c).logits for c in (cache, wanted))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_cropping_repeating_and_selecting(models: dict[str, PreTrainedModel]) -> None:
    model, prompt = models["qwen3"], ids(2, 12)
    cache, short = Int8Cache(model.config), Int8Cache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(prompt[:, :7], past_key_values=short)
        cache.crop(-5)
        assert cache.get_seq_length() == 7 and cache.get_mask_sizes(3, 0) == (10, 0)
        for c in (cache, short):
            c.batch_repeat_interleave(2)
            c.batch_select_indices(torch.tensor([0, 3]))
        step = ids(2, 1, seed=9)
        one, two = (model(step, past_key_values=c).logits for c in (cache, short))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_size(cache).nbytes == 0


def test_assisted_decoding_crops_what_was_refused(models: dict[str, PreTrainedModel]) -> None:
    model, prompt = models["qwen2"], ids(1, 9, seed=4)
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(prompt, past_key_values=Int8Cache(model.config), **settings)
    helped = model.generate(
        prompt, past_key_values=Int8Cache(model.config), assistant_model=random_model("qwen2", tied=True, seed=5),
        **settings,
    )  # fmt: skip
    assert helped.tolist() == alone.tolist()


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.52), ("qwen", 0.54)])
def test_memory_is_half_of_the_16_bit_cache(scheme: str, limit: float) -> None:
    """Real bytes of the tensors at 8192 tokens of 64 channels; nothing dequantized stays with the layer."""
    config = random_model("qwen2", tied=True).config
    cache, plain = Int8Cache(config, scheme), DynamicCache(config=config)
    for values in states(1, 2, 8192, 64, dtype=torch.bfloat16).split([8000, 1, 191], dim=2):
        for layer in range(2):
            cache.update(values, values, layer)
            plain.update(values, values, layer)
    assert cache_size(plain).nbytes == 2 * 2 * 2 * 8192 * 64 * 2
    assert cache_size(cache).nbytes <= limit * cache_size(plain).nbytes
    kept = [part for layer in cache.layers for store in layer.stores for part in store.parts]
    assert all(part.dtype in (torch.int8, torch.uint8) or part.shape[-1] == 1 for part in kept)
    assert cache.layers[0].keys is None and cache.layers[0].values is None


def test_storage_grows_in_steps() -> None:
    layer, pointers = Int8Layer(), set()
    for _ in range(2 * GROWTH_TOKENS):
        layer.update(states(1, 1, 1, 8), states(1, 1, 1, 8))
        pointers.add(layer.stores[0].parts[0].data_ptr())
    assert layer.get_seq_length() == 2 * GROWTH_TOKENS and len(pointers) == 2


def test_layers_without_keys_keep_their_own_cache() -> None:
    from transformers.cache_utils import LinearAttentionLayer

    config = copy.deepcopy(random_model("qwen2", tied=True).config)
    config.layer_types = ["linear_attention", "full_attention"]
    cache = Int8Cache(config)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer, Int8Layer]
    config.layer_types = ["linear_attention", "linear_attention"]
    with pytest.raises(InputError, match="no attention layers"):
        Int8Cache(config)


def test_sparse_attention_keeps_its_indexer(tmp_path: Path) -> None:
    """qwen4_exp: codes for keys and values, the indexer's keys as they are, through beams, cropping and repeating."""
    folder = make_family_checkpoint(tmp_path / "m", "qwen4_exp_text", dtype=torch.float32)
    model, prompt = AutoModelForCausalLM.from_pretrained(folder).eval(), ids(2, 24)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    cache, plain = Int8Cache(model.config), DynamicCache(config=model.config)
    out = model.generate(prompt, past_key_values=cache, pad_token_id=0, **settings)
    wanted = model.generate(prompt, past_key_values=plain, pad_token_id=0, **settings)
    assert float((out == wanted).float().mean()) > 0.8
    ours, theirs = cache.layers[3], plain.layers[3]
    assert type(ours) is Int8IndexedLayer and torch.equal(ours.indexer_keys, theirs.indexer_keys)
    for change in (
        lambda c: c.crop(-2),
        lambda c: c.reorder_cache(torch.tensor([1, 0, 3, 3])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0, 5, 6])),
        lambda c: (c.offload(), c.prefetch()),
    ):
        change(ours), change(theirs)
        for name in ("indexer_keys", "indexer_position_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.dequantized()[0], theirs.keys, rtol=0.1, atol=0.1)
    size = cache_size(cache)
    assert size.nbytes - size.fixed_bytes == ours.nbytes + ours.indexer_keys.untyped_storage().nbytes()
    ours.reset()
    assert ours.indexer_keys is None and ours.get_seq_length() == 0


def test_sliding_windows_are_the_masks_work() -> None:
    """A model with a sliding window: Int8 codes of all tokens and the window's mask give what the plain cache gives."""
    model = random_model("qwen2", tied=True, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    config = model.config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    wide, prompt = Int8Cache(config), ids(1, 20)
    with torch.no_grad():
        plain_cache = DynamicCache(config=config)
        plain = [model(part, past_key_values=plain_cache).logits for part in prompt.split([15, 1, 1, 1, 1, 1], 1)]
        ours = [model(part, past_key_values=wide).logits for part in prompt.split([15, 1, 1, 1, 1, 1], 1)]
    difference = (torch.cat(ours, 1) - torch.cat(plain, 1)).abs().max()
    assert 0 < float(difference) < 0.05 * float(torch.cat(plain, 1).abs().max())


def test_bad_input() -> None:
    config = random_model("qwen2", tied=True).config
    for make in (lambda: Int8Cache(config, "int7"), lambda: make_cache(config, "fp8")):
        with pytest.raises(InputError, match="unknown cache"):
            make()
    with pytest.raises(InputError, match=r"float64"):
        Int8Layer().update(torch.zeros(1, 1, 1, 4).double(), torch.zeros(1, 1, 1, 4).double())
    with pytest.raises(InputError, match="no layer_past"):
        Int8Cache(config).layer_past(0)


def test_more_tokens_than_positions_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("qwen2", tied=True, max_position_embeddings=10)
    cache, plain = Int8Cache(model.config), DynamicCache(config=model.config)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        model(ids(1, 10), past_key_values=cache)
        assert not caplog.records
        for seed in (1, 2):
            model(ids(1, 1, seed), past_key_values=cache)
        model(ids(1, 12), past_key_values=plain)
    assert [record.getMessage() for record in caplog.records if record.name == "qwen_quant.kv_cache"] == [
        "the cache holds 11 tokens, the model has 10 positions"
    ]
    assert cache.get_seq_length() == plain.get_seq_length() == 12
