"""Peaks of this process: resident set on the CPU, allocator and whole device on a GPU; and a limit to run under.

On Linux the peak is VmHWM of /proc/self/status: unlike ru_maxrss it starts anew with each program, and writing 5 to
/proc/self/clear_refs sets it back (proc(5)). Elsewhere it is ru_maxrss, which never falls.
"""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwen_quant.environment import peak_rss_bytes
from qwen_quant.runtime.linear import Int4Linear
from qwen_quant.runtime.quantized_model import bnb_scales

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True)
class Peak:
    """`process_bytes`: largest resident set, or largest sum of GPU allocations; `device_bytes`: in use on the GPU."""

    process_bytes: int
    device_bytes: int | None


def read_peak(device: torch.device) -> Peak:
    """The peak since `reset_peak`, or since the process began."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Peak(torch.cuda.max_memory_allocated(device), total - free)
    return Peak(peak_resident_bytes(), None)


def reset_peak(device: torch.device) -> None:
    """Begin a new peak at what is in use now (without effect on a CPU outside Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_resident_bytes() -> int:
    """Largest resident set of this process, in bytes."""
    return _status("VmHWM") or peak_rss_bytes()


def resident_bytes() -> int:
    """Resident set of this process now, in bytes (its peak where the system does not tell)."""
    return _status("VmRSS") or peak_rss_bytes()


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes, 0 where there is none."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 0


def limit_memory(limit_bytes: int) -> None:
    """Let further allocations fail beyond `limit_bytes` of private memory, and be the first that the kernel ends.

    Threads are started before, since their stacks count. Without effect where the system has no such limit.
    """
    with contextlib.suppress(OSError):
        _OOM_SCORE.write_text("1000")
    torch.ones(1 << 16).exp_()  # starts OpenMP's threads
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def out_of_memory_reason(error: BaseException) -> str | None:
    """What an out-of-memory error says, in one line; None for any other error."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return text or type(error).__name__
    if isinstance(error, RuntimeError) and re.search(
        r"(can't|[Cc]annot) allocate memory|out of memory|bad_alloc", str(error)
    ):
        return text
    if isinstance(error, OSError) and error.errno == 12:  # ENOMEM, as mmap gives it
        return text
    return None


def weights_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and packed weights, shared storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [part for parameter in model.parameters() for part in bnb_scales(parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    packed = sum(module.kernel.nbytes for module in model.modules() if isinstance(module, Int4Linear))
    return sum(storages.values()) + packed
