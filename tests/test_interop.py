"""Strangers read what we write: transformers + optimum + gptqmodel, in their own environment (`make interop`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.runtime.loading import WeightSource, load_model
from qwen_quant.sequential import quantize_checkpoint
from tests.support.checkpoints import make_checkpoint, text_file

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "interop_gptqmodel.py"
# GPTQModel rounds (code - zero) * scale to FP16; with the same rounding on our side only FP32 summation order is left.
TOLERANCE = 1e-3


def expected_logits(artifact: Path, path: Path) -> None:
    """Write input_ids and the logits of our own loader, its weights rounded as the peer rounds them."""
    source, model = WeightSource(artifact), load_model(artifact)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if source.base_of(name) is not None:
                parameter.copy_(parameter.half().float())
        ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
        logits = model(ids).logits.float()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, path)


@pytest.mark.interop
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"group_size": 32}),
        ("qwen3", {"group_size": 64}),
        ("qwen2", {"group_size": 32, "bits": 8}),
        ("qwen3", {"group_size": 32, "desc_act": True}),
        ("qwen2", {"group_size": 32, "sym": False}),
        ("qwen2", {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}),
    ],
)
def test_gptqmodel_reads_our_artifact(family: str, options: dict[str, object], tmp_path: Path) -> None:
    python = os.environ.get("QWEN_QUANT_PEER_PYTHON")
    assert python, "run this through `make interop`, which sets QWEN_QUANT_PEER_PYTHON"
    model = make_checkpoint(tmp_path / "in", family, intermediate_size=256)
    calibration = CalibrationConfig(str(text_file(tmp_path / "text.txt")), 12, 64)
    job = QuantizeJob(model, tmp_path / "out", GPTQConfig(**options), calibration, RunConfig(device="cpu"), "tiny")
    quantize_checkpoint(job, no_progress)
    expected = tmp_path / "expected.safetensors"
    expected_logits(tmp_path / "out", expected)
    command = [python, str(SCRIPT), str(tmp_path / "out"), str(expected), "--atol", str(TOLERANCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(json.loads(done.stdout))
