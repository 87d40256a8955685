"""Every kernel against the dequantized weight: shapes, group sizes, zeros, signs, act-order, numbers of rows."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_quant.errors import UsageError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.runtime.kernels import choose, native
from qwen_quant.runtime.kernels.choose import KERNEL_NAMES, choose_kernel, preferred, proof_failure
from qwen_quant.runtime.kernels.native import NativeKernel, NativeUnavailable
from qwen_quant.runtime.kernels.torch_int4 import TorchCpuKernel, cpu_row_order
from qwen_quant.runtime.linear import Int4Linear, LinearSettings

CPU = torch.device("cpu")
FAST = (NativeKernel.name, TorchCpuKernel.name)
# (relative error of the product, of the weight): the arithmetic of each kernel, with a margin of about 3.
BOUNDS = {NativeKernel.name: (1e-4, 0.0), TorchCpuKernel.name: (1.5e-2, 5e-3), "reference": (1e-6, 0.0)}


def has_native() -> bool:
    try:
        native.library()
    except NativeUnavailable:
        return False
    return True


needs_native = pytest.mark.skipif(not has_native(), reason="needs an x86-64 processor with AVX2 and a C compiler")


def kernels(*names: str) -> list[object]:
    return [pytest.param(n, marks=needs_native) if n == NativeKernel.name else n for n in names]


def random_weight(
    out: int, width: int, group_size: int, *, bits: int = 4, sym: bool = False, order: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Every code, zeros of all values (sym: the middle), scales of both signs; with `order`, groups are scattered."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // group_size)
    codes = torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)
    scales = torch.randn(out, groups, generator=generator).mul(0.01).half()
    zeros = torch.randint(1, 2**bits, (out, groups), generator=generator, dtype=torch.uint8)
    g_idx = (torch.arange(width) // group_size).int()
    if order:
        g_idx = g_idx[torch.randperm(width, generator=generator)]
    return QuantizedWeight(codes, scales, torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros, g_idx)


def linear(weight: QuantizedWeight, kernel: str | None, *, bits: int = 4, bias: Tensor | None = None) -> Int4Linear:
    return Int4Linear(weight, bias, LinearSettings(bits, CPU, torch.float32, kernel))


def assert_near(value: Tensor, expected: Tensor, bound: float, what: object) -> None:
    """Relative Frobenius error at most `bound`; the message shows where it is."""
    difference = (value.double() - expected.double()).abs()
    error = float(difference.norm() / expected.double().norm())
    said = f"{what}: relative error {error:.2e} > {bound:.0e}, max {difference.max():.2e}, mean {difference.mean():.2e}"
    assert error <= bound, said


def check(weight: QuantizedWeight, kernel: str, bits: int = 4) -> None:
    """Products of 1 to 110 rows, with and without batch dimensions, and the dense weight."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(weight.codes.shape[0], generator=generator)
    module = linear(weight, kernel, bits=bits, bias=bias)
    assert module.kernel.name == kernel
    dense = weight.dequantized()
    of_product, of_weight = BOUNDS[kernel]
    assert_near(module.dequantized(), dense, of_weight, (kernel, "weight"))
    for shape in ((1,), (5,), (2, 3), (110,)):
        inputs = torch.randn(*shape, dense.shape[1], generator=generator)
        expected = inputs.double() @ dense.double().mT + bias
        assert_near(module(inputs), expected, of_product, (kernel, shape))


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize(("sym", "order"), list(itertools.product([True, False], [True, False])))
def test_groups_zeros_and_act_order(kernel: str, group_size: int, sym: bool, order: bool) -> None:
    check(random_weight(96, 1024, group_size, sym=sym, order=order), kernel)


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
@pytest.mark.parametrize(
    ("out", "width", "group_size"),
    [(16, 32, 32), (16, 64, 64), (32, 96, 32), (48, 128, 128), (80, 160, 32), (272, 576, 64), (1056, 2112, 64)],
)
def test_shapes(kernel: str, out: int, width: int, group_size: int) -> None:
    check(random_weight(out, width, group_size), kernel)


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_do_not_fill_the_last_group(kernel: str, order: bool) -> None:
    check(random_weight(48, 200, 64, order=order), kernel)
    check(random_weight(48, 1000, 256, order=order), kernel)


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
def test_one_group(kernel: str) -> None:
    check(random_weight(48, 96, 96), kernel)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("order", [False, True])
