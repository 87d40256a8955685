"""models/qwen1.py against what the original code gave (tests/golden/qwen1), and against itself where it must agree."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from qwen_quant.models import qwen1_config
from qwen_quant.models.qwen1 import QWenLMHeadModel
from qwen_quant.models.qwen1_config import QWenConfig
from qwen_quant.models.qwen1_rope import inverse_frequencies, logn_scale, ntk_alpha
from tests.support.qwen1 import FIRST_RELEASE, GOLDEN, copy_checkpoint, use_first_release_keys

TOLERANCE = 2e-5  # the golden README's; FP32 noise of the original is up to 5.5e-6
COLUMNS = 8  # the copied logits are those of every 8th token
PADDED = ("leftpad", "rightpad", "leftpad_long")
PLAIN = {
    **{name: (name, "tiny7b", {}) for name in ("short", "batch", "len32", "batch_long", *PADDED)},
    **{f"tiny72b.{name}": (f"tiny72b.{name}", "tiny72b", {}) for name in ("short", "long")},
    **{
        f"{length}.ntk{ntk}.logn{logn}": (length, "tiny7b", {"use_dynamic_ntk": bool(ntk), "use_logn_attn": bool(logn)})
        for length, flags in (("len33", "00 11"), ("len64", "00 11"), ("len70", "00 01 10 11"))
        for ntk, logn in [map(int, pair) for pair in flags.split()]
    },
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "logits.safetensors")


def load(name: str = "tiny7b", **changes: Any) -> QWenLMHeadModel:
    """A golden checkpoint in eval mode, with config values changed."""
    config = AutoConfig.from_pretrained(GOLDEN / name, **changes)
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    return load()


def prompt(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, longest] of prompts [tokens]."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.zeros(longest - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


@torch.no_grad()
def stepwise(model: QWenLMHeadModel, ids: Tensor, chunks: list[int], **first: Any) -> Tensor:
    """Logits of `ids` fed in chunks of these sizes through one cache."""
    cache, parts = DynamicCache(), []
    for k, part in enumerate(ids.split(chunks, dim=1)):
        parts.append(model(part, past_key_values=cache, use_cache=True, **(first if k == 0 else {})).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("case", sorted(PLAIN))
def test_golden_logits(case: str, golden: dict[str, Tensor]) -> None:
    inputs, checkpoint, flags = PLAIN[case]
    mask = golden.get(f"{inputs}.attention_mask")
    with torch.no_grad():
        logits = load(checkpoint, **flags)(golden[f"{inputs}.input_ids"], attention_mask=mask).logits
    assert bool(torch.isfinite(logits).all())
    difference = (logits[..., ::COLUMNS] - golden[f"{case}.logits"]).abs()
    assert float(difference[slice(None) if mask is None else mask == 1].max()) < TOLERANCE


@pytest.mark.parametrize(("case", "prefill"), [("decode_cross", 24), ("decode_after", 40)])
def test_golden_decoding(case: str, prefill: int, model: QWenLMHeadModel, golden: dict[str, Tensor]) -> None:
    """The prefill's alpha stays, also when decoding crosses the trained length."""
    ids = golden[f"{case}.input_ids"]
    logits = stepwise(model, ids, [prefill] + [1] * (ids.shape[1] - prefill))
    assert float((logits[..., ::COLUMNS] - golden[f"{case}.logits"]).abs().max()) < TOLERANCE


@torch.no_grad()
def test_golden_loss_and_training_mode(golden: dict[str, Tensor]) -> None:
    model = load()
    loss = model(golden["loss.input_ids"], labels=golden["loss.labels"]).loss
    assert float((loss - golden["loss.loss"]).abs()) < TOLERANCE
    logits = model.train()(golden["trainmode_long.input_ids"]).logits
    assert float((logits[..., ::COLUMNS] - golden["trainmode_long.logits"]).abs().max()) < TOLERANCE


def test_golden_hidden_states_and_cache(model: QWenLMHeadModel, golden: dict[str, Tensor]) -> None:
    """The original's cache is [rows, tokens, heads, channels], ours transformers' [rows, heads, tokens, channels]."""
    with torch.no_grad():
        output = model(golden["short.input_ids"], output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == 3
    for k, hidden in enumerate(output.hidden_states):
        assert float((hidden - golden[f"short.hidden_{k}"]).abs().max()) < TOLERANCE
    for k, layer in enumerate(output.past_key_values.layers):
        for name, states in (("key", layer.keys), ("value", layer.values)):
            wanted = golden[f"short.past_{k}_{name}"].transpose(1, 2)
            assert float((states - wanted).abs().max()) < TOLERANCE


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}])
def test_golden_greedy_generation(settings: dict[str, Any], model: QWenLMHeadModel, golden: dict[str, Tensor]) -> None:
    out = model.generate(golden["greedy.input_ids"], do_sample=False, max_new_tokens=24, pad_token_id=0, **settings)
    assert out.tolist() == golden["greedy.output_ids"].tolist()


