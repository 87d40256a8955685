"""A tiny artifact with made-up evidence, whose numbers are odd enough to be recognized in a card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.identity import weights_sha256_of
from qwen_quant.evaluation.report import report_text
from qwen_quant.profiling.protocol import Cell, ProfileConfig
from qwen_quant.profiling.results import (
    MEASURED,
    OOM,
    Measurement,
    Memory,
    ModelFacts,
    ProfileResult,
    Speed,
    Spread,
    write_profile,
)
from qwen_quant.results import GateOutcome, Interval, PerplexityPair, SmokeCase, TaskResult, ValidationResult, Verdict
from tests.support.artifacts import make_artifact
from tests.support.checkpoints import make_checkpoint
from tests.support.reports import make_result

OUTPUT = {"config.json": "c1" * 32, "model.safetensors": "5a" * 32}
SOURCE = {"config.json": "0c" * 32, "model.safetensors": "7e" * 32}
ARTIFACT_SHA256, SOURCE_SHA256 = weights_sha256_of(OUTPUT), weights_sha256_of(SOURCE)
NO_LOSS = Verdict("no loss detected", "no loss detected", 0.0127)
SETTINGS = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "damp_percent": 0.013,
    "order": "activation",
    "scales": "search",
    "asymmetric_calibration": True,
    "rounding_only": False,
    "checkpoint_format": "gptq",
}


def manifest(folder: Path, **changes: Any) -> dict[str, Any]:
    """A manifest of `gptq` for a 2-block model; `changes` replace its keys."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    names = [f"model.layers.{k}.{kind}" for k in range(2) for kind in (*kinds, "mlp.up_proj", "mlp.down_proj")]
    layers = [{"name": n, "relative_error": 0.0171 + k / 997, "rounding_error": 0.0633} for k, n in enumerate(names)]
    norms = {
        f"model.layers.{k}.{name}.weight" for k in range(2) for name in ("input_layernorm", "post_attention_layernorm")
    }
    kept = {"model.embed_tokens.weight": "embeddings stay 16-bit"}
    kept |= dict.fromkeys(sorted(norms), "normalization weights stay 16-bit")
    value = {
        "schema": "qwen-quant/1",
        "method": "gptq",
        "source": {"id": "Qwen/Qwen2-tiny", "revision": "ab12" * 10, "sha256": SOURCE},
        "settings": SETTINGS,
        "calibration": {
            "source": "/home/somebody/secret/calibration.txt",
            "sha256": "ca" * 32,
            "tokens": 6256,
            "shape": [17, 368],
            "seed": 23,
        },
        "compute": {"device": "cpu", "dtype": "float32"},
        "versions": {"qwen-quant": "0.1.0", "torch": "2.13.0"},
        "audit": {"quantized": len(layers), "kept": kept, "dropped_buffers": []},
        "warnings": ["the calibration text fills 17 of 19 rows of 368 tokens"],
        "layers": layers,
        "measured": {"wall_seconds": 1234.5, "peak_memory_bytes": 1181116006},
        "output": {"sha256": OUTPUT},
    }
    return {**value, **changes}


def report(**changes: Any) -> ValidationResult:
    """Two texts, three tasks, two lengths, gates that pass."""
    base = make_result(
        Interval(0.0837, 0.0744, 0.0941), Interval(1.0687, 1.0573, 1.0796), Interval(0.8467, 0.8319, 0.8609)
    )
    first = dataclasses.replace(
        base.texts[0],
        dataset="/home/somebody/secret/wiki.test.raw",
        perplexity=PerplexityPair(22.754, 24.317, 1.0687, 16369),
        windows=13,
        window_tokens=1259,
        stride_tokens=1259,
        tokens=16369,
    )
    second = dataclasses.replace(
        first, dataset="hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text", stride_tokens=631, verdict=NO_LOSS
    )
    values: dict[str, Any] = {
        "baseline": "/home/somebody/secret/Qwen2-tiny",
        "quantized": "/home/somebody/secret/artifact",
        "baseline_bytes": 988097824,
        "quantized_bytes": 457402112,
        "baseline_sha256": SOURCE_SHA256,
        "quantized_sha256": ARTIFACT_SHA256,
        "texts": (first, second),
        "tasks": (
            task("mmlu", 0.5393, 0.5261, 5),
            task("gsm8k", 0.4117, 0.4019, 8),
            task("ceval-valid", 0.5427, 0.5471, 0),
        ),
        "smoke": (
            SmokeCase("a", "en", "?", "!", 3, True, "", ()),
            SmokeCase("b", "zh", "?", "!", 3, True, "", ("bad",)),
        ),
        "gates": (GateOutcome("max_kl on /home/somebody/secret/wiki.test.raw", 0.1021, 0.0941, True),),
        "warnings": ("a text is shorter than 32 windows",),
    }
    return dataclasses.replace(base, **{**values, **changes})


