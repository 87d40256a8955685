"""A linear whose weight stays quantized: GPTQ codes in the layout of the kernel that was chosen when it was loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_quant.errors import UsageError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.runtime.kernels.choose import choose_kernel


@dataclass(frozen=True)
class LinearSettings:
    """How an Int4Linear is built.

    Attributes:
        bits: of the codes: 2, 3, 4 or 8 (fast kernels exist for 4).
        device: where it runs.
        dtype: of its inputs; it decides between kernels, others are taken too.
        kernel: the name of the one kernel to use, for measurements; None chooses.
    """

    bits: int
    device: torch.device
    dtype: torch.dtype
    kernel: str | None = None


class Int4Linear(nn.Module):
    """y = x W^T + bias with W quantized; few rows by a fast kernel, many by dequantized tiles.

    Gradients flow to the inputs (by tiles), not to the weight. The weight is packed for one device, so moving the
    module to another one is refused. `state_dict` holds the bias only: the folder it came from is the saved form, and
    models with such linears refuse `save_pretrained`.

    Attributes:
        in_features, out_features: shape of the weight.
        bits: of its codes.
        kernel: the packed weight.
        not_taken: (kernel, reason) of the kernels that would have been preferred.

    Args:
        weight: codes, scales, zeros, g_idx on the CPU.
        bias: [out] or None.
        settings: bits, device, dtype.

    Errors: UsageError for a kernel by name that does not take it.
    """

    order: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, settings: LinearSettings) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits = settings.bits
        choice = choose_kernel(
            weight, settings.bits, device=settings.device, dtype=settings.dtype, only=settings.kernel
        )
        self.kernel, self.not_taken = choice.kernel, choice.not_taken
        self.device = settings.device
        order = None if choice.order is None else choice.order.to(settings.device)
        self.register_buffer("order", order, persistent=False)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.to(settings.device, settings.dtype), requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and bias: what one product reads."""
        return self.kernel.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of the inputs."""
        kernel = self.kernel
        rows = inputs.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        if kernel.width != self.in_features:
            rows = functional.pad(rows, (0, kernel.width - self.in_features))
        many = rows.shape[0] >= kernel.prefill_rows
        out = (
            kernel.by_tiles(rows) if many or (rows.requires_grad and torch.is_grad_enabled()) else kernel.product(rows)
        )
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(*inputs.shape[:-1], self.out_features)

    def dequantized(self) -> Tensor:
        """FP32 [out, in]: the weight as this kernel has it."""
        dense = self.kernel.dense()[:, : self.in_features]
        if self.order is None:
            return dense
        result = torch.empty_like(dense)
        result[:, self.order] = dense
        return result

    def extra_repr(self) -> str:
        """Shape, bits and kernel, for print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, kernel={self.kernel.name!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """Other dtypes change the bias only; another device is refused."""
        target = fn(torch.empty(0, device=self.device)).device
        if target != self.device:
            raise UsageError(
                f"an Int4 linear cannot move from {self.device} to {target}",
                "its weight is packed for one device",
                f"load the folder with device={str(target)!r}",
            )
        super()._apply(fn, recurse)
        return self
