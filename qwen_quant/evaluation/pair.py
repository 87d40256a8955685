"""Two models over the same windows, and what is measured at each position.

Windows go in rounds of about ROUND_TOKENS tokens.  In a round each model streams once, block by block, and keeps the
hidden states in front of its head; then both heads are compared CHUNK_POSITIONS positions at a time, so that memory
grows neither with the text nor with vocabulary times tokens.  What a round measured is durable before the next begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_quant.evaluation.divergence import token_divergence
from qwen_quant.evaluation.perplexity import WindowSet, token_losses
from qwen_quant.evaluation.streaming import Head, final_hidden
from qwen_quant.kv_cache import PLAIN
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.progress import ProgressFn
from qwen_quant.runtime.loading import WeightSource

ROUND_TOKENS = 16384
CHUNK_POSITIONS = 256
PROGRESS_LABEL = "comparing the models"


@dataclass(frozen=True)
class TokenScores:
    """What was measured at each position.

    Attributes:
        kl: FP64 [windows, tokens], nats.
        same_top1: bool [windows, tokens].
        baseline_losses, quantized_losses: FP64 [windows, tokens - 1], -ln p of the next token of the window.
    """

    kl: Tensor
    same_top1: Tensor
    baseline_losses: Tensor
    quantized_losses: Tensor


@dataclass(frozen=True)
class Round:
    """Windows [start, stop) of window set number `part`."""

    part: int
    start: int
    stop: int


def rounds_of(sets: list[WindowSet]) -> list[Round]:
    """The sets cut into rounds of at most ROUND_TOKENS tokens, or one window."""
    rounds = []
    for part, windows in enumerate(sets):
        count, step = windows.ids.shape[0], max(1, ROUND_TOKENS // windows.window_tokens)
        rounds += [Round(part, start, min(start + step, count)) for start in range(0, count, step)]
    return rounds


class PairScorer:
    """Both models, ready to score windows.

    Args:
        sources: (baseline, quantized) weights.
        device: where blocks and heads are computed.
        kv_cache: the quantized side's keys and values pass through a cache of this kind ("int8", "qwen", "bf16") and
            the baseline's through the plain one; "": neither's do.
    """

    def __init__(self, sources: tuple[WeightSource, WeightSource], device: torch.device, *, kv_cache: str = "") -> None:
        self.sources = sources
        self.kv_caches = (PLAIN if kv_cache else "", kv_cache)
        self.skeletons = [Skeleton(source.spec, device, torch.float32) for source in sources]
        self._heads: tuple[Head, Head] | None = None

    def heads(self) -> tuple[Head, Head]:
        """Both heads; equal weights are held once."""
        if self._heads is None:
            first = Head(self.sources[0], self.skeletons[0])
            self._heads = (first, Head(self.sources[1], self.skeletons[1], first.weight))
        return self._heads

    @torch.no_grad()
    def score(self, windows: Tensor, step: Callable[[], None]) -> TokenScores:
        """Scores of int64 [windows, tokens]; `step` is called after every block of either model and every window."""
        stores = [
            final_hidden(source, skeleton, windows, step, kv_cache=kind)
            for source, skeleton, kind in zip(self.sources, self.skeletons, self.kv_caches, strict=True)
        ]
        parts = []
        for row in range(windows.shape[0]):
            hidden = (stores[0].load(row, row + 1)[0], stores[1].load(row, row + 1)[0])
            parts.append(_compare_window(self.heads(), hidden, windows[row, 1:]))
            step()
        return TokenScores(*(torch.stack(values) for values in zip(*parts, strict=True)))

    def steps(self, windows: int) -> int:
        """How often `score` calls its step for so many windows."""
        return sum(source.spec.num_layers for source in self.sources) + windows


def _compare_window(
    heads: tuple[Head, Head], hidden: tuple[Tensor, Tensor], targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of TokenScores for one window: hidden FP32 [tokens, width] of both, targets int64 [tokens - 1]."""
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
    return torch.cat(kl), torch.cat(same), torch.cat(losses[0]), torch.cat(losses[1])


def _round_file(work: Path, item: Round) -> Path:
    return work / f"part{item.part}-windows{item.start}-{item.stop}.safetensors"


def _load(path: Path) -> TokenScores:
    tensors = load_file(path)
    return TokenScores(
        tensors["kl"], tensors["same_top1"].bool(), tensors["baseline_losses"], tensors["quantized_losses"]
    )


def _save(path: Path, scores: TokenScores) -> None:
    """Write beside `path`, then rename, so that a file that exists is whole."""
    partial = path.with_suffix(".partial")
    tensors = {name: getattr(scores, name).contiguous() for name in ("kl", "baseline_losses", "quantized_losses")}
    save_file({**tensors, "same_top1": scores.same_top1.to(torch.uint8)}, partial)
    os.replace(partial, path)


def score_sets(scorer: PairScorer, sets: list[WindowSet], work: Path | None, progress: ProgressFn) -> list[TokenScores]:
    """Scores of every window set, one TokenScores each; rounds found in the folder `work` are not repeated."""
    rounds = rounds_of(sets)
    total = sum(scorer.steps(item.stop - item.start) for item in rounds)
    done, parts = 0, [[] for _ in sets]  # type: int, list[list[TokenScores]]
    for item in rounds:
        path = None if work is None else _round_file(work, item)
        if path is not None and path.is_file():
            scores = _load(path)
        else:
            position = [done]

            def step(position: list[int] = position) -> None:
                position[0] += 1
                progress(PROGRESS_LABEL, position[0], total)

            scores = scorer.score(sets[item.part].ids[item.start : item.stop], step)
            if path is not None:
                _save(path, scores)
        done += scorer.steps(item.stop - item.start)
        parts[item.part].append(scores)
    progress(PROGRESS_LABEL, total, total)
    fields = ("kl", "same_top1", "baseline_losses", "quantized_losses")
    return [TokenScores(*(torch.cat([getattr(s, name) for s in part]) for name in fields)) for part in parts]
