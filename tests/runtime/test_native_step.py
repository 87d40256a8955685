"""The compiled decoding step against transformers' forward pass of the same packed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Cache, PreTrainedModel

from qwen_quant.errors import UsageError
from qwen_quant.kv_cache import GROWTH_TOKENS, STORED, Int8Cache
from qwen_quant.profiling.cache_size import cache_size
from qwen_quant.profiling.child import Generation, held_cache
from qwen_quant.runtime.decode import decode, decoding_cache, filled_storage, preallocated_cache
from qwen_quant.runtime.native_step import NativeStep, refusal
from qwen_quant.runtime.quantized_model import load_quantized
from tests.runtime.test_kernels import needs_native
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import make_checkpoint

IDS = (torch.arange(9) * 7 % 256)[None]
pytestmark = needs_native


def artifact(tmp_path: Path, family: str = "qwen2", *, sym: bool = True, **sizes: int) -> Path:
    make_checkpoint(tmp_path / "model", family=family, **{"intermediate_size": 256, **sizes})
    make_artifact(tmp_path / "model", tmp_path / "q", sym=sym)
    return tmp_path / "q"


def steps(
    model: PreTrainedModel, tokens: list[int], caches: tuple[Cache, Cache] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens fed one by one after IDS: by the native step, by transformers (each with its own cache)."""
    capacity = IDS.shape[1] + len(tokens)
    with torch.inference_mode():
        caches = caches or (preallocated_cache(model, capacity), preallocated_cache(model, capacity))
        for cache in caches:
            model(IDS, past_key_values=cache)
        step, ours, theirs = NativeStep(model, filled_storage(caches[0])), [], []
        for position, token in enumerate(tokens, IDS.shape[1]):
            best = step(token, position)
            ours.append(step.logits.clone())
            assert best == int(ours[-1].argmax())
            out = model(
                torch.tensor([[token]]), past_key_values=caches[1], position_ids=torch.tensor([[position]])
            ).logits
            theirs.append(out[0, 0])
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, sym: bool) -> None:
    model = load_quantized(artifact(tmp_path, family, sym=sym), dtype=torch.float32)
    assert refusal(model, 1) == ""
    ours, theirs = steps(model, [3, 250, 17, 17, 99, 1, 0, 64, 128, 200, 31])
    assert float((ours - theirs).abs().max()) <= 2e-4 * float(theirs.abs().max()), float((ours - theirs).abs().max())


def test_larger_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.artifacts.GROUP_SIZE", 64)
    model = load_quantized(artifact(tmp_path), dtype=torch.float32)
    assert model.get_decoder().layers[0].self_attn.q_proj.kernel.group_size == 64
    ours, theirs = steps(model, list(range(20)))
    assert float((ours - theirs).abs().max()) <= 2e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1), (7, 1), (10, 2)])
def test_heads_that_share_keys_and_values(tmp_path: Path, heads: int, kv_heads: int, threads: int) -> None:
    """One to seven query heads a key head, over more positions than are read at a time, odd numbers of both."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    model = load_quantized(artifact(tmp_path, "qwen3", **sizes), dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = steps(model, [(31 * i + 7) % 256 for i in range(60)])
    finally:
        torch.set_num_threads(before)
    assert float((ours - theirs).abs().max()) <= 2e-4 * float(theirs.abs().max()), float((ours - theirs).abs().max())


def test_a_bf16_cache_under_fp32_activations(tmp_path: Path) -> None:
    """Keys and values in BF16, the bits that torch rounds to; half the bytes of the plain cache."""
    model = load_quantized(artifact(tmp_path, "qwen3"), dtype=torch.float32)
    tokens = [(31 * i + 7) % 256 for i in range(40)]
    capacity = IDS.shape[1] + len(tokens)
    native, plain = (decoding_cache(model, capacity, STORED) for _ in range(2))
    ours, theirs = steps(model, tokens, (native, plain))
    exact, _ = steps(model, tokens)
    assert float((ours - theirs).abs().max()) <= 2e-3 * float(theirs.abs().max())
    error, effect = (float((ours - other).abs().median()) for other in (theirs, exact))
    assert effect > 5 * error, (error, effect)
    first, again = (
        torch.cat([store.parts[0][:, :, : IDS.shape[1] + 1] for store in cache.layers[0].stores])
        for cache in (native, plain)
    )
    assert first.dtype == torch.bfloat16 and float((first.float() - again.float()).abs().max()) <= 2**-7
    assert 2 * cache_size(plain).nbytes <= cache_size(decoded_plainly(model, capacity)).nbytes * 1.1


def decoded_plainly(model: PreTrainedModel, capacity: int) -> Cache:
    cache = preallocated_cache(model, -(-capacity // GROWTH_TOKENS) * GROWTH_TOKENS)
    model(IDS, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_int8_cache_is_read_and_written_as_transformers_does(tmp_path: Path, family: str) -> None:
    """The same codes and scales, over the edge of the first storage that grows; closer than to the plain cache's."""
    model = load_quantized(artifact(tmp_path, family), dtype=torch.float32)
    tokens = [(31 * i + 7) % 256 for i in range(GROWTH_TOKENS + 3)]
    native = decoding_cache(model, IDS.shape[1] + len(tokens), "int8")
    plain = Int8Cache(model.config)
    ours, theirs = steps(model, tokens, (native, plain))
    exact, _ = steps(model, tokens)
    error, effect = (float((ours - other).abs().median()) for other in (theirs, exact))
    assert error < 2e-4 * float(theirs.abs().max()) and effect > 15 * error, (error, effect)
    end = IDS.shape[1] + len(tokens)
    for mine, other in zip(native.layers, plain.layers, strict=True):
        for store, wanted in zip(mine.stores, other.stores, strict=True):
            codes, scales = (part[:, :, :end] for part in store.parts)
            flips = (codes.int() - wanted.used[0].int()).abs()
            assert int(flips.max()) <= 1 and float(flips.float().mean()) < 0.02
            torch.testing.assert_close(scales, wanted.used[1], rtol=5e-3, atol=1e-5)


