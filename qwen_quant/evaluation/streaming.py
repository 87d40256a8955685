"""Final hidden states and logits of a model that is never in memory as a whole.

Everything is computed and held in FP32, also where the hardware would multiply BF16: the noise of BF16 arithmetic alone
is a KL divergence of about 1e-3 (0.0009 measured on a 135M model) and would be mistaken for quantization error.  16-bit
weights are cast to FP32 as they are used; quantized ones are dequantized in FP32, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from qwen_quant.activations import ActivationStore
from qwen_quant.block_solver import batch_rows, embed
from qwen_quant.errors import InputError
from qwen_quant.evaluation.cached import cache_context
from qwen_quant.experts import SPARSE_BATCH_BYTES
from qwen_quant.models.skeleton import Skeleton, dense_weights, ordinary_linears
from qwen_quant.runtime.loading import WeightSource

HEAD_TILE_BYTES = 64 << 20


def _spans(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@torch.no_grad()
def final_hidden(
    source: WeightSource,
    skeleton: Skeleton,
    windows: Tensor,
    on_block: Callable[[], None],
    *,
    kv_cache: str = "",
) -> ActivationStore:
    """Hidden states in front of the final norm, FP32 [windows, tokens, hidden], reading one block at a time.

    Args:
        source: the model's weights.
        skeleton: of the same ModelSpec, with dtype FP32.
        windows: int64 [windows, tokens].
        on_block: called after every block.
        kv_cache: keys and values as a cache of this kind gives them back (`cached.py`); "": as they are, in FP32.

    Errors: InputError when a hidden state is not finite, with the block named.
    """
    rows, tokens = windows.shape
    store = ActivationStore((rows, tokens, source.spec.stream_width), dtype=torch.float32)
    embed(source.reader, source.spec.family.embedding + ".weight", windows, [store])
    step = _step(source, tokens)
    caches = cache_context(source.spec, skeleton.model, kv_cache)
    for layer in range(source.spec.num_layers):
        block = skeleton.block(layer, source.dense, source.reader.gather_rows)
        with dense_weights(block, ordinary_linears(block), torch.float32):
            for span in _spans(rows, step):
                context = skeleton.context(layer, tokens, windows[span[0] : span[1]])
                out = block(store.load(*span).to(skeleton.device), **{**context, **caches.get(layer, {})})
                out = out[0] if isinstance(out, tuple) else out
                if not bool(torch.isfinite(out).all()):
                    raise InputError(f"{source.folder}: the hidden states after block {layer} are not finite")
                store.save(span[0], out)
        del block
        on_block()
    return store


def _step(source: WeightSource, tokens: int) -> int:
    """Rows per batch: few, but with experts, which become dense once a batch, so many that each sees some tokens."""
    spec = source.spec
    if spec.expert_count:
        return max(1, SPARSE_BATCH_BYTES // (4 * tokens * spec.stream_width))
    return batch_rows(tokens, int(spec.text_config.get("intermediate_size") or spec.hidden_size))


class Head:
    """Final norm and output head of one model.

    Args:
        source, skeleton: as in `final_hidden`.
        shared: another model's head weight, used instead of our own copy where the two are equal.
    """

    def __init__(self, source: WeightSource, skeleton: Skeleton, shared: Tensor | None = None) -> None:
        self.norm = skeleton.final_norm(source.dense)
        weight = source.dense(skeleton.head_name())
        same = shared is not None and shared.dtype == weight.dtype and torch.equal(shared.cpu(), weight)
        self.weight = shared if shared is not None and same else weight.to(skeleton.device)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """FP32 [n, hidden] -> FP32 [n, vocabulary]; the weight is cast in tiles of HEAD_TILE_BYTES."""
        normed = self.norm(hidden.to(self.weight.device))
        vocabulary, width = self.weight.shape
        result = torch.empty(normed.shape[0], vocabulary, device=normed.device)
        for start, stop in _spans(vocabulary, max(1, HEAD_TILE_BYTES // (4 * width))):
            result[:, start:stop] = functional.linear(normed, self.weight[start:stop].float())
        return result
