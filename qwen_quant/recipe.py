"""Frozen settings of a run, validated once at the border, and their TOML file (`qwen-quant.toml`)."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError, UsageError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
ORDERS = ("activation", "column")
SCALE_METHODS = ("search", "minmax")
BNB_QUANT_TYPES = ("nf4", "fp4", "int8")
BNB_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
BNB_COMPUTE_DTYPES = ("auto", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
EXPERT_POLICIES = ("route-all", "pool", "round")
KV_CACHES = ("bf16", "int8", "qwen")
RECIPE_NAME = "qwen-quant.toml"
RELEASE_TABLES = ("release", "profile", "tasks")  # `qwen-quant release` reads and checks them (releasing/)


def _require(condition: bool, what: str, next_step: str) -> None:
    if not condition:
        raise InputError(what, next_step=next_step)


@dataclass(frozen=True)
class GPTQConfig:
    """What the solver does to each linear.

    Attributes:
        bits: width of one code: 2, 3, 4 or 8.
        group_size: input columns that share a scale; -1 is one group per row.
        sym: symmetric grid (zero fixed at 2^(bits-1)); else a zero per group in 1..2^bits-1.
        desc_act: groups follow the activation order (g_idx is a permutation); needs kernels that read g_idx.
        damp_percent: fraction of the mean Hessian diagonal added to it before it is factored.
        order: "activation" solves columns by falling Hessian diagonal with STATIC groups (no permutation on disk);
            "column" solves left to right.
        scales: "search" is the Hessian-weighted search of `grid.py`; "minmax" is the plain range.
        asymmetric_calibration: solve against the inputs of the full-precision stream (see `gptq.py`).
        rounding_only: no solving at all: plain rounding, the baseline of every comparison.
        checkpoint_format: "gptq" stores zero-1 in qzeros, "gptq_v2" stores zero.
        expert_policy: what happens to a routed expert that too few calibration tokens reach (see `experts.py`).
        expert_min_tokens: fewest tokens for each group of an expert's input columns.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    order: str = "activation"
    scales: str = "search"
    asymmetric_calibration: bool = True
    rounding_only: bool = False
    checkpoint_format: str = "gptq"
    expert_policy: str = "route-all"
    expert_min_tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        _require(self.bits in BITS, f"bits is {self.bits}", f"use one of {BITS}")
        _require(self.group_size in GROUP_SIZES, f"group_size is {self.group_size}", f"use one of {GROUP_SIZES}")
        damp = self.damp_percent
        _require(0 < damp < 1, f"damp_percent is {damp}", "use a fraction in (0, 1), e.g. 0.01")
        _require(self.order in ORDERS, f"order is {self.order!r}", f"use one of {ORDERS}")
        _require(self.scales in SCALE_METHODS, f"scales is {self.scales!r}", f"use one of {SCALE_METHODS}")
        _require(
            self.checkpoint_format in CHECKPOINT_FORMATS,
            f"checkpoint_format is {self.checkpoint_format!r}",
            f"use one of {CHECKPOINT_FORMATS}",
        )
        policy = self.expert_policy
        _require(policy in EXPERT_POLICIES, f"expert_policy is {policy!r}", f"use one of {EXPERT_POLICIES}")
        _require(self.expert_min_tokens >= 0, f"expert_min_tokens is {self.expert_min_tokens}", "use 0 or more")


