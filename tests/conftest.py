"""Markers with their skip reasons, and checkpoints that several tests read."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from tests.support.browser import find_chromium
from tests.support.checkpoints import make_checkpoint

MARKERS = {
    "gpu": "needs a CUDA device",
    "network": "talks to the real hub: run with -m network",
    "slow": "takes minutes: run with -m slow",
    "interop": "loads artifacts with other tools: run with make interop",
    "browser": "needs Chromium on the PATH (or its program in QWEN_QUANT_CHROMIUM)",
}


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job hands down an ignored SIGINT, which commands that the tests start would inherit.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if "network" in config.option.markexpr else "1")
    for name, reason in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what a default run (CPU, offline, quick) does not do; naming the marker with -m runs it."""
    for item in items:
        for name, reason in MARKERS.items():
            if item.get_closest_marker(name) and not _wanted(name, config.option.markexpr):
                item.add_marker(pytest.mark.skip(reason=reason))


def _wanted(marker: str, expression: str) -> bool:
    if marker == "browser":
        return find_chromium() is not None
    if marker != "gpu":
        return marker in expression
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied qwen2 checkpoint in one file. Read only: copy it to damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen2") / "tiny-qwen2", "qwen2", tied=True)


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied qwen3 checkpoint in three shards. Read only: copy it to damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3") / "tiny-qwen3", "qwen3", tied=False, shards=3)
