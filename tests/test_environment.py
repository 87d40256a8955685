"""doctor's facts: read from given texts where they can be, and plausible on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwen_quant import environment
from qwen_quant.results import to_json

CPUINFO = """\
processor\t: 0
model name\t: Made Up CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16

processor\t: 1
flags\t\t: fpu amx_bf16
"""


def test_cpu_features_are_whole_words_of_the_first_cpu() -> None:
    found = environment.cpu_features(CPUINFO)
    assert found == {"avx2": True, "avx512f": True, "avx512_bf16": True, "amx_bf16": False}
    assert not any(environment.cpu_features("flags : avx2x avx512_bf16_no\n").values())
    assert not any(environment.cpu_features("").values())


def test_memory_obeys_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\nHugePages_Total: 0\n"}
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    assert environment.memory_bytes() == (8000 * 1024, 6000 * 1024)
    files |= {"/sys/fs/cgroup/memory.max": "4096000\n", "/sys/fs/cgroup/memory.current": "1096000\n"}
    assert environment.memory_bytes() == (4096000, 3000000)
    files |= {"/sys/fs/cgroup/memory.max": "max\n"}
    assert environment.memory_bytes() == (8000 * 1024, 6000 * 1024)


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = environment.free_disk_bytes(tmp_path)
    assert free > 0
    assert environment.free_disk_bytes(tmp_path / "not" / "yet") == pytest.approx(free, rel=0.05)


def test_extras_report_what_is_missing_and_what_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qq_broken_package.py").write_text("raise ImportError('needs libmagic')\n")
    monkeypatch.syspath_prepend(tmp_path)
    status = environment.extra_status("odd", ("json", "qq_no_such_package", "qq_broken_package"))
    assert not status.works
    assert "qq_no_such_package is not installed" in status.problem
    assert "needs libmagic" in status.problem
    assert environment.extra_status("fine", ("json",)) == environment.ExtraStatus("fine", ("json",), True, "")


def test_every_extra_is_known() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(environment.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_peak_memory_grows_with_an_allocation() -> None:
    before = environment.peak_rss_bytes()
    block = bytearray(b"x") * (before + (64 << 20))
    assert environment.peak_rss_bytes() >= before + (32 << 20)
    del block


def test_environment_is_complete_and_json(tmp_path: Path) -> None:
    facts = environment.inspect_environment(tmp_path)
    assert facts.versions["torch"] != "missing"
    assert 0 < facts.free_memory_bytes <= facts.total_memory_bytes
    assert facts.devices[0].device == "cpu" and facts.cpu_count >= 1
    assert json.loads(json.dumps(to_json(facts)))["peak_memory_bytes"] > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_of_a_process_is_its_own_and_not_that_of_its_parent() -> None:
    code = "from qwen_quant.environment import peak_rss_bytes; print(peak_rss_bytes())"
    ballast = bytearray(os.urandom(1)) * (800 << 20)  # an import of the package alone peaks at 430 MiB
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert environment.peak_rss_bytes() > len(ballast) > child > 5 << 20
