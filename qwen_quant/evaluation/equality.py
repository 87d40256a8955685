"""Whether two folders are the same model: their logits on a few tokens, beside the noise of FP32 arithmetic.

Both run through the streaming evaluation (`streaming.py`), in FP32.  The noise is measured, not assumed: the second
model runs once more with its products in FP64, and the largest change of a logit is what FP32 rounding does to this
model on these tokens.  Two folders of one model that differ only in how the products are cut differ by no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qwen_quant.errors import AuditError
from qwen_quant.evaluation.streaming import HEAD_TILE_BYTES, Head, final_hidden
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.runtime.loading import WeightSource

NOISE_FACTOR = 10.0
RELATIVE_FLOOR = (
    2e-5  # of the largest logit, about 170 FP32 roundings: tiny models have almost no noise to compare with
)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LogitsEquality:
    """Logits of two folders on the same tokens.

    Attributes:
        tokens: positions compared, over the whole vocabulary.
        largest_difference: of one logit between the two.
        fp32_noise: largest change of a logit when the second model's products are done in FP64.
        largest_logit: by magnitude.
        tolerance: what `largest_difference` had to stay below: NOISE_FACTOR * fp32_noise, and at least RELATIVE_FLOOR *
            largest_logit.
        same_top_token: positions where both prefer the same token.
    """

    tokens: int
    largest_difference: float
    fp32_noise: float
    largest_logit: float
    tolerance: float
    same_top_token: int


def sample_ids(vocabulary: int, tokens: int) -> Tensor:
    """Fixed token ids, int64 [1, tokens], spread over the vocabulary."""
    generator = torch.Generator().manual_seed(1729)
    return torch.randint(0, vocabulary, (1, tokens), generator=generator)


@torch.no_grad()
def require_equal_logits(
    first: WeightSource, second: WeightSource, ids: Tensor, on_block: Callable[[], None]
) -> LogitsEquality:
    """Compare two folders of the same model, one block in memory at a time.

    Args:
        first, second: with the same vocabulary.
        ids: int64 [1, tokens].
        on_block: called after every block, three times num_layers in all.

    Errors: AuditError when the logits differ by more than the tolerance.
    """
    left, right = _single_logits(first, ids, on_block), _single_logits(second, ids, on_block)
    noise = float((_double_logits(second, ids, on_block) - right).abs().max())
    largest = float(left.abs().max())
    result = LogitsEquality(
        tokens=ids.shape[1],
        largest_difference=float((left - right).abs().max()),
        fp32_noise=noise,
        largest_logit=largest,
        tolerance=max(NOISE_FACTOR * noise, RELATIVE_FLOOR * largest),
        same_top_token=int((left.argmax(1) == right.argmax(1)).sum()),
    )
    if not result.largest_difference <= result.tolerance:
        raise AuditError(
            f"{first.folder} and {second.folder} are not the same model",
            f"a logit differs by {result.largest_difference:.3g}, FP32 rounding explains {result.fp32_noise:.3g}",
        )
    return result


def _single_logits(source: WeightSource, ids: Tensor, on_block: Callable[[], None]) -> Tensor:
    """FP32 [tokens, vocabulary] through the evaluation that `validate` uses."""
    skeleton = Skeleton(source.spec, _CPU, torch.float32)
    hidden = final_hidden(source, skeleton, ids, on_block).load(0, 1)
    return Head(source, skeleton).logits(hidden[0])


def _double_logits(source: WeightSource, ids: Tensor, on_block: Callable[[], None]) -> Tensor:
    """FP64 [tokens, vocabulary]: every product and the residual stream in FP64 (transformers' norms stay FP32)."""
    skeleton = Skeleton(source.spec, _CPU, torch.float64)
    hidden = source.reader.gather_rows(source.spec.family.embedding + ".weight", ids).double()
    for layer in range(source.spec.num_layers):
        out = skeleton.block(layer, source.dense)(hidden, **skeleton.context(layer, ids.shape[1]))
        hidden = out[0] if isinstance(out, tuple) else out
        on_block()
    normed = skeleton.final_norm(source.dense)(hidden[0])
    weight = source.dense(skeleton.head_name())
    rows = max(1, HEAD_TILE_BYTES // (8 * weight.shape[1]))
    tiles = [functional.linear(normed, tile.double()) for tile in weight.split(rows)]
    return torch.cat(tiles, dim=1)