def task(name: str, baseline: float, quantized: float, shots: int) -> TaskResult:
    """A task with an interval of 1.9 points around its change."""
    change = quantized - baseline
    interval = Interval(change, change - 0.0193, change + 0.0187)
    return TaskResult(name, "acc", shots, 1319 + shots, baseline, quantized, interval, 61, 40, 0.0412, 0.165, NO_LOSS)


def profile() -> ProfileResult:
    """The published protocol and a sweep over two caches, for source and artifact, and a model of somebody else."""
    cells = (Cell(1, 2048), Cell(1, 8192), Cell(2048, 1))
    sweep = tuple(Cell(1, 1024, rows, cache) for cache in ("bf16", "int8") for rows in (1, 16))
    rows = []
    for index, model in enumerate(("source", "artifact", "stranger")):
        for k, cell in enumerate((*cells, *sweep)):
            oom = cell.batch_size == 16 and cell.kv_cache == "bf16" and model == "source"
            rows.append(_measurement(model, cell, 29.37 + 13 * index + k / 7, oom=oom))
    models = (
        ModelFacts("source", "/home/somebody/secret/Qwen2-tiny", "16-bit", 988097824, SOURCE_SHA256),
        ModelFacts("artifact", "/home/somebody/secret/artifact", "gptq 4 bit", 457402112, ARTIFACT_SHA256),
        ModelFacts("stranger", "x", "gptq 4 bit", 457402112, "ee" * 32),
    )
    device = ("cuda", "NVIDIA A100", 0, 1.5e12)
    return ProfileResult(models, tuple(rows), (), (), *device, ProfileConfig(), (), {"torch": "2.13.0"}, 61.0)


def _measurement(model: str, cell: Cell, rate: float, *, oom: bool) -> Measurement:
    if oom:
        return Measurement(model, cell, "dense", OOM, "out of memory", 0, None, None, None)
    spread = Spread(rate, rate - 0.31, rate + 0.43, 3)
    speed = Speed(spread, spread, spread, 0.03, 0.04, None, None, "none", ())
    peak = int(2**30 * (rate / 3.1 + cell.batch_size))
    memory = Memory(peak, peak, 0, peak, 0, 0, None, False)
    tokens = cell.new_tokens - 5 if cell.new_tokens == 8192 else cell.new_tokens
    return Measurement(model, cell, "marlin", MEASURED, "", tokens, speed, memory, None)


def make_card_folder(
    folder: Path, *, with_report: ValidationResult | None = None, with_profile: bool = True, **changes: Any
) -> Path:
    """An artifact folder with manifest, licence, and evidence (no report where `with_report` is None)."""
    source = make_checkpoint(
        folder.parent / f"{folder.name}-source", intermediate_size=256, max_position_embeddings=512
    )
    make_artifact(source, folder)
    (folder / "LICENSE").write_text("Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date: August 3, 2023\n")
    (folder / "qwen-quant.json").write_text(json.dumps(manifest(folder, **changes)))
    if with_report is not None:
        (folder / "report.json").write_text(report_text(with_report), encoding="utf-8")
    if with_profile:
        write_profile(profile(), folder / "profile.json")
    return folder
