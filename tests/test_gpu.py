"""The engine on a CUDA device gives an artifact as good as the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.sequential import quantize_checkpoint
from tests.support.checkpoints import make_checkpoint, text_file


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gpu_matches_cpu(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "in", family)
    calibration = CalibrationConfig(str(text_file(tmp_path / "text.txt")), 12, 64)
    results = []
    for device in ("cpu", "cuda"):
        run = RunConfig(device=device)
        job = QuantizeJob(model, tmp_path / device, GPTQConfig(group_size=32), calibration, run, "tiny")
        results.append(quantize_checkpoint(job, no_progress))
    for on_cpu, on_gpu in zip(results[0].layers, results[1].layers, strict=True):
        assert on_gpu.relative_error == pytest.approx(on_cpu.relative_error, rel=0.1), on_cpu.name
        assert on_gpu.relative_error < on_gpu.rounding_error