@dataclass(frozen=True)
class BnbConfig:
    """What becomes of each linear in a bitsandbytes artifact; no data is needed.

    Attributes:
        quant_type: "nf4" or "fp4" (4 bit in blocks), "int8" (8 bit, one scale a row).
        double_quant: 4 bit only: the scales of the blocks are quantized to 8 bit too.
        block_size: 4 bit only: consecutive weights that share a scale. 64 is what transformers itself makes.
        compute_dtype: 4 bit only: what a runtime multiplies in; "auto" is bf16.
        skip: modules that stay 16-bit besides the head, as transformers matches llm_int8_skip_modules.
        int8_threshold: Int8 only: activations of this magnitude and more are multiplied in 16 bit.
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    block_size: int = 64
    compute_dtype: str = "auto"
    skip: tuple[str, ...] = ()
    int8_threshold: float = 6.0

    def __post_init__(self) -> None:
        """Refuse a value outside its range, or one without meaning for the type, with one InputError that names it."""
        kind, eight = self.quant_type, self.quant_type == "int8"
        _require(kind in BNB_QUANT_TYPES, f"quant_type is {kind!r}", f"use one of {BNB_QUANT_TYPES}")
        size, dtype = self.block_size, self.compute_dtype
        _require(size in BNB_BLOCK_SIZES, f"block_size is {size}", f"use one of {BNB_BLOCK_SIZES}")
        _require(dtype in BNB_COMPUTE_DTYPES, f"compute_dtype is {dtype!r}", f"use one of {BNB_COMPUTE_DTYPES}")
        limit = self.int8_threshold
        _require(0 <= limit < float("inf"), f"int8_threshold is {limit}", "use 0 (no outliers) or more, e.g. 6.0")
        step = "leave it out, or use nf4 or fp4"
        _require(not (eight and self.double_quant), "double_quant does not go with int8, which has no blocks", step)
        _require(not (eight and size != 64), "block_size does not go with int8, which has one scale a row", step)
        _require(not (eight and dtype != "auto"), "compute_dtype does not go with int8, which computes in FP16", step)
        _require(eight or limit == 6.0, f"int8_threshold does not go with {kind}", "leave it out, or use int8")


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the solver sees.

    Attributes:
        source: "bundled", or the path of a .json/.jsonl/.txt file.
        num_samples: rows of `seq_len` tokens.
        seq_len: tokens per row.
        seed: picks and orders the rows.
    """

    source: str = "bundled"
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        _require(self.num_samples >= 1, f"num_samples is {self.num_samples}", "use 1 or more")
        _require(self.seq_len >= 16, f"seq_len is {self.seq_len}", "use 16 or more")


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run happens; nothing here changes the artifact's weights (but for the device's arithmetic).

    Attributes:
        device: "auto", "cpu" or "cuda".
        max_shard_size_bytes: upper bound of one safetensors file (a larger single tensor gets a file of its own).
        resume: continue the unfinished run of the same output.
        force: replace an existing output, once the new one is complete.
    """

    device: str = "auto"
    max_shard_size_bytes: int = 2_000_000_000
    resume: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        _require(self.device in DEVICES, f"device is {self.device!r}", f"use one of {DEVICES}")
        _require(self.max_shard_size_bytes > 0, "max_shard_size is not positive", "use e.g. 2GB")


@dataclass(frozen=True)
class ValidationConfig:
    """How an artifact is compared with its baseline.

    Attributes:
        texts: what to score, each "bundled" (English and Chinese), "bundled:en", "bundled:zh", a .txt/.jsonl/.json file
            ("FILE#field" names the field of its rows), or "hub:org/name[:config[:split[:field]]]".
        window_tokens: length of one window.
        stride_tokens: distance between the starts of two windows; 0 is window_tokens, so that windows are disjoint.
        max_windows: score only the first windows of each text; None is all of them.
        joining: what stands between two rows of a source that has rows.
        lengths: window lengths of the long-context table; empty: no table.
        smoke: run the fixed prompts first.
        device: "auto", "cpu" or "cuda".
        seed: of every bootstrap.
        resume: continue a killed run of the same comparison.
        kv_cache: hold the keys and values of OUT in such a cache, "bf16" (plain), "int8" or "qwen", and those of the
            baseline in the plain one; "" is neither.
    """

    texts: tuple[str, ...] = ("bundled",)
    window_tokens: int = 1024
    stride_tokens: int = 0
    max_windows: int | None = None
    joining: str = "\n\n"
    lengths: tuple[int, ...] = ()
    smoke: bool = True
    device: str = "auto"
    seed: int = 0
    resume: bool = True
    kv_cache: str = ""

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        _require(self.kv_cache in ("", *KV_CACHES), f"kv_cache is {self.kv_cache!r}", f"use one of {KV_CACHES}")
        _require(bool(self.texts), "there is no text to score", "give a file, or bundled")
        _require(self.window_tokens >= 2, f"window_tokens is {self.window_tokens}", "use 2 or more")
        _require(
            0 <= self.stride_tokens <= self.window_tokens,
            f"stride_tokens is {self.stride_tokens}",
            f"use 1 to {self.window_tokens} (the window), or 0 for disjoint windows",
        )
        windows = self.max_windows
        _require(windows is None or windows >= 1, f"max_windows is {windows}", "use 1 or more")
        _require(all(n >= 2 for n in self.lengths), f"lengths are {self.lengths}", "use lengths of 2 tokens or more")
        _require(self.device in DEVICES, f"device is {self.device!r}", f"use one of {DEVICES}")

    @property
    def stride(self) -> int:
        """Tokens between the starts of two windows."""
        return self.stride_tokens or self.window_tokens


@dataclass(frozen=True)
class GateConfig:
    """Limits that an artifact must keep to; None is no limit. Each is compared with the unfavourable interval end.

    Attributes:
        max_kl: largest mean KL divergence, nats per token.
        max_perplexity_ratio: largest quantized / baseline perplexity.
        min_top1: least top-1 agreement, 0 to 1.
        max_task_drop: largest loss of a task's score, 0 to 1.
    """

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    min_top1: float | None = None
    max_task_drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse a value outside its range with one InputError that names it."""
        for name in ("max_kl", "max_perplexity_ratio", "max_task_drop"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} is {value}", "use 0 or more")
        top1 = self.min_top1
        _require(top1 is None or 0 <= top1 <= 1, f"min_top1 is {top1}", "use a fraction in 0..1, e.g. 0.9")


