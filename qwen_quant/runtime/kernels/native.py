"""A 4-bit kernel for processors with AVX2, compiled once on this machine from native.c where there is a C compiler.

torch's own packed kernel streams 4 GB/s of weights per core on AVX2 (it is made for AVX512), this one 16. The library
is kept in the user's cache folder under a name made of the sources, the flags and the compiler, so it is compiled once:
about a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from qwen_quant.runtime.kernels.base import UNEVEN, Kernel, LinearFacts
from qwen_quant.runtime.kernels.weights import GroupedWeight, largest_divisor

GROUP_SIZES = (32, 64, 128, 256)
SOURCE = Path(__file__).with_name("native_step.c")  # which includes the others
SOURCES = (SOURCE, SOURCE.with_name("native.c"), SOURCE.with_name("native_int8.c"))
FLAGS = ("-O3", "-std=gnu11", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120
SYMMETRIC_ZERO = 8
LANES = 16
BLOCK_CODES = 4 * LANES
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NativeUnavailable(Exception):
    """Why the library cannot be had here; its text is the reason in kernel reports."""


def _cache_folder() -> Path:
    """Where the library is kept: the user's cache, or a fresh private folder when that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "qwen-quant"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owned = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
    except (OSError, RuntimeError):
        owned = False
    if owned and os.access(folder, os.W_OK):
        return folder
    return Path(tempfile.mkdtemp(prefix="qwen-quant-"))


def _compiler() -> str:
    named = os.environ.get("CC")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)
    if not found:
        raise NativeUnavailable(f"no C compiler ({named or ', '.join(COMPILERS)}) on the PATH")
    return found


def _target(compiler: str) -> Path:
    """Where the library that `compiler` makes of these sources lies, or will lie."""
    identity = [
        *(path.read_bytes() for path in SOURCES),
        " ".join(FLAGS).encode(),
        compiler.encode(),
        torch.__version__.encode(),
    ]
    digest = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    return _cache_folder() / f"native-{digest}.so"


def is_built() -> bool:
    """Whether the library has been compiled here before."""
    try:
        return _target(_compiler()).exists()
    except NativeUnavailable:
        return False


def _build() -> Path:
    """Path of the compiled library, compiled now if it is not there (NativeUnavailable when that fails)."""
    compiler = _compiler()
    target = _target(compiler)
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made = Path(place) / target.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"{compiler} did not run: {error}") from error
        if done.returncode:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise NativeUnavailable(f"{compiler} failed: {first}")
        os.replace(made, target)
    return target