def test_golden_tables() -> None:
    tables = json.loads((GOLDEN / "longctx_tables.json").read_text())
    assert all(ntk_alpha(length, trained) == alpha for trained, length, alpha in tables["ntk_alpha"])
    for trained, position, factor in tables["logn"]:
        assert float(logn_scale(torch.tensor([position + 1]), trained)) == pytest.approx(factor, abs=3e-7)
    for row in tables["inv_freq"]:
        ours = inverse_frequencies(row["dim"], row["base"], row["alpha"])
        assert torch.allclose(ours, torch.tensor(row["inv_freq"]), rtol=1e-6, atol=0)


def test_left_padded_rows_get_what_they_get_alone(model: QWenLMHeadModel) -> None:
    """Rows on both sides of S = 32 in one batch, through generate: same logits at every step as without padding."""
    rows = [prompt(1, tokens, tokens).clamp(min=1)[0] for tokens in (70, 40, 12)]  # 0 is the padding
    ids, mask = left_padded(rows)
    settings = {
        "do_sample": False,
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    batched = model.generate(ids, attention_mask=mask, **settings)
    for k, row in enumerate(rows):
        alone = model.generate(row[None], **settings)
        assert batched.sequences[k, -6:].tolist() == alone.sequences[0, -6:].tolist()
        for step, logits in enumerate(alone.logits):
            assert float((batched.logits[step][k] - logits[0]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}])
def test_beams_of_padded_rows(settings: dict[str, Any], model: QWenLMHeadModel) -> None:
    """Reordering a cache between beams leaves every row its own NTK factor."""
    rows = [prompt(1, tokens, tokens).clamp(min=1)[0] for tokens in (70, 36, 9)]  # 0 is the padding
    ids, mask = left_padded(rows)
    settings = {**settings, "num_beams": 3, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    batched = model.generate(ids, attention_mask=mask, **settings)
    for k, row in enumerate(rows):
        assert batched[k, 70:].tolist() == model.generate(row[None], **settings)[0, len(row) :].tolist()


def test_chunked_prefill_is_the_whole_prefill(model: QWenLMHeadModel) -> None:
    short, long = prompt(2, 30), prompt(2, 75)
    with torch.no_grad():
        assert float((stepwise(model, short, [11, 1, 18]) - model(short).logits).abs().max()) < TOLERANCE
        whole = model(long).logits
        chunked = stepwise(model, long, [20, 30, 25], ntk_alpha=ntk_alpha(75, 32))
        assert float((chunked - whole).abs().max()) < TOLERANCE
        assert float((stepwise(model, long, [20, 30, 25]) - whole).abs().max()) > 100 * TOLERANCE


def test_generation_in_chunks_past_the_trained_length(model: QWenLMHeadModel) -> None:
    ids, mask = left_padded([prompt(1, 70).clamp(min=1)[0], prompt(1, 37)[0]])
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, **settings)
    chunked = model.generate(ids, prefill_chunk_size=16, **settings)
    assert chunked.sequences.tolist() == whole.sequences.tolist()
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(chunked.logits, whole.logits, strict=True))


def test_requests_do_not_disturb_each_other(model: QWenLMHeadModel) -> None:
    """Requests of different alphas through one model, in turns and in threads, decode as they do alone."""
    ids = {tokens: prompt(1, tokens + 10, tokens) for tokens in (12, 40, 70, 140)}
    alone = {tokens: stepwise(model, row, [tokens] + [1] * 10) for tokens, row in ids.items()}
    caches, turns = {tokens: DynamicCache() for tokens in ids}, {tokens: [] for tokens in ids}
    with torch.no_grad():
        for step in range(11):
            for tokens, row in ids.items():
                part = row[:, :tokens] if step == 0 else row[:, tokens + step - 1 : tokens + step]
                turns[tokens].append(model(part, past_key_values=caches[tokens], use_cache=True).logits)
    assert all(torch.equal(torch.cat(turns[tokens], 1), alone[tokens]) for tokens in ids)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda item: stepwise(model, item[1], [item[0]] + [1] * 10), list(ids.items()) * 2)
    assert all(torch.equal(result, alone[tokens]) for result, tokens in zip(results, [*ids, *ids], strict=True))