def test_other_widths_go_through_the_reference(bits: int, order: bool) -> None:
    weight = random_weight(96, 256, 64, bits=bits, order=order)
    assert all(reason for _, reason in linear(weight, None, bits=bits).not_taken)
    check(weight, "reference", bits)


@needs_native
def test_native_product_is_nearly_exact_for_outliers_and_exact_for_small_whole_inputs() -> None:
    weight = random_weight(64, 512, 128)
    module, dense = linear(weight, NativeKernel.name), weight.dequantized().double()
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4, 512, generator=generator)
    inputs[:, 7] *= 1000
    assert_near(module(inputs), inputs.double() @ dense.mT, 1e-4, "an outlier of 1000")
    signs = torch.randint(0, 2, (4, 512), generator=generator).mul(2).sub(1).float()
    assert_near(module(signs), signs.double() @ dense.mT, 1e-6, "inputs of -1 and 1")
    assert torch.equal(module(torch.zeros(1, 512)), torch.zeros(1, 64))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_native_says_nan_for_what_is_not_finite(value: float) -> None:
    module = linear(random_weight(64, 512, 128), NativeKernel.name)
    inputs = torch.ones(6, 512)
    inputs[1, 300] = value
    out = module(inputs)
    assert out[1].isnan().all() and out[[0, 2, 3, 4, 5]].isfinite().all()


@needs_native
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e30])
def test_native_sizes_of_inputs(size: float) -> None:
    weight = random_weight(32, 64, 32)
    inputs = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).double() * size
    out = linear(weight, NativeKernel.name)(inputs.float()).double()
    if size < 1e-30:
        assert out.abs().max() < 1e-30
    else:
        assert_near(out, inputs.float().double() @ weight.dequantized().double().mT, 1e-4, size)


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_their_dtype(kernel: str, dtype: torch.dtype) -> None:
    weight = random_weight(64, 256, 64)
    module = linear(weight, kernel)
    for rows in (1, 110):
        inputs = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = module(inputs)
        assert out.dtype == dtype
        assert_near(out, inputs.double() @ weight.dequantized().double().mT, 1.5e-2, (kernel, dtype, rows))


@pytest.mark.parametrize("kernel", kernels(*FAST, "reference"))
def test_gradients_reach_the_inputs(kernel: str) -> None:
    weight = random_weight(64, 200, 64, order=True)
    inputs = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), requires_grad=True)
    linear(weight, kernel)(inputs).sum().backward()
    assert inputs.grad is not None
    assert_near(inputs.grad, weight.dequantized().sum(0).expand(3, -1), max(BOUNDS[kernel][1], 1e-5), kernel)


def test_groups_of_different_sizes_go_through_the_reference() -> None:
    weight = random_weight(64, 128, 32)
    uneven = QuantizedWeight(
        weight.codes, weight.scales, weight.zeros, weight.g_idx.clone().index_fill_(0, torch.tensor([5]), 2)
    )
    module = linear(uneven, None)
    assert module.kernel.name == "reference"
    assert "its groups differ in size" in dict(module.not_taken).values()
    check(uneven, "reference")


def test_group_sizes_that_kernels_cannot_take_are_said() -> None:
    module = linear(random_weight(64, 96, 48), None)
    assert module.kernel.name == "reference" and len(module.not_taken) == 3
    assert dict(module.not_taken)[TorchCpuKernel.name] == "group size 48 is no multiple of 32"


def test_outputs_that_torch_cannot_take_are_said() -> None:
    with pytest.raises(UsageError, match="40 outputs are no multiple of 16"):
        linear(random_weight(40, 64, 32), TorchCpuKernel.name)


