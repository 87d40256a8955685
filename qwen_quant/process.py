"""What has to be said to the C library, OpenMP and the system first. Costs nothing and changes no result.

Measured on 2 cores (README): with torch's OpenMP threads spinning between operations, OpenBLAS, which numpy calls for
X^T X, gets half a processor; and freed activations that go back to the kernel are faulted in anew a moment later.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

OPENMP_SPINS = "1000"  # then a waiting thread sleeps
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's mallopt, malloc.h
PR_SET_PDEATHSIG = 1  # prctl(2)
KEPT_BYTES = 256 << 20  # freed memory that stays with the process
LARGEST_POOLED_BYTES = 32 << 20  # the largest threshold glibc takes


def end_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however it ends (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def tune_process() -> None:
    """Settle OpenMP's waiting and glibc's malloc for this process, unless the environment already says how."""
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in (
        (M_TRIM_THRESHOLD, KEPT_BYTES),
        (M_TOP_PAD, LARGEST_POOLED_BYTES),
        (M_MMAP_THRESHOLD, LARGEST_POOLED_BYTES),
    ):
        mallopt(option, value)
