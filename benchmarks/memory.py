#!/usr/bin/env python3
"""Peak memory of `gptq` on 7B-shaped blocks, run for real, and `plan`'s figures for the shapes of a 14B and a 72B.

The 7B-shaped checkpoint is random (hidden 4096, MLP 11008, `--blocks` blocks); the larger two are sparse files of the
right shapes, which cost no disk.  Every figure comes from a fresh process.

    python benchmarks/memory.py --work /tmp/memory-bench --tokenizer FOLDER [--moe]

With `--moe` the shapes are those of Qwen3-30B-A3B and Qwen3-235B-A22B instead: one block of the first (128 experts) is
run for real, both whole models are predicted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from qwen_quant.checkpoint.families import model_spec
from qwen_quant.checkpoint.writer import PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.models.skeleton import expected_tensors, meta_model

HERE = Path(__file__).resolve().parent
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 8},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8},
}
LAYERS = {"14B": 48, "72B": 80, "30B-A3B": 48, "235B-A22B": 94}
SPARSE = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "num_key_value_heads": 4}
A3B = {
    **SPARSE,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "intermediate_size": 6144,
}
A22B = {**SPARSE, "hidden_size": 4096, "moe_intermediate_size": 1536, "num_attention_heads": 64}
MOE_SHAPES = {"30B-A3B block": A3B, "30B-A3B": A3B, "235B-A22B": {**A22B, "intermediate_size": 12288}}
REAL = ("7B", "30B-A3B block")
RUN = """
import json, sys
from pathlib import Path
from qwen_quant.process import tune_process
tune_process()
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.plan import bound_bytes
from qwen_quant.preparation import QuantizeJob, prepare
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.sequential import quantize_checkpoint
model, samples, length, asymmetric, run = Path(sys.argv[1]), *map(int, sys.argv[2:6])
job = QuantizeJob(model, model.parent / "out", GPTQConfig(asymmetric_calibration=bool(asymmetric)),
                  CalibrationConfig("bundled", samples, length), RunConfig(device="cpu", force=True), "synthetic")
start = peak_rss_bytes()
ready = prepare(job, writing=False)
need, bound = ready.footprint, bound_bytes(ready)
result = {"interpreter_bytes": start, "bound_bytes": bound,
          "predicted_bytes": need.peak_memory_bytes - need.interpreter_bytes,
          "hidden_state_bytes": need.hidden_state_bytes, "output_bytes": need.output_bytes, "tokens": samples * length}
if run:
    del ready
    done = quantize_checkpoint(job, lambda *a: None)
    result |= {"measured_bytes": peak_rss_bytes() - start, "seconds": done.seconds,
               "relative_error": done.layers[-1].relative_error, "rounding_error": done.layers[-1].rounding_error}
print(json.dumps(result))
"""


def write_checkpoint(folder: Path, shape: dict[str, int], layers: int, *, random: bool, tokenizer: Path) -> None:
    """A checkpoint of the given shape: random BF16 weights, or sparse files full of zeros."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {**shape, "vocab_size": 152064, "num_hidden_layers": layers, "tie_word_embeddings": False}
    config: PretrainedConfig = Qwen3MoeConfig(**sizes) if "num_experts" in shape else Qwen2Config(**sizes)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    shapes = expected_tensors(meta_model(model_spec(config.to_dict(), str(folder))))
    tensors = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    shards = plan_shards(tensors, 4_000_000_000)
    if not random:
        for shard in shards:
            with open(folder / shard.file_name, "wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)
        weight_map = {t.name: shard.file_name for shard in shards for t in shard.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return
    writer = PlannedWriter(folder, shards)
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:
        if len(tensor.shape) == 1:
            value = torch.zeros(tensor.shape) if tensor.name.endswith("bias") else torch.ones(tensor.shape)
        else:
            value = torch.empty(tensor.shape).normal_(0, 0.02, generator=generator)
        writer.write(tensor.name, value.bfloat16())
    writer.finish()


def measure(model: Path, samples: int, length: int, *, asymmetric: bool, run: bool) -> dict[str, Any]:
    """Plan, and when `run` quantize, in a fresh process."""
    arguments = [str(model), str(samples), str(length), str(int(asymmetric)), str(int(run))]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, GiB."""
    lines = [
        "| shape | asymmetric | tokens | bound | predicted | measured | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        gib = [
            f"{r[key] / 2**30:.2f}" if key in r else "-" for key in ("bound_bytes", "predicted_bytes", "measured_bytes")
        ]
        seconds = f"{r['seconds']:.0f}" if "seconds" in r else "-"
        lines.append(f"| {r['shape']} | {r['asymmetric']} | {r['tokens']} | {' | '.join(gib)} | {seconds} |")
    return "\n".join(lines) + "\n\nGiB above the interpreter's own memory; the bound is that of the README.\n"


def main() -> None:
    """Run all shapes, write benchmarks/results/memory.{json,md}, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder whose tokenizer the checkpoints get")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="run the default settings only; the others are predicted")
    parser.add_argument("--moe", action="store_true", help="the shapes with routed experts")
    arguments = parser.parse_args()
    rows = []
    for shape, sizes in (MOE_SHAPES if arguments.moe else SHAPES).items():
        real = shape in REAL
        model = arguments.work / shape.replace(" ", "-")
        layers = arguments.blocks if real else LAYERS[shape]
        write_checkpoint(model, sizes, layers, random=real, tokenizer=arguments.tokenizer)
        for asymmetric in (True, False):
            samples, length = (arguments.samples, arguments.seq_len) if real else (128, 2048)
            run = real and (asymmetric or not arguments.quick)
            row = measure(model, samples, length, asymmetric=asymmetric, run=run)
            rows.append({"shape": shape, "asymmetric": "yes" if asymmetric else "no", **row})
            print(json.dumps(rows[-1]), file=sys.stderr)
        shutil.rmtree(model)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    name = "memory_moe" if arguments.moe else "memory"
    (results / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (results / f"{name}.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
