"""How far a quantized model is from its baseline: both stream over the same windows, then their logits are compared."""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen_quant.activations import ActivationStore
from qwen_quant.data import bundled_path
from qwen_quant.environment import peak_rss_bytes
from qwen_quant.errors import InputError
from qwen_quant.evaluation.divergence import summarize, token_divergence
from qwen_quant.evaluation.perplexity import perplexity_pair, token_losses, windows_of
from qwen_quant.evaluation.streaming import Head, final_hidden
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.preparation import resolve_device
from qwen_quant.progress import ProgressFn
from qwen_quant.recipe import ValidationConfig
from qwen_quant.results import ValidationResult
from qwen_quant.runtime.loading import WeightSource
from qwen_quant.tokenizer import load_tokenizer

BUNDLED_TEXT = "demo_eval.txt"
CHUNK_POSITIONS = 256
_MUST_AGREE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class TokenScores:
    """What was measured at each position.

    Attributes:
        kl: FP64 [windows * tokens], nats.
        same_top1: bool [windows * tokens].
        baseline_losses, quantized_losses: FP64 [windows * (tokens - 1)], -ln p of the next token.
    """

    kl: Tensor
    same_top1: Tensor
    baseline_losses: Tensor
    quantized_losses: Tensor


def _read_text(config: ValidationConfig) -> tuple[str, str, str]:
    """(text, name, sha256 of the file's bytes). Errors: InputError when it is missing, empty or not UTF-8."""
    path = bundled_path(BUNDLED_TEXT) if config.text is None else config.text
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the evaluation text {path} cannot be read", str(error), "give a UTF-8 text file") from error
    if not text.strip():
        raise InputError(f"the evaluation text {path} is empty", next_step="give a file with text")
    return text, f"bundled:{BUNDLED_TEXT}" if config.text is None else str(path), hashlib.sha256(data).hexdigest()


def _check_pair(baseline: WeightSource, quantized: WeightSource) -> None:
    """Both are the same architecture and vocabulary (InputError naming the first difference)."""
    for key in _MUST_AGREE:
        left, right = baseline.spec.config.get(key), quantized.spec.config.get(key)
        if left != right:
            raise InputError(
                f"{baseline.folder} and {quantized.folder} cannot be compared",
                f"{key} is {left!r} and {right!r}",
                "give the checkpoint that the quantized one was made from",
            )


def _common_ids(baseline: Path, quantized: Path, text: str) -> list[int]:
    """Token ids of `text`, which both tokenizers must give (InputError at the first difference)."""
    left, right = load_tokenizer(baseline).encode(text), load_tokenizer(quantized).encode(text)
    if left != right:
        pairs = zip(left, right, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
        raise InputError(
            f"the tokenizers of {baseline} and {quantized} differ",
            f"token {place} of the evaluation text is not the same",
            "put the baseline's own tokenizer files into the quantized folder",
        )
    return left


def _compare_window(heads: tuple[Head, Head], hidden: tuple[Tensor, Tensor], targets: Tensor) -> TokenScores:
    """Scores of one window: hidden FP32 [tokens, width] of both, targets int64 [tokens - 1]."""
    kl: list[Tensor] = []
    same: list[Tensor] = []
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, hidden[0].shape[0], CHUNK_POSITIONS):
        stop = start + CHUNK_POSITIONS
        left, right = (head.logits(h[start:stop]) for head, h in zip(heads, hidden, strict=True))
        same.append((left.argmax(1) == right.argmax(1)).cpu())
        left, right = torch.log_softmax(left, 1), torch.log_softmax(right, 1)
        scored = targets[start:stop].to(left.device)
        for values, log_probs in zip(losses, (left, right), strict=True):
            values.append(token_losses(log_probs[: scored.shape[0]], scored).cpu())
        kl.append(token_divergence(left, right).cpu())
        del left, right
    return TokenScores(torch.cat(kl), torch.cat(same), torch.cat(losses[0]), torch.cat(losses[1]))


@torch.no_grad()
def compare_states(
    heads: tuple[Head, Head], stores: tuple[ActivationStore, ActivationStore], windows: Tensor, progress: ProgressFn
) -> TokenScores:
    """Run both heads over the stored final states, CHUNK_POSITIONS positions of logits at a time."""
    parts = []
    for row in range(windows.shape[0]):
        progress("comparing logits", row, windows.shape[0])
        hidden = (stores[0].load(row, row + 1)[0], stores[1].load(row, row + 1)[0])
        parts.append(_compare_window(heads, hidden, windows[row, 1:]))
    progress("comparing logits", windows.shape[0], windows.shape[0])
    return TokenScores(
        torch.cat([p.kl for p in parts]),
        torch.cat([p.same_top1 for p in parts]),
        torch.cat([p.baseline_losses for p in parts]),
        torch.cat([p.quantized_losses for p in parts]),
    )


def score_pair(
    sources: tuple[WeightSource, WeightSource], windows: Tensor, device: torch.device, progress: ProgressFn
) -> TokenScores:
    """Scores of every position of `windows` (int64 [windows, tokens]) under (baseline, quantized)."""
    skeletons = [Skeleton(source.spec, device, torch.float32) for source in sources]
    with tempfile.TemporaryDirectory(prefix="qwen-quant-eval-") as spill:
        stores: list[ActivationStore] = []
        try:
            for k, (source, skeleton) in enumerate(zip(sources, skeletons, strict=True)):
                stores.append(final_hidden(source, skeleton, windows, Path(spill) / f"hidden-{k}.bin", progress))
            first = Head(sources[0], skeletons[0])
            second = Head(sources[1], skeletons[1], first.weight)
            return compare_states((first, second), (stores[0], stores[1]), windows, progress)
        finally:
            for store in stores:
                store.close()


def validate_pair(baseline: Path, quantized: Path, config: ValidationConfig, progress: ProgressFn) -> ValidationResult:
    """Perplexity of both models, KL(baseline || quantized) and top-1 agreement on one text.

    Either folder may be 16-bit or GPTQ. Windows are cut as `perplexity.py` says; perplexity scores window_tokens - 1
    tokens of each, divergence and agreement all window_tokens positions. seconds is wall time, peak_memory_bytes the
    largest resident set of this process so far.

    Errors: InputError for folders that are no checkpoints or do not belong together, tokenizers that differ, a text
    that is missing, not UTF-8 or shorter than one window, and states that are not finite.
    """
    started = time.perf_counter()
    sources = (WeightSource(baseline), WeightSource(quantized))
    _check_pair(*sources)
    text, name, digest = _read_text(config)
    windows = windows_of(_common_ids(baseline, quantized, text), config.window_tokens, config.max_windows)
    scores = score_pair(sources, windows, resolve_device(config.device), progress)
    return ValidationResult(
        baseline=str(baseline),
        quantized=str(quantized),
        dataset=name,
        dataset_sha256=digest,
        window_tokens=config.window_tokens,
        windows=windows.shape[0],
        perplexity=perplexity_pair(scores.baseline_losses, scores.quantized_losses),
        divergence=summarize(scores.kl, scores.same_top1),
        baseline_bytes=sources[0].nbytes,
        quantized_bytes=sources[1].nbytes,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_rss_bytes(),
    )