@dataclass(frozen=True)
class Recipe:
    """One project: what is quantized, to where, and how. `None` means that the command line has to say it."""

    model: str | None = None
    out: str | None = None
    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    bnb: BnbConfig = field(default_factory=BnbConfig)


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB", "500MB", "1.5GiB" or a bare number of bytes (UsageError otherwise)."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    clean = text.strip().upper()
    number = clean.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = clean[len(number) :].strip()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"'{text}' is not a size", next_step="write it as 2GB, 500MB or 1.5GiB") from None
    if value < 1:
        raise UsageError(f"'{text}' is less than one byte", next_step="write it as 2GB, 500MB or 1.5GiB")
    return value


def _fits(value: Any, key: dataclasses.Field[Any]) -> bool:
    """Whether a TOML value may stand where the key's default stands (None: an optional number)."""
    default = key.default
    if default is None and str(key.type).startswith("int"):
        return type(value) is int
    if default is None or isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, tuple):
        kind = str if key.type == "tuple[str, ...]" else int
        return isinstance(value, list) and all(type(item) is kind for item in value)
    return type(value) is type(default)


def read_section(table: dict[str, Any], name: str, cls: type, path: Path) -> Any:
    """Take the TOML table `name` out of `table` as the frozen config `cls` (its defaults where it is absent).

    Errors: InputError naming `path`, the table and the key, with the known keys where the key is unknown.
    """
    values = table.pop(name, {})
    if not isinstance(values, dict):
        raise InputError(f"{path}: [{name}] is not a table")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key '{key}' in [{name}]", next_step=f"known keys: {', '.join(known)}")
        if not _fits(value, known[key]):
            kind = "number" if known[key].default is None else type(known[key].default).__name__
            raise InputError(f"{path}: [{name}] {key} = {value!r} is not of type {kind}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except InputError as error:
        raise InputError(f"{path}: [{name}] {error.what}", error.why, error.next_step) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a recipe as TOML gives them (InputError when there is no such file or it is not TOML)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        step = "fix the file or write a new one: qwen-quant init"
        raise InputError(f"cannot read the recipe {path}", str(error), step) from error


def take_recipe(table: dict[str, Any], path: Path) -> Recipe:
    """Take everything that every command knows out of `table`; what is left there is not a Recipe's."""
    run_table = table.get("run", {})
    if isinstance(run_table, dict) and "max_shard_size" in run_table:
        run_table["max_shard_size_bytes"] = parse_size(str(run_table.pop("max_shard_size")))
    gptq = read_section(table, "gptq", GPTQConfig, path)
    calibration = read_section(table, "calibration", CalibrationConfig, path)
    run = read_section(table, "run", RunConfig, path)
    validation = read_section(table, "validation", ValidationConfig, path)
    gates = read_section(table, "gates", GateConfig, path)
    bnb = read_section(table, "bnb", BnbConfig, path)
    model, out = table.pop("model", None), table.pop("out", None)
    for key, value in (("model", model), ("out", out)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}: {key} = {value!r} is not a string")
    return Recipe(model, out, gptq, calibration, run, validation, gates, bnb)


def refuse_rest(table: dict[str, Any], path: Path) -> None:
    """InputError for a key or table of a recipe that nothing took."""
    if table:
        step = "known: model, out, [gptq], [bnb], [calibration], [run], [validation], [gates], "
        step += ", ".join(f"[{name}]" for name in RELEASE_TABLES)
        raise InputError(f"{path}: unknown key '{next(iter(table))}'", next_step=step)


def load_recipe(path: Path) -> Recipe:
    """Read `qwen-quant.toml`. Errors: InputError naming the file, the table and the key."""
    table = read_toml(path)
    recipe = take_recipe(table, path)
    refuse_rest({key: value for key, value in table.items() if key not in RELEASE_TABLES}, path)
    return recipe
