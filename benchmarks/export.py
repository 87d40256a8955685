#!/usr/bin/env python3
"""Speed and peak memory of `qwen-quant export` beside a plain copy of the same folder, on a random 14B-shaped artifact.

Every figure comes from a fresh process, after the source's pages are dropped from the cache; both sides end with the
bytes on the disk (fsync).  "write" is what a copy does: reading the source and writing the output; "verify" reads both
back and compares every value; "total" has the sha256 of source and output in it too.

    python benchmarks/export.py --work /tmp/export-bench --tokenizer FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import SHAPES  # noqa: E402
from run import cpu_name  # noqa: E402

from qwen_quant.checkpoint.families import model_spec  # noqa: E402
from qwen_quant.checkpoint.manifest import write_configs  # noqa: E402
from qwen_quant.checkpoint.writer import PlannedTensor, PlannedWriter, plan_shards  # noqa: E402
from qwen_quant.models.skeleton import expected_tensors, meta_model  # noqa: E402
from qwen_quant.packing import packed_specs  # noqa: E402
from qwen_quant.recipe import GPTQConfig  # noqa: E402

HERE = Path(__file__).resolve().parent
SHARD_BYTES = 1_000_000_000
FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf")
RUN = """
import json, sys
from pathlib import Path
from qwen_quant.process import tune_process
tune_process()
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.source import ExportSource
from qwen_quant.recipe import RunConfig
def peak_rss_bytes():  # of this program: getrusage would count the parent's memory at the fork
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
source, out, name, shard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
ExportSource(source)
start = peak_rss_bytes()
run = RunConfig(max_shard_size_bytes=shard, force=True, resume=False)
done = export_artifact(ExportJob(source, out, name, run=run), lambda *a: None)
print(json.dumps({"write_seconds": done.write_seconds, "verify_seconds": done.verify_seconds, "seconds": done.seconds,
                  "start_bytes": start, "peak_bytes": peak_rss_bytes(), "output_bytes": done.output_bytes,
                  "exact": done.exact, "weights": done.proof.weights}))
"""


def write_artifact(folder: Path, blocks: int, tokenizer: Path) -> None:
    """A random symmetric GPTQ folder, group_size 128, of 14B-shaped blocks with a small vocabulary."""
    folder.mkdir(parents=True)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = Qwen2Config(**SHAPES["14B"], vocab_size=vocabulary, num_hidden_layers=blocks, tie_word_embeddings=False)
    spec, settings = model_spec(config.to_dict(), str(folder)), GPTQConfig()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    write_configs(folder, spec, settings)
    linears, planned = set(spec.linear_names()), []
    for name, shape in expected_tensors(meta_model(spec)).items():
        base = name.removesuffix(".weight")
        if base in linears:
            specs = packed_specs(shape[1], shape[0], settings.bits, settings.group_size)
            planned += [PlannedTensor(f"{base}.{suffix}", *value) for suffix, value in specs.items()]
        else:
            planned.append(PlannedTensor(name, torch.bfloat16, shape))
    generator = torch.Generator().manual_seed(0)
    writer = PlannedWriter(folder, plan_shards(planned, SHARD_BYTES))
    for tensor in planned:
        writer.write(tensor.name, random_tensor(tensor, generator))
    writer.finish()


def random_tensor(tensor: PlannedTensor, generator: torch.Generator) -> torch.Tensor:
    """Values that the tensor's name asks for: codes of any kind, zeros of 8, positive scales, consecutive groups."""
    kind = tensor.name.rpartition(".")[2]
    if kind == "qweight":
        return torch.randint(-(2**31), 2**31, tensor.shape, generator=generator, dtype=torch.int64).to(torch.int32)
    if kind == "qzeros":
        return torch.full(tensor.shape, 0x77777777, dtype=torch.int32)
    if kind == "g_idx":
        return torch.arange(tensor.shape[0], dtype=torch.int32) // 128
    values = torch.rand(tensor.shape, generator=generator) * 0.01 + 0.001
    return values.to(tensor.dtype)


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the pages of a folder's files."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy_seconds(source: Path, out: Path) -> float:
    """Seconds of copying every file and syncing it."""
    drop_cache(source)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.perf_counter()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        handle = os.open(out / path.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def export_once(source: Path, out: Path, name: str) -> dict[str, Any]:
    """One export in a fresh process."""
    drop_cache(source)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", RUN, str(source), str(out), name, str(SHARD_BYTES)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(out)
    return result


def measure(source: Path, work: Path, repeats: int, formats: list[str]) -> dict[str, Any]:
    """Copy and every format, `repeats` times in turn."""
    copies: list[float] = []
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in formats}
    for _ in range(repeats):
        copies.append(copy_seconds(source, work / "copy"))
        for name in formats:
            runs[name].append(export_once(source, work / "out", name))
    return {"copy_seconds": copies, "formats": runs}


def table(result: dict[str, Any]) -> str:
    """Markdown; speeds relative to the copy are by bytes written plus read, medians over the repeats."""
    copy, size = statistics.median(result["copy_seconds"]), result["source_bytes"]
    lines = [
        f"Copy of {size / 1e9:.2f} GB: {copy:.2f} s. Largest tensor {result['largest_tensor_bytes'] / 2**30:.2f} GiB, "
        f"shards of {SHARD_BYTES / 1e9:.0f} GB. {result['machine']}, {result['threads']} thread(s).",
        "",
        "| format | written | write | speed against the copy | verify | total | peak memory | of it imports |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in result["formats"].items():
        write, check, total = (
            statistics.median(run[key] for run in runs) for key in ("write_seconds", "verify_seconds", "seconds")
        )
        written = runs[0]["output_bytes"]
        relative = (size + written) / write / (2 * size / copy)
        peak, start = (max(run[key] for run in runs) for key in ("peak_bytes", "start_bytes"))
        lines.append(
            f"| {name} | {written / 1e9:.2f} GB | {write:.2f} s | {relative:.0%} | {check:.2f} s | {total:.2f} s | "
            f"{peak / 2**30:.2f} GiB | {start / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the artifact, measure, write benchmarks/results/export.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with config.json and tokenizer.json")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "export", help="without .json and .md")
    arguments = parser.parse_args()
    source = arguments.work / "14B-Int4"
    if not source.exists():
        write_artifact(source, arguments.blocks, arguments.tokenizer)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    embedding = expected_embedding_bytes(source)
    formats = arguments.formats.split(",")
    result = measure(source, arguments.work, arguments.repeats, formats)
    result |= {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "blocks": arguments.blocks,
        "source_bytes": sum(sizes),
        "largest_tensor_bytes": embedding,
    }
    out = arguments.out
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


def expected_embedding_bytes(source: Path) -> int:
    """Bytes of the largest tensor of the artifact, by its headers."""
    from qwen_quant.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(source)
    return max(reader.info(name).nbytes for name in reader.names)


if __name__ == "__main__":
    main()
