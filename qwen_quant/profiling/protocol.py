"""What is measured: the protocol of the published Qwen tables, or a sweep over batch sizes and lengths. No torch.

The published protocol, the default: 2048 and 8192 tokens generated from one context token (the length is enforced: no
stop token ends it), tokens per second averaged over all of them, the first included; peak memory, model load included,
once for 2048 context tokens plus one, once for 1 + 8192.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_quant.errors import InputError, UsageError
from qwen_quant.recipe import KV_CACHES

DTYPES = ("auto", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
LARGEST_COUNT = 2**31 - 1
MOST_THREADS = 1024  # OpenMP dies of some more
SWEEP_NEW_TOKENS = 1024  # of the published table by batch size
SWEEP_BATCH_SIZE = 1  # of the published table by generated length


@dataclass(frozen=True)
class Cell:
    """One measurement of one model: `batch_size` rows of `context_tokens` each, then `new_tokens` a row."""

    context_tokens: int
    new_tokens: int
    batch_size: int = 1
    kv_cache: str = "bf16"

    @property
    def label(self) -> str:
        """Short name: "1 + 2048", "1 + 1024 x 16 rows"."""
        rows = f" x {self.batch_size} rows" if self.batch_size > 1 else ""
        return f"{self.context_tokens} + {self.new_tokens}{rows}"


PUBLISHED_CELLS = (Cell(1, 2048), Cell(1, 8192), Cell(2048, 1))


@dataclass(frozen=True)
class ProfileConfig:
    """How to measure.

    Attributes:
        batch_sizes, new_tokens: a sweep over every combination; both empty: the published protocol. One of them empty:
            1024 new tokens, or one row.
        context_tokens: tokens in front of the new ones, in a sweep.
        kv_caches: caches to measure with: "bf16" (16-bit: F16 for a model in F16), "int8", "qwen".
        runs: timed generations of each cell; figures are their median.
        warmup_tokens: tokens generated before the clock starts (0: none).
        max_seconds: what the timed runs of one cell may take together; a run that is cut is extrapolated. None: any.
        device: "auto", "cpu" or "cuda". dtype: of dense weights and of activations; "auto":
            BF16, and for packed models what the hardware multiplies (FP32 on a CPU without BF16 instructions).
        threads: of the CPU; None: torch's own choice.
        compile: decode through torch.compile, whose time is reported and not counted; with the plain cache only.
        memory_limit_bytes: what one measurement may allocate; None: what is free when it starts (CPU only).
    """

    batch_sizes: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = ()
    context_tokens: int = 1
    kv_caches: tuple[str, ...] = ("bf16",)
    runs: int = 3
    warmup_tokens: int = 8
    max_seconds: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    memory_limit_bytes: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured (InputError naming the value)."""
        for name, values in (("batch size", self.batch_sizes), ("number of new tokens", self.new_tokens)):
            if odd := [value for value in values if not 1 <= value <= LARGEST_COUNT]:
                raise InputError(f"a {name} is {odd[0]}", next_step=f"use whole numbers from 1 to {LARGEST_COUNT}")
        for name, value, least, most in (
            ("context_tokens", self.context_tokens, 1, LARGEST_COUNT),
            ("runs", self.runs, 1, LARGEST_COUNT),
            ("warmup_tokens", self.warmup_tokens, 0, LARGEST_COUNT),
            ("threads", self.threads, 1, MOST_THREADS),
            ("memory_limit_bytes", self.memory_limit_bytes, 1, 2**63 - 1),
        ):
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} is {value}", next_step=f"use a whole number from {least} to {most}")
        if self.context_tokens > 1 and not (self.batch_sizes or self.new_tokens):
            raise InputError(
                f"context_tokens is {self.context_tokens}, without a sweep",
                "the published protocol has contexts of its own",
                "give --new-tokens or --batch-sizes too",
            )
        if self.max_seconds is not None and not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise InputError(f"max_seconds is {self.max_seconds}", next_step="use a number above 0")
        if self.compile and set(self.kv_caches) != {"bf16"}:
            raise InputError(
                "torch.compile needs a cache of fixed size",
                f"kv_cache is {', '.join(self.kv_caches)}, and only bf16 has one",
                "leave out --kv-cache or --compile",
            )
        for name, word, known in (
            *(("kv_cache", kind, KV_CACHES) for kind in self.kv_caches),
            ("device", self.device, DEVICES),
            ("dtype", self.dtype, DTYPES),
        ):
            if word not in known:
                raise InputError(f"{name} is {word!r}", next_step=f"use one of {', '.join(known)}")


def planned_cells(config: ProfileConfig) -> tuple[Cell, ...]:
    """The cells of a configuration, in the order they are measured; each once."""
    if config.batch_sizes or config.new_tokens:
        cells = [
            Cell(config.context_tokens, new, batch, kind)
            for kind in config.kv_caches
            for batch in config.batch_sizes or (SWEEP_BATCH_SIZE,)
            for new in config.new_tokens or (SWEEP_NEW_TOKENS,)
        ]
    else:
        cells = [
            Cell(cell.context_tokens, cell.new_tokens, cell.batch_size, kind)
            for kind in config.kv_caches
            for cell in PUBLISHED_CELLS
        ]
    return tuple(dict.fromkeys(cells))


def parse_numbers(text: str | None, option: str) -> tuple[int, ...]:
    """ "1,4,16" as whole numbers; None is (). Errors: UsageError naming the option."""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} is {text!r}", "it takes whole numbers with commas", f"{option} 1,4,16") from None
