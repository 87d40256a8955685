"""A tiny artifact that may be pushed: packed weights, a true manifest, a report of these very weights, a licence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.checkpoint.manifest import write_manifest
from qwen_quant.evaluation.report import report_text
from qwen_quant.results import GateOutcome, SmokeCase, ValidationResult
from tests.support.artifacts import make_artifact
from tests.support.card import SETTINGS
from tests.support.checkpoints import make_checkpoint
from tests.support.reports import make_result

PASSED = GateOutcome("max_kl on text", 0.1, 0.09, True)
FAILED = GateOutcome("max_kl on text", 0.05, 0.09, False)
SMOKE = (SmokeCase("a", "en", "?", "!", 3, True, "!", ()),)


def make_pushable(folder: Path, *, shards: int = 1, **artifact: Any) -> Path:
    """The artifact with report.json unsealed, as `validate --report DIR` leaves it."""
    source = make_checkpoint(folder.parent / f"{folder.name}-source", intermediate_size=256)
    make_artifact(source, folder, **artifact)
    (folder / "LICENSE").write_text("Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date: August 3, 2023\n")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "quantize_config.json").write_text(json.dumps({**settings, "model_name_or_path": None}))
    seal_again(folder)
    write_report_for(folder)
    return folder


def seal_again(folder: Path, **changes: Any) -> None:
    """A manifest that fits the folder as it is now, as if it had been made so; evidence stays out of it."""
    evidence = {name: folder / name for name in ("report.json", "README.md", "model.sig") if (folder / name).is_file()}
    kept_bytes = {name: path.read_bytes() for name, path in evidence.items()}
    for path in evidence.values():
        path.unlink()
    names = [name for path in sorted(folder.glob("*.safetensors")) for name in load_file(path)]
    kept = [name for name in names if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    manifest = {
        "schema": "qwen-quant/1",
        "method": "gptq",
        "source": {"id": "Qwen/Qwen2-tiny", "revision": "ab12" * 10, "sha256": {"config.json": "0c" * 32}},
        "settings": SETTINGS,
        "calibration": {"source": "bundled", "sha256": "ca" * 32, "tokens": 64, "shape": [2, 32], "seed": 0},
        "compute": {"device": "cpu", "dtype": "float32"},
        "versions": {"qwen-quant": "0.1.0", "torch": "2.13.0"},
        "audit": {
            "quantized": sum(name.endswith(".qweight") for name in names),
            "kept": dict.fromkeys(kept, "a rule"),
            "dropped_buffers": [],
        },
        "warnings": [],
        "layers": [],
        "measured": {"wall_seconds": 1.0, "peak_memory_bytes": 1},
    }
    (folder / "qwen-quant.json").unlink(missing_ok=True)
    write_manifest(folder, {**manifest, **changes})
    for name, data in kept_bytes.items():
        (folder / name).write_bytes(data)


def report_for(folder: Path, **changes: Any) -> ValidationResult:
    """A report about the folder's weights as they are now, with a gate that passed and a smoke prompt."""
    values: dict[str, Any] = {"quantized_sha256": weights_sha256(folder), "gates": (PASSED,), "smoke": SMOKE}
    return dataclasses.replace(make_result(), **{**values, **changes})


def write_report_for(folder: Path, **changes: Any) -> None:
    """Put `report_for` into the folder."""
    (folder / "report.json").write_text(report_text(report_for(folder, **changes)), encoding="utf-8")
