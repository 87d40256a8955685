"""torch's own packed int4 kernels: `_weight_int4pack_mm_for_cpu` and, on CUDA, `_weight_int4pack_mm`.

Both compute (code - 8) * scale + offset with scale and offset in BF16, [groups, out, 2], and take BF16 inputs; a zero z
becomes the offset (8 - z) * scale, so negative scales and any zero are represented, each rounded to BF16: about 2e-3 of
the output's size from exact, the noise of a BF16 model. (The CPU kernel also takes FP32 and FP16, but not by vector
instructions: measured 20 times slower than BF16 on AVX2, and so not used.)

Bounds, from the operators' own checks:
    CPU     outputs a multiple of 16, inputs of 2 and of the group size; groups of 32, 64, 128 or 256
    CUDA    outputs a multiple of 8, inputs of 128 (8 inner tiles of 16), BF16, compute capability 8.0

`_dyn_quant_matmul_4bit` is torch's third one: made for ARM; on x86 it is a plain loop (35 ms where the packed kernel
takes 2.3 on a 4096 x 4096 weight) and rounds inputs to 8 bits. It is not offered.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from qwen_quant.runtime.kernels.base import UNEVEN, Kernel, LinearFacts
from qwen_quant.runtime.kernels.weights import GroupedWeight, largest_divisor

GROUP_SIZES = (32, 64, 128, 256)
CPU_OUT_STEP, CUDA_OUT_STEP, CUDA_IN_STEP = 16, 8, 128
INNER_TILES = 8
MIDDLE = 8  # the code that both kernels take for 0 before the offset
MIN_CAPABILITY = (8, 0)
_PROBE_ROWS = 256


def scales_and_offsets(weight: GroupedWeight) -> Tensor:
    """BF16 [groups, out, 2] as the module's docstring says."""
    scales = weight.scales.float()
    offsets = (MIDDLE - weight.zeros.float()) * scales
    return torch.stack((scales, offsets), -1).transpose(0, 1).contiguous().bfloat16()


def _common_refusal(facts: LinearFacts, out_step: int) -> str:
    if facts.bits != 4:
        return f"made for 4 bits, these are {facts.bits}"
    if not facts.group_size:
        return UNEVEN
    if not largest_divisor(facts.group_size, GROUP_SIZES):
        return f"group size {facts.group_size} is no multiple of 32"
    if facts.out_features % out_step:
        return f"{facts.out_features} outputs are no multiple of {out_step}"
    return ""


