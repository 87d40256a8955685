"""How far a quantized model is from its baseline: both on the same windows of every text, then smoke prompts.

`validate_pair` reads two folders and gives a ValidationResult.  A killed run continues: what each round measured lies
in a work folder beside the report, together with what was asked for.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.checkpoint.manifest import versions
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import InputError
from qwen_quant.evaluation.cached import cache_notes
from qwen_quant.evaluation.pair import PairScorer, score_sets
from qwen_quant.evaluation.perplexity import WindowSet, windows_of
from qwen_quant.evaluation.smoke import smoke_cases
from qwen_quant.evaluation.summary import length_row, scored_bytes, text_result
from qwen_quant.evaluation.texts import EvaluationText, read_texts
from qwen_quant.preparation import resolve_device
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import ValidationConfig
from qwen_quant.results import LengthRow, SmokeCase, TextResult, ValidationResult
from qwen_quant.resume import differences, write_json_atomically
from qwen_quant.runtime.loading import WeightSource
from qwen_quant.tokenizer import Tokenizer, load_tokenizer

RUN_FILE = "run.json"
_MUST_AGREE = ("vocab_size", "hidden_size", "num_hidden_layers")
_SAME_FUNCTION = ({"qwen", "qwen2"},)  # what `convert` re-labels


@dataclass(frozen=True)
class _Parts:
    """Window sets in the order they are scored: first one a text, then one a context length of the first text."""

    texts: list[EvaluationText]
    text_sets: list[WindowSet]
    length_sets: list[WindowSet]
    byte_counts: list[int]
    warnings: tuple[str, ...]


def _check_pair(baseline: WeightSource, quantized: WeightSource) -> None:
    """Both are the same architecture and vocabulary (InputError naming the first difference)."""
    types = [str(source.spec.config.get("model_type")) for source in (baseline, quantized)]
    alike = len(set(types)) == 1 or set(types) in _SAME_FUNCTION
    for key in _MUST_AGREE if alike else ("model_type", *_MUST_AGREE):
        left, right = ({**s.spec.text_config, **s.spec.config}.get(key) for s in (baseline, quantized))
        if left != right:
            raise InputError(
                f"{baseline.folder} and {quantized.folder} cannot be compared",
                f"{key} is {left!r} and {right!r}",
                "give the checkpoint that the quantized one was made from",
            )


def _common_ids(tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> list[int]:
    """Token ids of `text`, which both tokenizers must give (InputError at the first difference)."""
    left, right = (tokenizer.encode(text) for tokenizer in tokenizers)
    if left != right:
        pairs = zip(left, right, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
        raise InputError(
            f"the tokenizers of {tokenizers[0].folder} and {tokenizers[1].folder} differ",
            f"token {place} of the evaluation text is not the same",
            "put the baseline's own tokenizer files into the quantized folder",
        )
    return left


def _check_window(config: ValidationConfig, source: WeightSource) -> None:
    limit = source.spec.trained_length
    if limit is not None and config.window_tokens > limit:
        raise InputError(
            f"a window of {config.window_tokens} tokens is longer than {source.folder} was made for",
            f"its config.json says {limit}",
            f"use --window {limit} or less; --long-context measures beyond it on purpose",
        )


def _parts(config: ValidationConfig, sources: tuple[WeightSource, WeightSource]) -> _Parts:
    """Read every text, check both tokenizers on it and cut the windows."""
    tokenizers = (load_tokenizer(sources[0].folder), load_tokenizer(sources[1].folder))
    texts = read_texts(config.texts, config.joining)
    text_sets, byte_counts, ids = [], [], []
    for text in texts:
        ids.append(_common_ids(tokenizers, text.text))
        windows = windows_of(ids[-1], config.window_tokens, config.max_windows, config.stride)
        text_sets.append(windows)
        byte_counts.append(scored_bytes(windows, tokenizers[0].decode))
    lengths, warnings = _length_sets(config, ids[0], sources[0].spec.trained_length)
    return _Parts(texts, text_sets, lengths, byte_counts, warnings)


def _length_sets(
    config: ValidationConfig, ids: list[int], limit: int | None
) -> tuple[list[WindowSet], tuple[str, ...]]:
    """One set of disjoint windows a length, all over the same tokens where the text allows it."""
    possible = [n for n in config.lengths if n <= len(ids)]
    warnings = [f"the text has {len(ids)} tokens: no row for {n}" for n in config.lengths if n > len(ids)]
    longest = max(possible, default=0)
    shared = len(ids) // longest * longest if longest else 0
    if config.max_windows is not None and longest:
        shared = min(shared, config.max_windows * longest)
    beyond = [str(n) for n in possible if limit is not None and n > limit]
    if beyond:
        warnings.append(f"{', '.join(beyond)} tokens are beyond the {limit} that the model was made for")
    return [windows_of(ids[:shared], n, None) for n in possible], tuple(warnings)


def _identity(sources: tuple[WeightSource, WeightSource], config: ValidationConfig, parts: _Parts) -> dict[str, Any]:
    """What decides the scores: a run that was killed is continued only if all of it is the same."""
    files = {}
    for role, source in zip(("baseline", "quantized"), sources, strict=True):
        stats = [(path.name, path.stat()) for path in source.reader.files]
        files[role] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}
    settings = dataclasses.asdict(config)
    for irrelevant in ("resume", "smoke", "seed"):
        del settings[irrelevant]
    return {"files": files, "settings": settings, "texts": [text.sha256 for text in parts.texts]}


def open_work(work: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make the work folder, or check that it belongs to the same comparison (InputError with the difference)."""
    path = work / RUN_FILE
    clean = json.loads(json.dumps(identity))
    if path.is_file() and resume:
        earlier = _read_json(path)
        if earlier != clean:
            raise InputError(
                f"{work} holds an unfinished validation with other settings",
                "; ".join(differences(earlier, clean)),
                "repeat the earlier command to finish it, or add --no-resume to start over",
            )
        return
    try:
        if path.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {work.parent}", str(error), "give another folder: --report DIR") from error
    write_json_atomically(path, clean)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged", str(error), "start over with --no-resume") from error
    return value if isinstance(value, dict) else {}


