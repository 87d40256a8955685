"""packing.py: bit-exact against files made by GPTQModel, an obvious slow oracle, and round trips."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwen_quant.errors import InputError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.packing import pack_weight, packed_specs, unpack_weight

GOLDEN = Path(__file__).parent / "golden" / "gptqmodel_packing.safetensors"
FORMATS = ("gptq", "gptq_v2")


def golden_cases() -> list[str]:
    return sorted({name.split("/")[0] for name in load_file(GOLDEN) if name.endswith("/dequantized")})


def make(out_features: int, in_features: int, bits: int, group_size: int, seed: int = 0) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    return QuantizedWeight(
        torch.randint(0, 2**bits, (out_features, in_features), generator=rng).to(torch.uint8),
        torch.rand(out_features, groups, generator=rng).half(),
        torch.randint(0, 2**bits, (out_features, groups), generator=rng).to(torch.uint8),
        (torch.arange(in_features) // size).to(torch.int32),
    )


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """The slow oracle: one big integer, cut into signed 32-bit words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype, name


@pytest.mark.parametrize("case", golden_cases())
def test_bit_exact_with_gptqmodel(case: str) -> None:
    golden = load_file(GOLDEN)
    bits = int(case[1])
    g_idx = golden[f"{case}/g_idx"]
    shared = f"b{bits}_in{len(g_idx)}"
    weight = QuantizedWeight(golden[f"{shared}/codes"], golden[f"{case}/scales"], golden[f"{case}/zeros"], g_idx)
    for checkpoint_format, suffix in (("gptq", "v1"), ("gptq_v2", "v2")):
        packed = pack_weight(weight, bits, checkpoint_format)
        assert torch.equal(packed["qweight"], golden[f"{shared}/qweight"])
        assert torch.equal(packed["qzeros"], golden[f"{case}/qzeros_{suffix}"])
        assert torch.equal(packed["scales"], golden[f"{case}/scales"].mT)
        assert torch.equal(packed["g_idx"], g_idx)
        back = unpack_weight(packed, bits, checkpoint_format)
        same(back, weight)
        assert torch.equal(back.dequantized().mT.half(), golden[f"{case}/dequantized"])  # it multiplies in FP16


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    units=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    group_size=st.sampled_from((-1, 32, 64, 128)),
    checkpoint_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_round_trip_and_oracle(bits, units, group_size, checkpoint_format, seed) -> None:
    multiple = 32 if bits == 3 else 32 // bits
    weight = make(units[1] * multiple, units[0] * multiple, bits, group_size, seed)
    packed = pack_weight(weight, bits, checkpoint_format)
    specs = packed_specs(weight.codes.shape[1], weight.codes.shape[0], bits, group_size)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == specs
    assert all(t.is_contiguous() for t in packed.values())
    same(unpack_weight(packed, bits, checkpoint_format), weight)
    assert packed["qweight"][:, 0].tolist() == bit_stream(weight.codes[0].tolist(), bits)
    shift = 1 if checkpoint_format == "gptq" else 0
    stored = [(int(z) - shift) % 2**bits for z in weight.zeros[:, 0]]
    assert packed["qzeros"][0].tolist() == bit_stream(stored, bits)


def test_short_last_group() -> None:
    weight = make(64, 576, 4, 128)
    assert packed_specs(576, 64, 4, 128)["scales"][1] == (5, 64)
    same(unpack_weight(pack_weight(weight, 4, "gptq"), 4, "gptq"), weight)


@pytest.mark.parametrize(("bits", "multiple"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_sizes_that_do_not_fill_words_are_refused(bits: int, multiple: int) -> None:
    assert packed_specs(3 * multiple, multiple, bits, 32)["qweight"][1][1] == multiple
    for sizes in ((multiple + 1, multiple), (multiple, multiple + 2)):
        with pytest.raises(InputError, match=f"multiple of {multiple}"):
            packed_specs(*sizes, bits, 32)
        with pytest.raises(InputError, match="whole 32-bit words"):
            pack_weight(make(sizes[1], sizes[0], bits, 32), bits, "gptq")


def test_several_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(96, 64, 3, 32)
    whole = pack_weight(weight, 3, "gptq")
    monkeypatch.setattr("qwen_quant.packing._CHUNK_CODES", 64 * 7)
    parts = pack_weight(weight, 3, "gptq")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    same(unpack_weight(whole, 3, "gptq"), weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_large_layer_is_fast(bits: int) -> None:
    weight = make(4096, 11008, bits, 128)
    started = time.perf_counter()
    packed = pack_weight(weight, bits, "gptq")
    middle = time.perf_counter()
    unpack_weight(packed, bits, "gptq")
    seconds = (middle - started, time.perf_counter() - middle)
    print(f"{bits} bits: pack {seconds[0]:.3f} s, unpack {seconds[1]:.3f} s")
    assert max(seconds) < 10  # about 0.2 s on two quiet AVX2 cores; the bound only catches a loop over codes
