"""Which kernel runs a linear: decided once when it is loaded, with the reason for every one that was not taken.

Order of preference on the CPU: torch's packed kernel for BF16 and FP16 models on processors with AVX512, which it is
made for (it reaches the memory's speed there); the native one; torch's; the reference. On CUDA: torch's; the reference.
Every kernel first proves itself in this process on a small weight with negative scales and zeros of all kinds; one that
is further from the reference than its arithmetic explains is not taken, and the report says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch

from qwen_quant.environment import cpu_features
from qwen_quant.errors import UsageError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.runtime.kernels.base import Kernel, LinearFacts
from qwen_quant.runtime.kernels.native import NativeKernel
from qwen_quant.runtime.kernels.reference import ReferenceKernel
from qwen_quant.runtime.kernels.torch_int4 import TorchCpuKernel, TorchCudaKernel
from qwen_quant.runtime.kernels.weights import GroupedWeight, grouped_weight

FastKernel = type[NativeKernel] | type[TorchCpuKernel] | type[TorchCudaKernel]
FAST_KERNELS: tuple[FastKernel, ...] = (NativeKernel, TorchCpuKernel, TorchCudaKernel)
KERNEL_NAMES = (*(kernel.name for kernel in FAST_KERNELS), ReferenceKernel.name)
# Largest relative error (Frobenius) that a kernel's arithmetic explains.
TOLERANCE = {NativeKernel.name: 2e-4, TorchCpuKernel.name: 1e-2, TorchCudaKernel.name: 1e-2}
PROVEN_ON = (64, 512)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one linear.

    Attributes:
        kernel: the weights in its layout.
        order: int64 [in], the input of each column of the kernel; None when columns are in their own order.
        not_taken: (kernel, reason) of those before it in the order of preference.
    """

    kernel: Kernel
    order: torch.Tensor | None
    not_taken: tuple[tuple[str, str], ...]


def preferred(device: torch.device, dtype: torch.dtype) -> tuple[FastKernel, ...]:
    """The fast kernels in order of preference for models of `dtype` on `device`."""
    if device.type == "cuda":
        return (TorchCudaKernel, NativeKernel, TorchCpuKernel)
    if dtype != torch.float32 and cpu_features()["avx512f"]:
        return (TorchCpuKernel, NativeKernel, TorchCudaKernel)
    return (NativeKernel, TorchCpuKernel, TorchCudaKernel)


def choose_kernel(
    weight: QuantizedWeight, bits: int, *, device: torch.device, dtype: torch.dtype, only: str | None = None
) -> KernelChoice:
    """The best kernel that takes the weight, packed for it.

    Args:
        weight: codes, scales, zeros and g_idx on the CPU.
        bits: 2, 3, 4 or 8.
        device, dtype: where the linear runs and the dtype of its inputs.
        only: the name of the one kernel to use, for measurements.

    Errors: UsageError for a kernel that does not exist or does not take this weight, when `only` names it.
    """
    if only is not None and only not in KERNEL_NAMES:
        raise UsageError(f"kernel {only!r} does not exist", next_step=f"choose one of: {', '.join(KERNEL_NAMES)}")
    grouped = grouped_weight(weight)
    facts = _facts(weight, grouped, bits, device, dtype)
    not_taken: list[tuple[str, str]] = []
    for kernel in preferred(device, dtype):
        if only not in (None, kernel.name):
            continue
        reason = kernel.refusal(facts) or proof_failure(kernel, str(device))
        if grouped is not None and not reason:
            return KernelChoice(kernel(grouped, device), grouped.order, tuple(not_taken))
        not_taken.append((kernel.name, reason))
    if only not in (None, ReferenceKernel.name):
        raise UsageError(f"kernel {only!r} does not take this linear", not_taken[0][1], "choose no kernel by name")
    return KernelChoice(ReferenceKernel(weight, bits, device), None, tuple(not_taken))


def _facts(
    weight: QuantizedWeight, grouped: GroupedWeight | None, bits: int, device: torch.device, dtype: torch.dtype
) -> LinearFacts:
    out_features, in_features = weight.codes.shape
    exact = weight.scales.dtype == torch.float16 or bool((weight.scales.half() == weight.scales).all())
    width, group_size = (in_features, 0) if grouped is None else (grouped.width, grouped.group_size)
    return LinearFacts(out_features, width, bits, group_size, exact, device, dtype)


@cache
def proof_failure(kernel: FastKernel, device: str) -> str:
    """Why `kernel` may not be used on this machine; empty when its products and its dense weights are right."""
    generator = torch.Generator().manual_seed(0)
    rows, width = PROVEN_ON
    codes = torch.randint(0, 16, (rows, width), generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, width // 32, generator=generator, dtype=torch.float32).mul(0.01).half()
    zeros = torch.randint(0, 16, (rows, width // 32), generator=generator, dtype=torch.uint8)
    inputs = torch.randn(3, width, generator=generator, dtype=torch.float32)
    worst = 0.0
    for group_size in (32, 128):
        groups = width // group_size
        weight = GroupedWeight(codes, scales[:, :groups], zeros[:, :groups], group_size, width, None)
        dense = weight.dequantized().double()
        try:
            packed = kernel(weight, torch.device(device))
            given = packed.product(inputs.to(device)).cpu().double()
            stored = packed.dense().cpu().double()
        except (RuntimeError, NotImplementedError) as error:
            return f"does not run here: {str(error).splitlines()[0]}"
        expected = inputs.double() @ dense.mT
        worst = max(worst, _distance(given, expected), _distance(stored, dense))
    if not worst <= TOLERANCE[kernel.name]:
        logger.warning("kernel %s is not used: it is %.1e from the reference on a test weight", kernel.name, worst)
        return f"is {worst:.1e} from the reference on a test weight"
    return ""


def _distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())
