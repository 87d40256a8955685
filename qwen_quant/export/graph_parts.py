"""What the blocks of a decoder hold, for the formats that write graphs: linear attention, gated attention, experts.

Shapes and counts are those of transformers' own configuration, defaults included; names in a block are those of the
checkpoint (`linear_attn.*`, `self_attn.*`, `mlp.gate`, `mlp.experts.K.*`, `mlp.shared_expert.*`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qwen_quant.checkpoint.halves import SparseBlock, SubBlock
from qwen_quant.export.hybrid import is_hybrid, is_vision

if TYPE_CHECKING:
    from qwen_quant.checkpoint.families import ModelSpec
    from qwen_quant.export.source import ExportSource

L2_EPS = 1e-6  # x / sqrt(sum(x^2) + L2_EPS): queries and keys of linear attention, in transformers' code


@dataclass(frozen=True)
class Experts:
    """Routed experts of the sparse blocks.

    The router's probabilities are the softmax over all experts; the `top_k` largest weigh the experts' outputs, divided
    by their sum where `normalized`.

    Attributes:
        count, top_k: experts of a block, and how many a token passes.
        width: intermediate size of one expert.
        shared: a shared expert is added, times sigmoid(mlp.shared_expert_gate).
    """

    count: int
    top_k: int
    width: int
    normalized: bool
    shared: bool


@dataclass(frozen=True)
class LinearMixer:
    """Linear attention (gated delta rule). Value head h belongs to key head h // (value_heads / key_heads).

    Attributes:
        key_heads, value_heads, key_dim, value_dim: heads and values of one head.
        kernel: taps of the causal convolution over [queries, keys, values].
        fused: one projection holds q, k, v, z of one key head after another, another b and a (qwen3_next); otherwise
            in_proj_qkv, in_proj_z, in_proj_b and in_proj_a are apart.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    fused: bool

    @property
    def keys(self) -> int:
        """Values of all queries, or of all keys, of a token."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Values of all value heads of a token."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class Parts:
    """What stands in the blocks.

    Attributes:
        linear: per block, linear attention instead of attention.
        sparse: per block, experts instead of one MLP.
        experts, mixer: of all those blocks (None: there are none).
        gated: q_proj gives, head by head, a query and a gate; attention's output is multiplied by sigmoid(gate).
        one_plus: norms multiply by 1 + weight; the norm inside linear attention multiplies by its weight.
    """

    linear: tuple[bool, ...]
    sparse: tuple[bool, ...]
    experts: Experts | None = None
    mixer: LinearMixer | None = None
    gated: bool = False
    one_plus: bool = False


def read_parts(spec: ModelSpec) -> Parts:
    """The parts of any family but qwen4_exp."""
    if not spec.family.sparse and not is_hybrid(spec):
        plain = (False,) * spec.num_layers
        return Parts(plain, plain)
    values = {key: value for key, value in spec.config.items() if key not in ("quantization_config", "auto_map")}
    config: Any = CONFIG_MAPPING[spec.family.model_type].from_dict(values).get_text_config()
    hybrid = is_hybrid(spec)
    sparse = tuple(isinstance(halves[1], SparseBlock) for halves in spec.blocks)
    mixers = [halves[0] for halves in spec.blocks]
    linear = tuple(isinstance(half, SubBlock) and half.module == "linear_attn" for half in mixers)
    experts = mixer = None
    if any(sparse):
        experts = Experts(
            count=spec.expert_count,
            top_k=int(config.num_experts_per_tok),
            width=int(config.moe_intermediate_size),
            normalized=bool(getattr(config, "norm_topk_prob", True)),  # qwen3_5_moe always divides
            shared=spec.family.shared is not None,
        )
    if any(linear):
        mixer = LinearMixer(
            key_heads=int(config.linear_num_key_heads),
            value_heads=int(config.linear_num_value_heads),
            key_dim=int(config.linear_key_head_dim),
            value_dim=int(config.linear_value_head_dim),
            kernel=int(config.linear_conv_kernel_dim),
            fused=any("in_proj_qkvz" in name for half in mixers for name in half.linears()),
        )
    return Parts(linear, sparse, experts, mixer, gated=hybrid, one_plus=hybrid)


def left_out(source: ExportSource) -> dict[str, str]:
    """Kept tensors that a graph of the text decoder has no place for, with the reason."""
    spec, why = source.spec, "the graph is the text decoder, without multi-token prediction"
    return {name: why for name in source.kept if spec.is_passenger(name) or is_vision(spec, name)}