@cache
def library() -> ctypes.CDLL:
    """The compiled library, loaded; torch is loaded already, so both share one OpenMP.

    Errors: NativeUnavailable with the reason.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise NativeUnavailable(f"made for x86-64, this is {platform.machine()}")
    try:
        loaded = ctypes.CDLL(str(_build()))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error
    if not loaded.supported():
        raise NativeUnavailable("the processor lacks AVX2, FMA or F16C")
    loaded.product.argtypes = [*[_POINTER] * 5, *[_SIZE] * 4, _INT]
    loaded.dequantize.argtypes = [*[_POINTER] * 4, *[_SIZE] * 3, _INT]
    loaded.bf16_product.argtypes = [*[_POINTER] * 3, *[_SIZE] * 3, _INT]
    loaded.decode_step.argtypes = [_POINTER, _SIZE, _SIZE, _INT]
    loaded.int8_rows.argtypes = [_POINTER, _INT, _SIZE, _SIZE, *[_POINTER] * 3, _INT]
    _operators()
    loaded.dequantize.restype = loaded.bf16_product.restype = loaded.int8_rows.restype = None
    return loaded


def bf16_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """FP32 [rows, in] times BF16 [out, in] transposed -> FP32 [rows, out]; both on the CPU, sums in FP32.

    Errors: NativeUnavailable.
    """
    if torch.compiler.is_compiling():
        return torch.ops.qwen_quant.bf16_product(inputs, weight)
    return _bf16_product(inputs, weight)


def _bf16_product(inputs: Tensor, weight: Tensor) -> Tensor:
    values, (rows, out_features) = inputs.contiguous(), (inputs.shape[0], weight.shape[0])
    out = torch.empty(rows, out_features, dtype=torch.float32)
    sizes = (rows, out_features, weight.shape[1], torch.get_num_threads())
    library().bf16_product(weight.data_ptr(), values.data_ptr(), out.data_ptr(), *sizes)
    return out


def int4_product(inputs: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """FP32 [rows, width] times a packed weight (native.c) transposed -> FP32 [rows, out].

    Errors: NativeUnavailable; MemoryError when the rounded inputs find no room.
    """
    if torch.compiler.is_compiling():
        return torch.ops.qwen_quant.int4_product(inputs, codes, scales, zeros, group_size)
    return _int4_product(inputs, codes, scales, zeros, group_size)


def _int4_product(inputs: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    values, (rows, width) = inputs.contiguous(), inputs.shape
    out = torch.empty(rows, codes.shape[0], dtype=torch.float32)
    sizes = (rows, codes.shape[0], width, group_size, torch.get_num_threads())
    packed = (codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr())
    if library().product(*packed, values.data_ptr(), out.data_ptr(), *sizes):
        raise MemoryError(f"{rows * width * 2} bytes for the inputs of a linear")
    return out


@cache
def _operators() -> torch.library.Library:
    """The products as operators of torch, which torch.compile can leave alone; calls outside it skip the dispatcher."""
    made = torch.library.Library("qwen_quant", "DEF")
    made.define("int4_product(Tensor inputs, Tensor codes, Tensor scales, Tensor? zeros, int group_size) -> Tensor")
    made.define("bf16_product(Tensor inputs, Tensor weight) -> Tensor")
    made.impl("int4_product", _int4_product, "CPU")
    made.impl("bf16_product", _bf16_product, "CPU")
    made.impl("int4_product", lambda inputs, codes, *rest: inputs.new_empty(inputs.shape[0], codes.shape[0]), "Meta")
    made.impl("bf16_product", lambda inputs, weight: inputs.new_empty(inputs.shape[0], weight.shape[0]), "Meta")
    return made


def _pack(codes: Tensor) -> Tensor:
    """uint8 codes [out, width] -> [out, width / 2]: bytes 2j, 2j + 1 of 64 hold codes j, j + 16, j + 32, j + 48."""
    quarters = codes.unflatten(1, (-1, 2, 2, LANES))
    return (quarters[:, :, :, 0] | quarters[:, :, :, 1] << 4).transpose(2, 3).flatten(1)


class NativeKernel(Kernel):
    """native.c behind the kernels' interface.

    Inputs are rounded to 16-bit integers per group, weights are exact, sums are FP32: about 2e-5 of the output's size
    from exact, 100 times closer than BF16.

    Args:
        weight: a 4-bit weight whose group size is a multiple of 32.
        device: the CPU.
    """

    name: ClassVar[str] = "native"
    arithmetic: ClassVar[str] = "inputs as 16-bit integers per group, FP32 sums"
    prefill_rows: ClassVar[int] = 48

    def __init__(self, weight: GroupedWeight, device: torch.device) -> None:
        weight = weight.resized(largest_divisor(weight.group_size, GROUP_SIZES)).filled(BLOCK_CODES)
        library()
        self.out_features, self.width, self.group_size = weight.out_features, weight.width, weight.group_size
        self.codes = _pack(weight.codes)
        self.scales = weight.scales.half().contiguous()
        symmetric = bool((weight.zeros == SYMMETRIC_ZERO).all())
        self.zeros: Tensor | None = None if symmetric else weight.zeros.contiguous()

    @staticmethod
    def refusal(facts: LinearFacts) -> str:
        """Why it does not take this linear; empty when it does."""
        if facts.device.type != "cpu":
            return "runs on the CPU"
        if facts.bits != 4:
            return f"made for 4 bits, these are {facts.bits}"
        if not facts.group_size:
            return UNEVEN
        if not largest_divisor(facts.group_size, GROUP_SIZES):
            return f"group size {facts.group_size} is no multiple of 32"
        if not facts.exact_scales:
            return "scales are not FP16 values"
        try:
            library()
        except NativeUnavailable as error:
            return str(error)
        return ""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales, and zeros where they are not all 8."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    def product(self, inputs: Tensor) -> Tensor:
        """[rows, width] -> [rows, out] in the dtype of the inputs."""
        out = int4_product(inputs.float(), self.codes, self.scales, self.zeros, self.group_size)
        return out if inputs.dtype == torch.float32 else out.to(inputs.dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, width]."""
        out = torch.empty(stop - start, self.width, dtype=torch.float32)
        parts = [part[start:stop].data_ptr() for part in self.tensors] + [None] * (self.zeros is None)
        sizes = (stop - start, self.width, self.group_size, torch.get_num_threads())
        library().dequantize(*parts, out.data_ptr(), *sizes)
        return out