def test_scales_beyond_fp16_are_not_rounded() -> None:
    weight = random_weight(64, 64, 32)
    fine = QuantizedWeight(weight.codes, weight.scales.float() * 1.0001, weight.zeros, weight.g_idx)
    assert dict(linear(fine, None).not_taken)[NativeKernel.name] == "scales are not FP16 values"


def test_an_unknown_kernel() -> None:
    with pytest.raises(UsageError, match="kernel 'marlin' does not exist"):
        linear(random_weight(16, 32, 32), "marlin")


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at load finds it, the next kernel is taken, and the report says why."""
    right = TorchCpuKernel.product
    monkeypatch.setattr(TorchCpuKernel, "product", lambda self, inputs: right(self, inputs) * 1.05)
    monkeypatch.setattr(NativeKernel, "refusal", staticmethod(lambda facts: "left out of this test"))
    proof_failure.cache_clear()
    try:
        choice = choose_kernel(random_weight(64, 64, 32), 4, device=CPU, dtype=torch.float32)
    finally:
        proof_failure.cache_clear()
    assert choice.kernel.name == "reference"
    assert "from the reference on a test weight" in dict(choice.not_taken)[TorchCpuKernel.name]


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library.cache_clear()
    proof_failure.cache_clear()
    try:
        choice = choose_kernel(random_weight(64, 64, 32), 4, device=CPU, dtype=torch.float32)
    finally:
        native.library.cache_clear()
        proof_failure.cache_clear()
    assert choice.kernel.name == TorchCpuKernel.name
    assert "no-such-compiler" in dict(choice.not_taken)[NativeKernel.name] or not has_native()


@needs_native
def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    native.library.cache_clear()
    with pytest.raises(NativeUnavailable, match="failed: "):
        native.library()
    assert not list((tmp_path / "qwen-quant").glob("*.so"))
    native.library.cache_clear()


@needs_native
def test_the_library_shares_torchs_openmp() -> None:
    """Two thread pools on the same cores would stall each other."""
    code = (
        "from qwen_quant.runtime.kernels.native import library; library();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@needs_native
def test_threads_change_no_bit() -> None:
    module = linear(random_weight(272, 576, 64), NativeKernel.name)
    inputs = torch.randn(7, 576, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(module(inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_copied_module_owns_its_weights() -> None:
    module = linear(random_weight(64, 64, 32), None)
    inputs = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    expected = module(inputs)
    other = copy.deepcopy(module)
    for tensor in module.kernel.tensors:
        tensor.zero_()
    assert torch.equal(other(inputs), expected)


def test_a_module_stays_on_its_device() -> None:
    module = linear(random_weight(64, 64, 32), None, bias=torch.zeros(64))
    with pytest.raises(UsageError, match="cannot move from cpu to meta"):
        module.to("meta")
    assert module.to(torch.bfloat16).bias.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [16, 64, 256])
def test_torchs_row_order_is_a_permutation(rows: int) -> None:
    block, order = cpu_row_order(rows)
    assert rows % block == 0 and sorted(order) == list(range(block))


def test_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "cpu_features", lambda: {"avx512f": True})
    assert preferred(CPU, torch.bfloat16)[0] is TorchCpuKernel
    assert preferred(CPU, torch.float32)[0] is NativeKernel
    monkeypatch.setattr(choose, "cpu_features", lambda: {"avx512f": False})
    assert preferred(CPU, torch.bfloat16)[0] is NativeKernel
    assert preferred(torch.device("cuda"), torch.bfloat16)[0].name == "torch int4 (CUDA)"
    assert len(KERNEL_NAMES) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize(("sym", "order"), list(itertools.product([True, False], [True, False])))
def test_cuda(group_size: int, sym: bool, order: bool) -> None:
    weight = random_weight(96, 1024, group_size, sym=sym, order=order)
    module = Int4Linear(weight, None, LinearSettings(4, torch.device("cuda:0"), torch.bfloat16))
    assert module.kernel.name == "torch int4 (CUDA)", module.not_taken
    for rows in (1, 7, 300):
        inputs = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = inputs.double() @ weight.dequantized().double().mT
        assert_near(module(inputs.cuda()).cpu(), expected, 1.5e-2, (group_size, rows))
