"""Final hidden states and logits of a model that is never in memory as a whole.

Everything is computed and held in FP32, also where the hardware would multiply BF16: the noise of BF16 arithmetic alone
is a KL divergence of about 1e-3 (0.0009 measured on a 135M model) and would be mistaken for quantization error.  16-bit
weights are cast to FP32 as they are used; quantized ones are dequantized in FP32, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qwen_quant.activations import RAM_LIMIT_BYTES, ActivationStore
from qwen_quant.block_solver import batch_rows, embed
from qwen_quant.errors import InputError
from qwen_quant.models.skeleton import Skeleton
from qwen_quant.progress import ProgressFn
from qwen_quant.runtime.loading import WeightSource

HEAD_TILE_BYTES = 64 << 20


def _new_store(shape: tuple[int, int, int], spill: Path) -> ActivationStore:
    """An FP32 store, in the folder `spill` when it is larger than a quarter of the limit for memory, or in memory."""
    nbytes = shape[0] * shape[1] * shape[2] * 4
    return ActivationStore(shape, None if nbytes <= RAM_LIMIT_BYTES // 4 else spill, torch.float32)


def _spans(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@torch.no_grad()
def final_hidden(
    source: WeightSource, skeleton: Skeleton, windows: Tensor, spill: Path, progress: ProgressFn
) -> ActivationStore:
    """Hidden states in front of the final norm, FP32 [windows, tokens, hidden], reading one block at a time.

    Args:
        source: the model's weights.
        skeleton: of the same ModelSpec, with dtype FP32.
        windows: int64 [windows, tokens].
        spill: a file to hold the states where they are too large for memory.
        progress: called after every block.

    Errors: InputError when a hidden state is not finite, with the block named.
    """
    rows, tokens = windows.shape
    store = _new_store((rows, tokens, source.spec.hidden_size), spill)
    embed(source.reader, source.spec.family.embedding + ".weight", windows, [store])
    layers = source.spec.num_layers
    step = batch_rows(tokens, int(source.spec.config.get("intermediate_size") or source.spec.hidden_size))
    for layer in range(layers):
        progress(f"evaluating {source.folder.name}", layer, layers)
        block, context = skeleton.block(layer, source.dense), skeleton.context(layer, tokens)
        for span in _spans(rows, step):
            out = block(store.load(*span).to(skeleton.device), **context)
            out = out[0] if isinstance(out, tuple) else out
            if not bool(torch.isfinite(out).all()):
                raise InputError(f"{source.folder}: the hidden states after block {layer} are not finite")
            store.save(span[0], out)
        del block
    progress(f"evaluating {source.folder.name}", layers, layers)
    return store


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