def test_the_codes_of_a_token_bit_for_bit(tmp_path: Path) -> None:
    """The first layer's new keys and values depend on no sum over the cache: all equal, a token of zeros included."""
    model = load_quantized(artifact(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 0
        for name in ("k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).bias.zero_()
    native, plain = decoding_cache(model, IDS.shape[1] + 2, "int8"), Int8Cache(model.config)
    steps(model, [5, 77], (native, plain))
    for store, wanted in zip(native.layers[0].stores, plain.layers[0].stores, strict=True):
        assert torch.equal(store.parts[0][:, :, 9:11], wanted.used[0][:, :, 9:])
        torch.testing.assert_close(store.parts[1][:, :, 9:11], wanted.used[1][:, :, 9:], rtol=1e-6, atol=0)
        assert not store.parts[0][:, :, 9].any() and not store.parts[1][:, :, 9].any()


def test_decode_and_profile_take_it_and_say_so(tmp_path: Path) -> None:
    model = load_quantized(artifact(tmp_path, "qwen3"), dtype=torch.float32)
    result = decode(model, IDS, 12)
    assert result.step == "native"
    two = decode(model, IDS.repeat(2, 1), 12)
    assert two.step == "transformers (made for one row)" and torch.equal(two.tokens[:1], result.tokens)
    generation, seen = Generation(model, IDS, "bf16", 12), []
    for _ in range(12):
        generation.step()
        seen.append(int(generation.next))
    assert seen == result.tokens[0].tolist() and generation.native is not None and generation.position == 20
    generation, seen = Generation(model, IDS, "int8", 12), []
    for _ in range(12):
        generation.step()
        seen.append(int(generation.next))
    int8 = decode(model, IDS, 12, kv_cache="int8")
    assert generation.native is not None and int8.step == "native" and int8.tokens[0].tolist() == seen
    assert "this is qwen" in decode(model, IDS, 2, kv_cache="qwen").step
    assert Generation(model, IDS, "qwen", 12).takes_native is False
    with pytest.raises(UsageError, match="fixed size"):
        decode(model, IDS, 2, compiled=True, kv_cache="int8")


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_room_that_a_cut_generation_never_used_is_no_memory(tmp_path: Path, kind: str) -> None:
    model = load_quantized(artifact(tmp_path), dtype=torch.float32)
    generation = Generation(model, IDS, kind, 3000)
    for _ in range(4):
        generation.step()
    held = held_cache(generation)
    nbytes, tokens = held.nbytes, held.capacity
    assert tokens == IDS.shape[1] + 3
    token_bytes = 2 * 2 * 2 * (32 * 2 if kind == "bf16" else 32 + 4)  # layers, keys and values, heads
    assert nbytes == tokens * token_bytes


def test_what_it_does_not_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    assert "native Int4" in refusal(load_quantized(folder, dtype=torch.float32, kernel="reference"), 1)
    assert "BF16" in refusal(load_quantized(folder, dtype=torch.bfloat16), 1)
    change_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "depends on the length" in refusal(load_quantized(folder, dtype=torch.float32), 1)
