"""bitsandbytes' Int8 codes by native_int8.c: the bytes of `bnb.quantize_int8`, at a fifth of its time.

Reading, rounding through FP16, scaling and measuring the error are one pass over a row that stays in the cache; as
operators of torch they are ten passes over memory.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from qwen_quant.runtime.kernels.native import NativeUnavailable, is_built, library

WORTH_COMPILING = 4 << 30  # bytes of the source; compiling takes 2 to 4 seconds, once a machine
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def takes_int8(source_bytes: int) -> bool:
    """Whether `int8_rows` runs here, and is there already or pays to be compiled for a source of this size."""
    if source_bytes < WORTH_COMPILING and not is_built():
        return False
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """(codes int8 [out, in], SCB FP32 [out], ||W' - W|| / ||W||) of a finite weight [out, in] whose values fit FP16.

    Errors: NativeUnavailable (not where `takes_int8` is true).
    """
    rows, width = weight.shape
    values = weight.contiguous()
    codes, scb = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    sums = torch.empty(rows, 2, dtype=torch.float64)
    made = (codes.data_ptr(), scb.data_ptr(), sums.data_ptr())
    kind, threads = _KINDS[weight.dtype], torch.get_num_threads()
    library().int8_rows(values.data_ptr(), kind, rows, width, *made, threads)
    difference, size = sums.sum(0).tolist()
    return codes, scb, math.sqrt(difference / size) if size else 0.0
