"""Experts: which tokens calibrate them, and their separate form against transformers' fused one."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qwen_quant.activations import ActivationStore
from qwen_quant.checkpoint.reader import TensorInfo
from qwen_quant.checkpoint.reader import separate_experts as separate_infos
from qwen_quant.experts import choose_tokens, minimum_tokens
from qwen_quant.models.experts import ExpertList, separate_experts
from qwen_quant.recipe import GPTQConfig

ROUTED = torch.tensor([3, 10, 11, 40])


@pytest.mark.parametrize("policy", ["route-all", "pool", "round"])
def test_enough_tokens_are_left_alone(policy: str) -> None:
    chosen = choose_tokens(ROUTED, 100, 4, policy)
    assert torch.equal(chosen.tokens, ROUTED) and (chosen.routed, chosen.how) == (4, "routed")


def test_route_all_takes_every_token() -> None:
    chosen = choose_tokens(ROUTED, 100, 5, "route-all")
    assert chosen.tokens.tolist() == list(range(100)) and (chosen.routed, chosen.how) == (4, "route-all")


def test_pool_adds_other_tokens_up_to_the_minimum() -> None:
    chosen = choose_tokens(ROUTED, 100, 20, "pool")
    tokens = chosen.tokens.tolist()
    assert len(tokens) == len(set(tokens)) == 20 and set(ROUTED.tolist()) <= set(tokens) and tokens == sorted(tokens)
    assert max(tokens) > 80 and min(tokens) < 10, "evenly spaced"
    assert choose_tokens(ROUTED, 10**4, 10**5, "pool").tokens.tolist() == list(range(10**4))


def test_round_keeps_what_there_is() -> None:
    assert torch.equal(choose_tokens(ROUTED, 100, 5, "round").tokens, ROUTED)
    nothing = choose_tokens(ROUTED[:0], 100, 0, "round")
    assert nothing.tokens.numel() == 0 and nothing.how == "round", "no token at all is never enough"


@pytest.mark.parametrize(("group_size", "groups"), [(128, 16), (32, 64), (-1, 16)])
def test_the_minimum_counts_groups_of_columns(group_size: int, groups: int) -> None:
    assert minimum_tokens(GPTQConfig(group_size=group_size, expert_min_tokens=10), 2048) == 10 * groups


def test_separate_experts_compute_what_the_fused_ones_do() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    fused = Qwen3MoeExperts(config)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
    holder = torch.nn.ModuleDict({"experts": fused})
    separate_experts(holder)
    separate = holder["experts"].to_empty(device="cpu")
    assert isinstance(separate, ExpertList) and len(separate) == 4
    with torch.no_grad():
        for k, expert in enumerate(separate):
            expert.gate_proj.weight.copy_(fused.gate_up_proj[k, :8])
            expert.up_proj.weight.copy_(fused.gate_up_proj[k, 8:])
            expert.down_proj.weight.copy_(fused.down_proj[k])
        hidden, weights = torch.randn(10, 16), torch.rand(10, 2)
        index = torch.stack([torch.randperm(3)[:2] for _ in range(10)])  # the last expert gets nothing
        assert torch.allclose(separate(hidden, index, weights), fused(hidden, index, weights), atol=1e-6)


def test_stacks_on_disk_appear_as_experts() -> None:
    from pathlib import Path

    stack = TensorInfo("model.layers.2.mlp.experts.gate_up_proj", torch.bfloat16, (3, 8, 5), Path("f"), 100, 240)
    other = TensorInfo("mtp.layers.0.mlp.experts.gate_up_proj", torch.bfloat16, (3, 8, 5), Path("f"), 340, 240)
    found = separate_infos({info.name: info for info in (stack, other)})
    assert len(found) == 7 and found[other.name] is other
    last = found["model.layers.2.mlp.experts.2.up_proj.weight"]
    assert (last.shape, last.offset, last.nbytes) == ((4, 5), 300, 40)


@pytest.mark.parametrize("in_file", [False, True])
def test_gathering_single_tokens(in_file: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = ActivationStore((4, 5, 6), tmp_path / "states" if in_file else None)
    values = torch.randn(4, 5, 6).bfloat16()
    store.save(0, values)
    tokens = torch.tensor([0, 4, 5, 19, 7])
    assert torch.equal(store.gather(tokens), values.view(20, 6)[tokens])
    store.close()
