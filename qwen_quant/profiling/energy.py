"""Energy counters: NVML on NVIDIA GPUs (package nvidia-ml-py), RAPL of the processor package on Linux."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """`read` gives joules since some past moment, None where nothing counts; `source` says what counts, or why not."""

    source: str
    read: Callable[[], float | None]


def energy_meter(device: torch.device, rapl: Path = RAPL) -> EnergyMeter:
    """The counter of a device."""
    return _nvml(device) if device.type == "cuda" else _rapl(rapl)


def joules_between(start: float | None, end: float | None) -> float | None:
    """Energy from one reading to a later one; None when either is missing or the counter has wrapped."""
    return None if start is None or end is None or end < start else end - start


def _nothing() -> None:
    return None


def _nvml(device: torch.device) -> EnergyMeter:
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return EnergyMeter("not read: pip install nvidia-ml-py", _nothing)
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return EnergyMeter(f"not reported by the device: {error}", _nothing)
    return EnergyMeter("NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _rapl(folder: Path) -> EnergyMeter:
    """All processor packages ("intel-rapl:0", also on AMD); their counters are often readable by root only."""
    counters = [path / "energy_uj" for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        for counter in counters:
            int(counter.read_text())
    except (OSError, ValueError):
        return EnergyMeter("not read: the RAPL counters are readable by root only", _nothing)
    if not counters:
        return EnergyMeter("not reported by this machine", _nothing)
    return EnergyMeter("RAPL package", lambda: sum(int(counter.read_text()) for counter in counters) / 1e6)
