"""Each layout against a slow numpy reader and against golden words written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_quant.export.awq import qweight_of, stream_of, to_awq, transpose_nibbles_, zeros_of
from qwen_quant.export.compressed_tensors import to_compressed
from qwen_quant.export.pivot import LinearGrid, PackedRows, dequantized, pack_codes, unpack_codes
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight
from tests.export.making import read_awq, read_compressed


def random_weight(out: int, inputs: int, bits: int = 4, group: int = 32, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (out, inputs // group), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out, inputs // group, generator=generator) - 0.3).half()
    return QuantizedWeight(codes, scales, zeros, torch.arange(inputs, dtype=torch.int32) // group)


def packed(weight: QuantizedWeight, bits: int = 4) -> PackedRows:
    return PackedRows(pack_codes(weight.codes, bits), bits, LinearGrid(weight.scales, weight.zeros, weight.g_idx))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stream_is_qweight_transposed(bits: int) -> None:
    weight = random_weight(32, 96, bits)
    stream = pack_codes(weight.codes, bits)
    assert torch.equal(stream.view(torch.int32).mT, pack_weight(weight, bits, "gptq")["qweight"])
    assert torch.equal(unpack_codes(stream, bits), weight.codes)


def test_the_stream_of_4_bits_has_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x87]]


def test_transposing_nibbles() -> None:
    values = torch.randint(-(2**31), 2**31, (8, 5), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    before = values.numpy() & 0xFFFFFFFF
    after = transpose_nibbles_(values.to(torch.int32).contiguous()).numpy().astype(np.int64) & 0xFFFFFFFF
    for j in range(8):
        for k in range(8):
            assert ((after[j] >> 4 * k & 15) == (before[k] >> 4 * j & 15)).all()


def test_golden_words_of_awq() -> None:
    """One word holds outputs 0 2 4 6 1 3 5 7 of one column, from the low end."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 8)
    weight = QuantizedWeight(codes, torch.ones(8, 1).half(), codes[:, :1], torch.zeros(8, dtype=torch.int32))
    tensors = to_awq(packed(weight))
    assert tensors["qweight"].tolist() == [[0x75316420]] * 8
    assert tensors["qzeros"].tolist() == [[0x75316420]]
    assert tensors["scales"].shape == (1, 8)


def test_golden_words_of_compressed_tensors() -> None:
    """Codes and zeros low end first: along the inputs and along the outputs."""
    codes = torch.arange(8, dtype=torch.uint8)[None].repeat(8, 1)
    zeros = torch.arange(8, dtype=torch.uint8)[:, None]
    weight = QuantizedWeight(codes, torch.ones(8, 1).half(), zeros, torch.zeros(8, dtype=torch.int32))
    tensors = to_compressed(packed(weight), sym=False)
    assert tensors["weight_packed"].tolist() == [[0x76543210]] * 8
    assert tensors["weight_zero_point"].tolist() == [[0x76543210]]
    assert tensors["weight_shape"].tolist() == [8, 8]
    assert "weight_zero_point" not in to_compressed(packed(weight), sym=True)


@pytest.mark.parametrize(("out", "inputs"), [(8, 32), (40, 96), (264, 64), (24, 4096)])
def test_awq_against_the_slow_reader_and_back(out: int, inputs: int) -> None:
    weight = random_weight(out, inputs)
    tensors = to_awq(packed(weight))
    slow = read_awq({f"x.{suffix}": tensor for suffix, tensor in tensors.items()}, "x")
    assert np.array_equal(slow, weight.dequantized().numpy())
    assert torch.equal(stream_of(tensors["qweight"]), packed(weight).stream)
    assert torch.equal(qweight_of(packed(weight).stream), tensors["qweight"])
    assert torch.equal(zeros_of(tensors["qzeros"]), weight.zeros)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out", [32, 36])  # 36 leaves the last word of the zeros short
def test_compressed_tensors_against_the_slow_reader(bits: int, out: int) -> None:
    weight = random_weight(out, 64, bits)
    tensors = to_compressed(packed(weight, bits), sym=False)
    slow = read_compressed({f"x.{suffix}": tensor for suffix, tensor in tensors.items()}, "x", bits)
    assert np.array_equal(slow, weight.dequantized().numpy())


@pytest.mark.parametrize("scattered", [False, True])
def test_fast_dequantizing_gives_the_same_numbers(scattered: bool) -> None:
    weight = random_weight(24, 128)
    if scattered:
        index = weight.g_idx[torch.randperm(128, generator=torch.Generator().manual_seed(2))]
        weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros, index)
    assert torch.equal(dequantized(weight), weight.dequantized())
