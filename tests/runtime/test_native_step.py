"""The compiled decoding step against transformers' forward pass of the same packed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qwen_quant.profiling.child import Generation
from qwen_quant.runtime.decode import decode, filled_storage, preallocated_cache
from qwen_quant.runtime.native_step import NativeStep, refusal
from qwen_quant.runtime.quantized_model import load_quantized
from tests.runtime.test_kernels import needs_native
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import make_checkpoint

IDS = (torch.arange(9) * 7 % 256)[None]
pytestmark = needs_native


def artifact(tmp_path: Path, family: str = "qwen2", *, sym: bool = True) -> Path:
    make_checkpoint(tmp_path / "model", family=family, intermediate_size=256)
    make_artifact(tmp_path / "model", tmp_path / "q", sym=sym)
    return tmp_path / "q"


def steps(model: PreTrainedModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens fed one by one after IDS: by the native step, by transformers."""
    capacity = IDS.shape[1] + len(tokens)
    with torch.inference_mode():
        caches = [preallocated_cache(model, capacity) for _ in range(2)]
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
    assert Generation(model, IDS, "int8", 12).takes_native is False


def test_what_it_does_not_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    assert "native Int4" in refusal(load_quantized(folder, dtype=torch.float32, kernel="reference"), 1)
    assert "BF16" in refusal(load_quantized(folder, dtype=torch.bfloat16), 1)
    change_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "depends on the length" in refusal(load_quantized(folder, dtype=torch.float32), 1)
