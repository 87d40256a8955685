"""Routed experts as separate linears instead of transformers' fused 3-D parameters.

On disk each expert is three matrices under names of its own; transformers 5 stacks them when it loads a checkpoint.
Here the fused module is replaced by a list of experts whose parameters carry the names on disk, so that every expert is
read, quantized, audited and loaded like any other linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)); `act_fn` is shared by all experts of a block."""

    def __init__(self, hidden: int, width: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj: nn.Module = nn.Linear(width, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return result


class ExpertList(nn.ModuleList):
    """The experts of one sparse MLP, called as transformers calls its fused module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's chosen experts of weight * expert(token).

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].
        """
        result = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        for expert, places in zip(self, order.split(counts), strict=True):
            if places.numel():
                tokens = places // top_k_index.shape[1]
                values = expert(hidden_states[tokens]) * top_k_weights.flatten()[places, None]
                result.index_add_(0, tokens, values.to(result.dtype))
        return result


def separate_experts(model: nn.Module) -> None:
    """Replace every fused experts module of a model on the meta device, in place."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            experts, width, hidden = module.down_proj.shape[0], module.down_proj.shape[2], module.down_proj.shape[1]
            with torch.device("meta"):
                separate = ExpertList(Expert(hidden, width, module.act_fn) for _ in range(experts))
            model.set_submodule(name, separate)


def _is_fused(module: Any) -> bool:
    """Whether a module holds gate_up_proj [experts, 2 * width, hidden] and down_proj [experts, hidden, width]."""
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)
