"""Embedding and output head kept in BF16 inside an FP32 model, for processors that compute in FP32.

A BF16 checkpoint loaded in FP32 has an output head of twice the bytes, and decoding reads all of it for every token:
half of what the 135M test model reads. Here the BF16 values stay as they are, are widened inside the product, and sums
are FP32: the same products, exactly, from half the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_quant.runtime.kernels.base import by_tiles
from qwen_quant.runtime.kernels.native import NativeUnavailable, bf16_product, library

FEW_ROWS = 8  # more rows are multiplied tile by tile


class Bf16Embedding(nn.Embedding):
    """Rows of a BF16 table, given in FP32."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name)
        """int64 [...] -> FP32 [..., width]."""
        return super().forward(input).float()


class Bf16Head(nn.Module):
    """A linear without bias whose weight is BF16 and whose inputs are FP32.

    Args:
        in_features, out_features: shape of the weight, which is set after (it may be tied to the embedding).
    """

    name = "native BF16"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.bfloat16, device="meta"), False)

    def forward(self, inputs: Tensor) -> Tensor:
        """FP32 [..., in] -> FP32 [..., out]."""
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] <= FEW_ROWS and not (rows.requires_grad and torch.is_grad_enabled()):
            out = bf16_product(rows, self.weight)
        else:
            out = by_tiles(rows, lambda start, stop: self.weight[start:stop], self.out_features, 1)
        return out.view(*inputs.shape[:-1], self.out_features)


def refusal(head: nn.Module, stored: torch.dtype, device: torch.device, dtype: torch.dtype) -> str:
    """Why a head stored in `stored` is not kept in BF16 in a model of `dtype`; empty when it is."""
    if device.type != "cpu" or dtype != torch.float32:
        return "made for FP32 on the CPU"
    if stored != torch.bfloat16:
        return f"stored in {stored}"
    if type(head) is not nn.Linear or head.bias is not None:
        return "the head is no plain linear"
    try:
        library()
    except NativeUnavailable as error:
        return str(error)
    return ""


def keep_bf16(model: nn.Module, head_name: str, embedding_name: str) -> None:
    """Put Bf16Head and Bf16Embedding, still without values, in the places of a model's head and embedding."""
    head, embedding = model.get_submodule(head_name), model.get_submodule(embedding_name)
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    model.set_submodule(head_name, Bf16Head(head.in_features, head.out_features))
    with torch.device("meta"):
        table = Bf16Embedding(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
    model.set_submodule(embedding_name, table)


def kept_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a module of a model of `dtype` keeps its parameters."""
    return torch.bfloat16 if isinstance(module, (Bf16Head, Bf16Embedding)) else dtype