def _kind_warnings(sources: tuple[WeightSource, WeightSource], kv_cache: str) -> tuple[str, ...]:
    same = sources[0].folder.resolve() == sources[1].folder.resolve()
    if kv_cache and same:  # the cache is what is compared, and any weights will do
        return cache_notes(kv_cache)
    warnings = list(cache_notes(kv_cache))
    if sources[0].is_quantized:
        warnings.append(f"the baseline {sources[0].folder} is itself quantized ({sources[0].kind})")
    if not sources[1].is_quantized:
        warnings.append(f"{sources[1].folder} is not quantized ({sources[1].kind})")
    return tuple(warnings)


def _scored(
    scorer: PairScorer, parts: _Parts, config: ValidationConfig, work: Path | None, progress: ProgressFn
) -> tuple[tuple[TextResult, ...], tuple[LengthRow, ...]]:
    scores = score_sets(scorer, parts.text_sets + parts.length_sets, work, progress)
    texts = [
        text_result(text, windows, score, byte_count=count, seed=config.seed)
        for text, windows, score, count in zip(parts.texts, parts.text_sets, scores, parts.byte_counts, strict=False)
    ]
    rows = [
        length_row(windows, score)
        for windows, score in zip(parts.length_sets, scores[len(parts.text_sets) :], strict=True)
    ]
    return tuple(texts), tuple(rows)


def validate_pair(
    baseline: Path, quantized: Path, config: ValidationConfig, progress: ProgressFn, *, work: Path | None = None
) -> ValidationResult:
    """Compare two folders, each 16-bit, GPTQ or bitsandbytes; gates and tasks are left empty.

    A quantized model that fails a smoke prompt is not measured further: its texts are empty.

    Args:
        baseline, quantized: checkpoint folders.
        config: texts, windows, lengths.
        progress: stages and their steps.
        work: folder that keeps finished rounds, for resuming; None keeps nothing.

    Returns:
        seconds is wall time, peak_memory_bytes the largest resident set of this process so far. Errors: InputError for
        folders that are no checkpoints or do not belong together, tokenizers that differ, a text that is missing, not
        UTF-8 or shorter than one window, a window longer than the model, and states that are not finite.
    """
    started = time.perf_counter()
    sources = (WeightSource(baseline), WeightSource(quantized))
    _check_pair(*sources)
    _check_window(config, sources[0])
    parts, device = _parts(config, sources), resolve_device(config.device)
    if work is not None:
        open_work(work, _identity(sources, config, parts), resume=config.resume)
    smoke: tuple[SmokeCase, ...] = (
        smoke_cases(*sources, device, progress, kv_cache=config.kv_cache) if config.smoke else ()
    )
    warnings = _kind_warnings(sources, config.kv_cache) + parts.warnings
    if not config.smoke:
        warnings += ("the smoke prompts were not run",)
    texts: tuple[TextResult, ...] = ()
    rows: tuple[LengthRow, ...] = ()
    if any(case.failures for case in smoke):
        warnings += ("nothing was measured: a smoke prompt failed (--no-smoke measures all the same)",)
    else:
        texts, rows = _scored(PairScorer(sources, device, kv_cache=config.kv_cache), parts, config, work, progress)
    hashes = {folder: weights_sha256(folder) for folder in {baseline, quantized}}
    return ValidationResult(
        baseline=str(baseline),
        quantized=str(quantized),
        baseline_kind=sources[0].kind,
        quantized_kind=sources[1].kind,
        baseline_bytes=sources[0].nbytes,
        quantized_bytes=sources[1].nbytes,
        baseline_sha256=hashes[baseline],
        quantized_sha256=hashes[quantized],
        kv_cache=config.kv_cache,
        texts=texts,
        by_length=rows,
        tasks=(),
        smoke=smoke,
        gates=(),
        override_reason="",
        warnings=warnings,
        seed=config.seed,
        versions={**versions(), "torch": torch.__version__},
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_rss_bytes(),
    )
