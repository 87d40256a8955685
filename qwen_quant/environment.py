"""Facts about this machine and this process, for `qwen-quant doctor` and for memory figures.

Everything is read from the operating system (/proc, resource) or from package metadata; importing this module imports
neither torch nor any optional package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
CORE_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "tiktoken",
    "numpy",
    "typer",
    "rich",
)
EXTRAS = {  # of pyproject.toml, with the packages that must import
    "eval": ("lm_eval", "datasets"),
    "gguf": ("gguf",),
    "mlx": ("mlx.core",),
    "openvino": ("openvino", "openvino_tokenizers"),
    "onnx": ("onnx",),
    "sign": ("model_signing",),
    "plots": ("matplotlib",),
    "interop": ("gptqmodel", "optimum"),
}


@dataclass(frozen=True)
class Device:
    """One place to compute: "cpu" or "cuda:0", its name, its memory and whether it multiplies BF16 natively."""

    device: str
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    native_bf16: bool


@dataclass(frozen=True)
class ExtraStatus:
    """Whether the packages of one extra import: `problem` is empty when they do, else what is missing or broken."""

    extra: str
    packages: tuple[str, ...]
    works: bool
    problem: str


@dataclass(frozen=True)
class Environment:
    """What `doctor` shows. Sizes are bytes; a figure the system does not tell is 0."""

    versions: dict[str, str]
    python: str
    platform: str
    cpu_name: str
    cpu_count: int
    cpu_features: dict[str, bool]
    devices: tuple[Device, ...]
    total_memory_bytes: int
    free_memory_bytes: int
    folder: str
    free_disk_bytes: int
    peak_memory_bytes: int
    extras: tuple[ExtraStatus, ...]
    missing: tuple[str, ...]


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    VmHWM where there is /proc: ru_maxrss of a process that was started by a larger one begins at that one's size.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> tuple[int, int]:
    """(total, available) RAM in bytes: /proc/meminfo, bounded by the cgroup's limit where there is one."""
    fields: dict[str, int] = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if rest.strip().endswith("kB"):
            fields[name] = int(rest.split()[0]) * 1024
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and 0 < int(limit) < total:
        total, available = int(limit), min(available, max(0, int(limit) - int(used)))
    return total, available


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, or that will hold it (its nearest existing parent)."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def cpu_features(cpuinfo: str | None = None) -> dict[str, bool]:
    """Which of CPU_FEATURES the first CPU of /proc/cpuinfo has (all False where there is no such file)."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    flags = set(_cpu_field(text, "flags").split())
    return {name: name in flags for name in CPU_FEATURES}


def package_versions() -> dict[str, str]:
    """Version of each core package, or "missing"."""
    return {name: _version(name) for name in CORE_PACKAGES}


def extra_status(extra: str, packages: tuple[str, ...]) -> ExtraStatus:
    """Try to import the packages of one extra; what goes wrong is reported, not raised."""
    problems = []
    for package in packages:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            problems.append(f"{package} is not installed")
            continue
        try:
            importlib.import_module(package)
        except (ImportError, AttributeError, RuntimeError, OSError, TypeError, ValueError) as error:
            problems.append(f"{package} does not import: {type(error).__name__}: {error}")
    return ExtraStatus(extra, packages, not problems, "; ".join(problems))


def inspect_environment(folder: Path) -> Environment:
    """Gather everything; `folder` is where free disk space is asked for. Imports torch when it is there."""
    total, available = memory_bytes()
    cpuinfo = _read("/proc/cpuinfo")
    features = cpu_features(cpuinfo)
    name = _cpu_field(cpuinfo, "model name") or platform.processor() or platform.machine()
    bf16 = features["avx512_bf16"] or features["amx_bf16"]
    devices = (Device("cpu", name, total, available, bf16), *_cuda_devices())
    extras = tuple(extra_status(extra, packages) for extra, packages in EXTRAS.items())
    versions = package_versions()
    return Environment(
        versions=versions,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_name=name,
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=features,
        devices=devices,
        total_memory_bytes=total,
        free_memory_bytes=available,
        folder=str(folder.absolute()),
        free_disk_bytes=free_disk_bytes(folder),
        peak_memory_bytes=peak_rss_bytes(),
        extras=extras,
        missing=_missing(versions, extras, has_gpu=len(devices) > 1, native_bf16=bf16),
    )


def _missing(
    versions: dict[str, str], extras: tuple[ExtraStatus, ...], *, has_gpu: bool, native_bf16: bool
) -> tuple[str, ...]:
    """What a user may want to change, one line each."""
    lines = [
        f"{name}: pip install {name.replace('_', '-')}" for name, version in versions.items() if version == "missing"
    ]
    lines += [f"extra '{e.extra}' ({e.problem}): pip install 'qwen-quant[{e.extra}]'" for e in extras if not e.works]
    if not has_gpu:
        lines.append("no CUDA device: everything runs on the CPU")
    if not native_bf16 and not has_gpu:
        lines.append(
            "the CPU has neither avx512_bf16 nor amx_bf16: forward passes run in FP32, at about half the speed"
        )
    return tuple(lines)


def _cuda_devices() -> tuple[Device, ...]:
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = bool(torch.cuda.is_bf16_supported())
        found.append(Device(f"cuda:{index}", torch.cuda.get_device_name(index), total, free, bf16))
    return tuple(found)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _cpu_field(cpuinfo: str, field: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
