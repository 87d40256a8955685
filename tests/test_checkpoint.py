"""Reader, writer, resume state and activation store: bytes in, the same bytes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_quant.activations import ActivationStore
from qwen_quant.checkpoint import reader as reader_module
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.checkpoint.writer import PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.errors import AuditError, InputError
from qwen_quant.resume import WorkFolder, differences

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@given(
    specs=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=8),
    limit=st.integers(1, 600),
)
@settings(max_examples=40, deadline=None)
def test_written_files_are_what_safetensors_reads(
    specs: list, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    tensors = {f"t{k}": tensor_of(d, tuple(s), k) for k, (d, s) in enumerate(specs)}
    shards = plan_shards([PlannedTensor(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], limit)
    writer = PlannedWriter(folder, shards)
    for name in reversed(list(tensors)):
        writer.write(name, tensors[name])
    writer.finish()
    for shard in shards:
        data = sum(t.nbytes for t in shard.tensors)
        assert data <= limit or len(shard.tensors) == 1
        assert (folder / shard.file_name).stat().st_size == shard.nbytes
        with safe_open(folder / shard.file_name, framework="pt") as file:
            for tensor in shard.tensors:
                assert torch.equal(file.get_tensor(tensor.name), tensors[tensor.name])
    ours = CheckpointReader(folder)
    assert set(ours.names) == set(tensors)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())


def test_an_unwritten_or_changed_tensor_is_an_audit_error(tmp_path: Path) -> None:
    shards = plan_shards([PlannedTensor("a", torch.float32, (2,)), PlannedTensor("b", torch.float32, (3,))], 100)
    writer = PlannedWriter(tmp_path, shards)
    with pytest.raises(AuditError, match="'a' is torch.float32"):
        writer.write("a", torch.zeros(5))
    writer.write("a", torch.zeros(2))
    with pytest.raises(AuditError, match="never written, first 'b'"):
        writer.finish()


def test_writing_again_after_a_stop_gives_the_same_bytes(tmp_path: Path) -> None:
    shards = plan_shards([PlannedTensor("a", torch.float32, (64,)), PlannedTensor("b", torch.int32, (64,))], 10**6)
    values = {"a": torch.randn(64), "b": torch.arange(64, dtype=torch.int32)}
    for folder, stops in ((tmp_path / "once", 0), (tmp_path / "twice", 1)):
        folder.mkdir()
        for _ in range(stops):
            first = PlannedWriter(folder, shards)
            first.write("a", torch.ones(64))
            first.close()
        writer = PlannedWriter(folder, shards)
        for name, value in values.items():
            writer.write(name, value)
        writer.finish()
    once, twice = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("once", "twice"))
    assert once == twice


def test_gather_rows_and_parts_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 6).bfloat16()
    save_file({"m": matrix}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reader_module, "_PART_BYTES", 40)
    reader = CheckpointReader(tmp_path)
    ids = torch.tensor([[49, 0, 7], [7, 7, 12]])
    assert torch.equal(reader.gather_rows("m", ids), matrix[ids])
    assert torch.equal(torch.cat([part for _, part in reader.parts("m")]).view(50, 6), matrix)
    with pytest.raises(InputError, match="token id 50 is outside the 50 rows"):
        reader.gather_rows("m", torch.tensor([50]))


def test_index_that_disagrees_with_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(InputError, match="the index places 'b' in x.safetensors"):
        CheckpointReader(tmp_path)
    for text in ("[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            CheckpointReader(tmp_path)


@pytest.mark.parametrize("in_file", [False, True])
def test_activation_store(in_file: bool, tmp_path: Path) -> None:
    store = ActivationStore((5, 3, 4), tmp_path / "states.bin" if in_file else None)
    values = torch.randn(5, 3, 4)
    store.save(2, values[2:])
    store.save(0, values[:2])
    assert torch.equal(store.load(1, 4), values[1:4].bfloat16())
    store.dump(tmp_path / "states.bin")
    again = ActivationStore((5, 3, 4), tmp_path / "states.bin" if in_file else None)
    again.restore(tmp_path / "states.bin")
    assert torch.equal(again.load(0, 5), values.bfloat16())
    assert (tmp_path / "states.bin").stat().st_size == store.nbytes == 120


def test_a_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    """2 TiB with a hole for its values: a writable map of it would be refused."""
    size = 2 << 40
    header = json.dumps({"a": {"dtype": "BF16", "shape": [size // 4, 2], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    found = CheckpointReader(tmp_path).gather_rows("a", torch.tensor([5, size // 8]))
    assert found.shape == (2, 2) and not found.any()


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    """A second one is refused, whether it would continue or start over; an ended process holds nothing."""
    code = (
        "import sys; from pathlib import Path; from qwen_quant.resume import WorkFolder\n"
        "work = WorkFolder(Path(sys.argv[1])); work.open({}, resume=True); (work.state / 'mine').touch()\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    command, out = [sys.executable, "-c", code, str(tmp_path / "out")], tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        for resume in (True, False):
            with pytest.raises(InputError, match="another run is writing"):
                WorkFolder(out).open({}, resume=resume)
        with pytest.raises(InputError, match="another run is writing"):
            WorkFolder(out).create()
        assert (WorkFolder(out).state / "mine").exists()
        other.kill()
    assert WorkFolder(out).open({}, resume=True)["blocks_done"] == 0


def test_work_folder_names_every_difference(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    assert work.open({"a": {"b": 1, "c": 2}}, resume=True)["blocks_done"] == 0
    with pytest.raises(InputError, match="a.b was 1, is now 5"):
        work.open({"a": {"b": 5, "c": 2}}, resume=True)
    work.commit({"blocks_done": 3, "layers": []})
    assert work.open({"a": {"b": 1, "c": 2}}, resume=True)["blocks_done"] == 3
    assert work.open({"a": {"b": 5, "c": 2}}, resume=False)["blocks_done"] == 0
    (work.state / "progress.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        work.open({"a": {"b": 5, "c": 2}}, resume=True)
    assert differences({"x": 1}, {"y": 2}) == ["x was 1, is now None", "y was None, is now 2"]
