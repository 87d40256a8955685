"""What qwen4_exp has and no family before it: several residual streams, an indexer, and tables of n-grams.

Hyper-connections. Between blocks a token is `hc_count` hidden states side by side. In front of each half a gated
residual module mixes them into the one that the half reads, and says how much of the half's output each gets:

    mixed, stream, weights = gated(stream);   stream + weights[k] * output in stream k

`add_halves` gives a block these two steps as modules, so that everyone who works half by half finds an input in the
place of a norm (`MixedInput`) and a join in the place of a sum (`Joined`).

Tables. The embeddings of hashed n-grams are about 95 GiB, stored as `split_ngram_parts` matrices under names of their
own (shard_0.weight and so on). `ShardedLookup` holds them under these names and reads single rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

RowFetch = Callable[[str, Tensor], Tensor]
_GATED = "_hyper_connection"


class MixedInput(nn.Module):
    """What a half reads: [..., streams * hidden] -> [..., hidden]."""

    def __init__(self, gated: nn.Module) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, stream: Tensor) -> Tensor:
        """The streams, normalized, gated and averaged."""
        mixed: Tensor = self.gated(stream)[0]
        return mixed


class Joined(nn.Module):
    """The streams after a half: each has its share of the half's output."""

    def __init__(self, gated: nn.Module) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, stream: Tensor, output: Tensor) -> Tensor:
        """Streams [..., streams * hidden] in front of the half and its output [..., hidden] -> the new streams."""
        _, before, weights = self.gated(stream)
        result: Tensor = before + (output.unsqueeze(-2) * weights.unsqueeze(-1)).flatten(-2)
        return result


class _EveryRow(nn.Module):
    """An indexer for rows that share one mask and one set of positions: it goes through both row by row."""

    def __init__(self, indexer: nn.Module) -> None:
        super().__init__()
        self.indexer = indexer

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor, past: Any
    ) -> Tensor:
        """bool [rows, 1, tokens, keys]: what each token's attention sees."""
        rows = hidden_states.shape[0]
        positions = tuple(part.expand(rows, -1, -1) for part in position_embeddings)
        mask = attention_mask.expand(rows, -1, -1, -1)
        seen: Tensor = self.indexer(hidden_states, positions, mask, past)
        return seen


class _StoredRows(nn.Module):
    """One part of a table, in its file."""

    weight: Tensor

    def __init__(self, name: str, read: RowFetch, place: tuple[torch.device, torch.dtype]) -> None:
        super().__init__()
        self.name, self.read, self.place = name, read, place
        self.register_buffer("weight", torch.empty(0), persistent=False)  # transformers asks where it lies

    def forward(self, indices: Tensor) -> Tensor:
        """Rows `indices` [n] -> [n, width]."""
        return self.read(self.name, indices.cpu()).to(*self.place)


class ShardedLookup(nn.Module):
    """An embedding [rows, width] stored as `parts` matrices of equally many rows (the last may have fewer)."""

    def __init__(self, rows: int, width: int, parts: int) -> None:
        super().__init__()
        self.part_rows = math.ceil(rows / parts)
        for k, start in enumerate(range(0, rows, self.part_rows)):
            self.add_module(f"shard_{k}", nn.Embedding(min(self.part_rows, rows - start), width))

    @property
    def weight(self) -> Tensor:
        """The first part, which tells transformers where the table lies."""
        first: Tensor = self.get_submodule("shard_0").weight  # type: ignore[assignment]
        return first

    def read_rows(self, name: str, read: RowFetch, place: tuple[torch.device, torch.dtype]) -> None:
        """Leave the table in its files: parts `name`.shard_0 and so on are read by `read`, rows go to `place`."""
        for key, _ in list(self.named_children()):
            setattr(self, key, _StoredRows(f"{name}.{key}.weight", read, place))

    def forward(self, indices: Tensor) -> Tensor:
        """Rows `indices` (int64, any shape) -> [*indices.shape, width]."""
        flat = indices.flatten()
        order = torch.argsort(flat)
        counts = torch.bincount(flat // self.part_rows, minlength=len(self._modules)).tolist()
        found = [
            part(chosen - k * self.part_rows)
            for k, (part, chosen) in enumerate(zip(self.children(), flat[order].split(counts), strict=True))
            if chosen.numel()
        ]
        rows = torch.cat(found)
        return rows[torch.argsort(order)].view(*indices.shape, -1)


def separate_tables(model: PreTrainedModel) -> None:
    """Give a model on the meta device its n-gram tables by their parts, and the constants of their hash, in place."""
    for name, module in list(model.named_modules()):
        table = getattr(module, "ngram_embedding", None)
        if isinstance(table, nn.Embedding):
            parts = model.config.get_text_config().split_ngram_parts
            with torch.device("meta"):
                lookup = ShardedLookup(table.num_embeddings, table.embedding_dim, parts)
            model.set_submodule(f"{name}.ngram_embedding", lookup)
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
            model._init_weights(module)


def add_halves(block: nn.Module) -> None:
    """Give a block with hyper-connections, its parameters in place, the modules that the family's row names."""
    for name, gated in list(block.named_children()):
        if name.endswith(_GATED):
            half = name.removesuffix(_GATED)
            block.add_module(f"{half}_input", MixedInput(gated))
            block.add_module(f"{half}_join", Joined(gated))
    for name, module in list(block.named_modules()):
        indexer = getattr(module, "indexer", None)
        if isinstance(indexer, nn.Module):
            block.set_submodule(f"{name}.indexer", _EveryRow(indexer))
