"""Tables read by rows, and the join of several residual streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader, TensorInfo
from qwen_quant.memory import _largest_block
from qwen_quant.models.hyper import ShardedLookup
from qwen_quant.models.skeleton import Skeleton
from tests.support.moe import make_family_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_checkpoint(tmp_path_factory.mktemp("hyper") / "in", "qwen4_exp_text")


@pytest.mark.parametrize(("rows", "parts"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_a_table_in_parts_is_the_whole_table(rows: int, parts: int) -> None:
    whole, lookup = nn.Embedding(rows, 3), ShardedLookup(rows, 3, parts)
    chunks = whole.weight.detach().chunk(parts)
    assert [part.weight.shape for part in lookup.children()] == [chunk.shape for chunk in chunks]
    for part, chunk in zip(lookup.children(), chunks, strict=True):
        part.weight.data.copy_(chunk)
    indices = torch.randint(0, rows, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(lookup(indices), whole(indices))


def test_a_streamed_block_reads_rows_and_never_a_table(source: Path) -> None:
    reader, spec = CheckpointReader(source), read_model_spec(source)
    skeleton, ids = Skeleton(spec, CPU, torch.float32), torch.randint(0, 256, (2, 20))
    asked = []

    def fetch(name: str) -> torch.Tensor:
        assert not spec.is_table(name), name
        return reader.read(name)

    def rows(name: str, indices: torch.Tensor) -> torch.Tensor:
        assert spec.is_table(name)
        asked.append(indices.numel())
        return reader.gather_rows(name, indices)

    stream = torch.randn(2, 20, spec.stream_width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        by_rows = skeleton.block(1, fetch, rows)(stream, **skeleton.context(1, 20, ids))
        whole = skeleton.block(1, reader.read)(stream, **skeleton.context(1, 20, ids))
        other = skeleton.block(1, reader.read)(stream, **skeleton.context(1, 20, ids.flip(1)))
    assert sum(asked) == ids.numel() * 4, "four hashed n-grams a token"
    assert torch.equal(by_rows, whole) and not torch.allclose(whole, other)


def test_tables_are_no_part_of_a_blocks_memory(source: Path) -> None:
    reader, spec = CheckpointReader(source), read_model_spec(source)
    tables = [name for name in reader.names if spec.is_table(name)]
    block = [name for name in reader.names if name.startswith("model.layers.1.") and name not in tables]
    assert len(tables) == 4 and _largest_block(spec, reader) == sum(reader.info(name).nbytes for name in block)


def test_few_rows_are_read_one_by_one(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, name = CheckpointReader(source), "model.embed_tokens.weight"
    ids = torch.tensor([[3, 250], [3, 7]])
    expected = reader.gather_rows(name, ids)
    monkeypatch.setattr("qwen_quant.checkpoint.reader._SEEK_BYTES", 1)
    read = CheckpointReader._read_bytes
    sizes: list[int] = []

    def counted(self: CheckpointReader, info: TensorInfo, start: int, count: int) -> torch.Tensor:
        sizes.append(count)
        return read(self, info, start, count)

    monkeypatch.setattr(CheckpointReader, "_read_bytes", counted)
    assert torch.equal(reader.gather_rows(name, ids), expected) and sizes == [256, 256, 256]