def test_a_copied_cache_keeps_its_alpha(model: QWenLMHeadModel) -> None:
    ids, cache = prompt(1, 72), DynamicCache()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache, use_cache=True)
        branch = copy.deepcopy(cache)
        first = model(ids[:, 40:], past_key_values=cache, use_cache=True).logits
        assert torch.equal(model(ids[:, 40:], past_key_values=branch, use_cache=True).logits, first)
        assert cache.ntk_alphas == (3.0,)


def test_caches_that_do_not_belong(model: QWenLMHeadModel) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(1, 40), past_key_values=cache, use_cache=True)
    del cache.ntk_alphas
    with pytest.raises(ValueError, match="give ntk_alpha"):
        model(prompt(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="2 NTK factors for 3 rows"):
        model(prompt(3, 40), ntk_alpha=[1, 3])
    with pytest.raises(ValueError, match="at least 1"):
        model(prompt(1, 4), ntk_alpha=0.5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_gradients_reach_every_parameter() -> None:
    model = load().train()
    ids = prompt(2, 40)
    model(ids, labels=ids).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in plain.values())
    checkpointed = load().train()
    checkpointed.activation_checkpointing_enable()
    checkpointed(ids, labels=ids).loss.backward()
    assert all(torch.allclose(p.grad, plain[n], atol=1e-6) for n, p in checkpointed.named_parameters())


def test_fine_tuning_lowers_the_loss() -> None:
    model, ids = load().train(), prompt(2, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_gradients_reach_embeddings_in_eval_mode(model: QWenLMHeadModel) -> None:
    """Past the trained length too: NTK and LogN do not cut the graph."""
    embeds = model.get_input_embeddings()(prompt(1, 50)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert bool((embeds.grad.abs().amax(-1) > 0).all())


@pytest.mark.parametrize("tokens", [20, 70])
def test_attention_implementations_agree(tokens: int, model: QWenLMHeadModel) -> None:
    eager = load(attn_implementation="eager")
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        output = eager(prompt(2, tokens), output_attentions=True)
        assert float((output.logits - model(prompt(2, tokens)).logits).abs().max()) < TOLERANCE
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 4, tokens, tokens)


def windowed_reference(model: QWenLMHeadModel, ids: Tensor, windows: list[int]) -> Tensor:
    """Logits with each layer's window written out as a mask over the full score matrix, below the trained length."""
    decoder, tokens = model.transformer, ids.shape[1]
    hidden, slots = decoder.wte(ids), torch.arange(tokens)
    tables = decoder.rotary_emb(slots[None], (1.0,))
    for block, window in zip(decoder.h, windows, strict=True):
        seen = (slots[:, None] >= slots) & (slots[:, None] - slots < window)
        mask = torch.zeros(tokens, tokens).masked_fill(~seen, float("-inf"))[None, None]
        hidden = block(hidden, position_embeddings=tables, attention_mask=mask)
    return model.lm_head(decoder.ln_f(hidden))


@torch.no_grad()
def test_a_window_per_layer(model: QWenLMHeadModel) -> None:
    ids = prompt(2, 30)
    windowed = load(attention_windows=[5, 12])
    assert float((windowed(ids).logits - windowed_reference(model, ids, [5, 12])).abs().max()) < TOLERANCE
    assert float((stepwise(windowed, ids, [9, 1, 20]) - windowed(ids).logits).abs().max()) < TOLERANCE
    assert float((windowed(ids).logits - model(ids).logits).abs().max()) > 100 * TOLERANCE
    assert float((load(attention_windows=[30, None])(ids).logits - model(ids).logits).abs().max()) < TOLERANCE
    with pytest.raises(ValueError, match="attention_mask"):
        windowed(ids, attention_mask=torch.ones(2, 1, 30, 30, dtype=torch.bool))


@torch.no_grad()
def test_windows_bound_ntk_and_logn(model: QWenLMHeadModel) -> None:
    """A layer whose window is within S = 32 needs neither, however long the text is; one beyond it needs its own."""
    ids, plain = prompt(1, 150), {"use_dynamic_ntk": False, "use_logn_attn": False}
    within = load(attention_windows=[32, 20])(ids).logits
    assert float((within - load(attention_windows=[32, 20], **plain)(ids).logits).abs().max()) < TOLERANCE
    tables = model.transformer.rotary_emb(torch.arange(150)[None], (15.0,), 64, logn=True)
    wanted = model.transformer.rotary_emb(torch.arange(150)[None], (3.0,), logn=True)
    assert torch.equal(tables.cos, wanted.cos)
    assert torch.equal(tables.query_scale[:, :64], wanted.query_scale[:, :64])
    assert float(tables.query_scale.max()) == pytest.approx(1.2)


def test_partial_rotation_and_biases() -> None:
    """rotary_pct and no_bias as the original reads them."""
    config = QWenConfig.from_pretrained(GOLDEN / "tiny7b", rotary_pct=0.5, no_bias=False)
    torch.manual_seed(0)
    model = QWenLMHeadModel(config).eval()
    assert {name for name in model.state_dict() if name.endswith("bias") and ".0." in name} == {
        f"transformer.h.0.{name}.bias" for name in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    }
    with torch.no_grad():
        output = model(prompt(1, 20), use_cache=True)
    keys = output.past_key_values.layers[0].keys
    block, hidden = model.transformer.h[0], model.transformer.wte(prompt(1, 20))
    plain = block.attn.c_attn(block.ln_1(hidden))[..., 64:128].view(1, 20, 4, 16).transpose(1, 2)
    assert torch.allclose(keys[..., 8:], plain[..., 8:], atol=1e-6)
    assert not torch.allclose(keys[..., :8], plain[..., :8], atol=1e-3)


def test_half_precision_follows_full_precision(model: QWenLMHeadModel) -> None:
    half = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny7b", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        wanted, ours = model(prompt(1, 70)).logits, half(prompt(1, 70)).logits
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - wanted).norm() / wanted.norm()) < 0.05