class _TorchKernel(Kernel):
    """What the two share: packed codes, scales and offsets."""

    arithmetic: ClassVar[str] = "BF16"

    def __init__(self, weight: GroupedWeight, device: torch.device) -> None:
        weight = weight.resized(largest_divisor(weight.group_size, GROUP_SIZES))
        self.out_features, self.width, self.group_size = weight.out_features, weight.width, weight.group_size
        self.scales = scales_and_offsets(weight).to(device)
        self.packed = self._pack(weight.codes.to(device))

    def _pack(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Packed codes; scales and offsets."""
        return (self.packed, self.scales)

    def _dequantized(self, codes: Tensor, start: int) -> Tensor:
        """FP32 [rows, width] of codes uint8 [rows, width] that begin at row `start`."""
        pairs = self.scales[:, start : start + codes.shape[0]].float().transpose(0, 1)
        groups = codes.float().sub_(MIDDLE).unflatten(1, (-1, self.group_size))
        return groups.mul_(pairs[..., :1]).add_(pairs[..., 1:]).flatten(1)


@cache
def cpu_row_order(rows: int) -> tuple[int, tuple[int, ...]]:
    """(block, order): how the CPU operator lays out `rows` rows; it differs by instruction set.

    Blocks of `block` rows follow each other; within one, each column is block / 2 bytes, whose nibbles, low first,
    belong to the block's rows in `order`. `rows` is whole blocks, or one block that is smaller, as the last one may be.
    Found by packing the position of every weight, one base-16 digit at a time.

    Errors: RuntimeError when the operator lays them out otherwise.
    """
    columns = 2
    place = torch.arange(rows * columns)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        digits = (place >> shift & 15).int().view(rows, columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, INNER_TILES).flatten().long()
        found |= torch.stack((packed & 15, packed >> 4), 1).flatten() << shift
    row, column = found // columns, found % columns
    block = int((column == 0).long().cumprod(0).sum())
    order = row[:block]
    blocks = torch.arange(rows // max(block, 1))
    expected = (blocks[:, None, None] * block + order).expand(-1, columns, -1).flatten()
    if not block or rows % block or not torch.equal(row, expected):
        raise RuntimeError(f"torch packs {rows} rows for its int4 kernel in an unknown order")
    return block, tuple(order.tolist())


class TorchCpuKernel(_TorchKernel):
    """`_weight_int4pack_mm_for_cpu`, in BF16.

    Args:
        weight: a 4-bit weight whose group size is a multiple of 32, outputs a multiple of 16.
        device: the CPU.
    """

    name: ClassVar[str] = "torch int4 (CPU)"
    prefill_rows: ClassVar[int] = 96

    @staticmethod
    def refusal(facts: LinearFacts) -> str:
        """Why it does not take this linear; empty when it does."""
        if facts.device.type != "cpu":
            return "runs on the CPU"
        return _common_refusal(facts, CPU_OUT_STEP)

    def _pack(self, codes: Tensor) -> Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), INNER_TILES)

    def product(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out] in the dtype of the inputs."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(inputs.bfloat16(), self.packed, self.group_size, self.scales).to(inputs.dtype)

    @property
    def row_step(self) -> int:
        """Whole blocks of the layout."""
        return cpu_row_order(_PROBE_ROWS)[0]

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, width]."""
        whole = start + (stop - start) // self.row_step * self.row_step
        parts = [self._blocks(start, whole)] if whole > start else []
        if stop > whole:  # the last block of a weight may be smaller, in an order of its own
            parts.append(self._blocks(whole, stop))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _blocks(self, start: int, stop: int) -> Tensor:
        rows = stop - start
        block, order = cpu_row_order(_PROBE_ROWS if rows % self.row_step == 0 else rows)
        packed = self.packed.view(-1)[start * self.width // 2 : stop * self.width // 2].view(-1, self.width, block // 2)
        codes = torch.cat((packed & 15, packed >> 4), -1)
        place = torch.tensor(order[::2] + order[1::2], device=packed.device).argsort()
        if bool((place.diff() != 1).any()):  # low nibbles are the first half of the rows where vector instructions pack
            codes = codes.index_select(2, place)
        return self._dequantized(codes.transpose(1, 2).reshape(rows, self.width), start)


class TorchCudaKernel(_TorchKernel):
    """`_weight_int4pack_mm`, in BF16.

    Its layout is not read back: codes are recovered by multiplying columns of the unit matrix with scales of 1, which
    is exact and takes `width` rows, so many rows are better given to it directly up to `prefill_rows`.

    Args:
        weight: a 4-bit weight whose group size is a multiple of 32, outputs a multiple of 8, inputs of 128.
        device: a CUDA device of compute capability 8.0 or more.
    """

    name: ClassVar[str] = "torch int4 (CUDA)"
    prefill_rows: ClassVar[int] = 256

    @staticmethod
    def refusal(facts: LinearFacts) -> str:
        """Why it does not take this linear; empty when it does."""
        if facts.device.type != "cuda":
            return "runs on CUDA"
        if torch.cuda.get_device_capability(facts.device) < MIN_CAPABILITY:
            return "needs compute capability 8.0"
        if facts.in_features % CUDA_IN_STEP:
            return f"{facts.in_features} inputs are no multiple of {CUDA_IN_STEP}"
        return _common_refusal(facts, CUDA_OUT_STEP)

    def _pack(self, codes: Tensor) -> Tensor:
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)

    def product(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out] in the dtype of the inputs."""
        product = torch.ops.aten._weight_int4pack_mm
        return product(inputs.bfloat16(), self.packed, self.group_size, self.scales).to(inputs.dtype)

    def by_tiles(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out]: the weight is dequantized whole, once for all rows."""
        return torch.nn.functional.linear(inputs, self.dense().to(inputs.dtype))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, width], recovered through the product."""
        unit = torch.eye(self.width, dtype=torch.bfloat16, device=self.packed.device)
        plain = torch.zeros_like(self.scales)
        plain[..., 0] = 1
        codes = torch.ops.aten._weight_int4pack_mm(unit, self.packed, self.group_size, plain).mT + MIDDLE
        return self._dequantized(codes[start:stop].to(torch.uint8), start)