def test_saved_and_loaded_again(model: QWenLMHeadModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(GOLDEN / "tiny7b" / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(prompt(1, 40)).logits, model(prompt(1, 40)).logits)


def test_first_release_keys(model: QWenLMHeadModel, tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "old")
    use_first_release_keys(folder)
    assert not {"hidden_size", "intermediate_size"} & set(json.loads((folder / "config.json").read_text()))
    old = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(old(prompt(1, 40)).logits, model(prompt(1, 40)).logits)
    assert old.config.vocab_size == 512 and old.config.intermediate_size == 320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 128}, "n_embd is 128 but hidden_size is 64"),
        ({"kv_channels": 32}, "is not hidden_size 64"),
        ({"intermediate_size": 321}, "must be even"),
        ({"rotary_pct": 0.1}, "must be even"),
        ({"activation": "gelu"}, "only 'swiglu' was ever released"),
        ({"attention_windows": [4]}, "for each of 2 layers"),
        ({"attention_windows": [4, 0]}, "for each of 2 layers"),
        ({"seq_length": 1}, "seq_length is 1"),
    ],
)
def test_configs_no_model_can_have(changes: dict[str, Any], message: str) -> None:
    values = {**json.loads((GOLDEN / "tiny7b" / "config.json").read_text()), **changes}
    with pytest.raises(ValueError, match=message):
        QWenConfig.from_dict(values)


def test_what_a_config_is_told_about(caplog: pytest.LogCaptureFixture) -> None:
    """auto_map once a process, unknown keys by name; the published keys and the quantized cache in silence."""
    values = json.loads((GOLDEN / "tiny7b" / "config.json").read_text())
    qwen1_config.say_auto_map_is_ignored.cache_clear()
    qwen1_config._say_unknown.cache_clear()
    with caplog.at_level(logging.WARNING):
        QWenConfig.from_dict({**values, **FIRST_RELEASE})
        assert not caplog.messages
        for _ in range(2):
            assert not hasattr(QWenConfig.from_dict({**values, "auto_map": {"AutoConfig": "x.Y"}}), "auto_map")
        QWenConfig.from_dict({**values, "rope_twist": 3})
        QWenConfig.from_dict({**values, "use_cache_quantization": True})
    said = [record.getMessage() for record in caplog.records]
    words = ("auto_map", "rope_twist", "cache_quantization")
    assert [sum(word in line for line in said) for word in words] == [1, 1, 0]


def test_importing_the_package_is_enough(golden: dict[str, Tensor], tmp_path: Path) -> None:
    """A program that imports qwen_quant, then transformers: no repository code runs and nobody is asked."""
    folder = copy_checkpoint(tmp_path / "original", auto_map=True)
    code = (
        "import qwen_quant, sys\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "for trust in (False, None, True):\n"
        "    config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "print(type(config).__module__, type(model).__module__)\n"
        "print(model.generate(**{'input_ids': model.dummy_inputs['input_ids']}, max_new_tokens=2).shape[1] > 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, input="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["qwen_quant.models.qwen1_config", "qwen_quant.models.qwen1", "True"]
    assert done.stderr.count("auto_map") == 1 and "that no first-generation" not in done.stderr
