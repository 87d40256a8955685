#!/usr/bin/env python3
"""Make tests/golden/gptqmodel_packing.safetensors with GPTQModel's own packing and dequantization code.

Runs inside the peer environment (``scripts/make_peer_venv.sh``); imports nothing from ``qwen_quant``, so the file is
an outside witness for ``packing.py``. Names, shapes and dtypes are in tests/golden/README.md.

    VENV/bin/python scripts/make_golden_packing.py tests/golden/gptqmodel_packing.safetensors
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  (the two settings above must precede gptqmodel, and it imports torch)

if TYPE_CHECKING:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

OUT_FEATURES = 32
SEED = 20240607


@dataclass(frozen=True)
class Case:
    """One packed layer: group_size -1 means one group over all inputs."""

    bits: int
    group_size: int
    sym: bool
    act_order: bool

    @property
    def in_features(self) -> int:
        """64 inputs, 128 where a group of 64 needs a second group."""
        return 128 if self.group_size == 64 else 64

    @property
    def columns(self) -> int:
        """Inputs per group."""
        return self.in_features if self.group_size == -1 else self.group_size

    @property
    def name(self) -> str:
        """Prefix of this case's tensors."""
        order = "act" if self.act_order else "natural"
        return f"b{self.bits}_g{self.group_size}_{'sym' if self.sym else 'asym'}_{order}"

    @property
    def shared_name(self) -> str:
        """Prefix of the tensors that depend on bits and in_features only."""
        return f"b{self.bits}_in{self.in_features}"


def all_cases() -> list[Case]:
    """Every combination, less two: act-order of one group is no order, and sym act-order is kept at group 32 only."""
    grid = itertools.product((2, 3, 4, 8), (32, 64, -1), (True, False), (False, True))
    cases = [Case(*row) for row in grid]
    return [c for c in cases if not (c.act_order and (c.group_size == -1 or (c.group_size == 64 and c.sym)))]


def draw_codes(case: Case) -> torch.Tensor:
    """Return codes uint8 (out, in): every value occurs, both ends included, the same for one bits and in_features."""
    generator = torch.Generator().manual_seed(SEED + 1000 * case.bits + case.in_features)
    codes = torch.randint(0, 2**case.bits, (OUT_FEATURES, case.in_features), generator=generator)
    codes[0], codes[1] = 2**case.bits - 1, 0
    return codes.to(torch.uint8)


def draw_grid(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales fp16 (out, groups), zeros uint8 (out, groups) in 1..2^bits-1 and g_idx int32 (in,)."""
    generator = torch.Generator().manual_seed(SEED + sum(map(ord, case.name)))
    groups = case.in_features // case.columns
    scales = (torch.rand((OUT_FEATURES, groups), generator=generator) * 0.09 + 0.01).half()
    zeros = torch.randint(1, 2**case.bits, (OUT_FEATURES, groups), generator=generator)
    if case.sym:
        zeros.fill_(2 ** (case.bits - 1))
    g_idx = torch.arange(case.in_features) // case.columns
    if case.act_order:
        g_idx = g_idx[torch.randperm(case.in_features, generator=generator)]
    return scales, zeros.to(torch.uint8), g_idx.to(torch.int32)


def pack(case: Case, weight: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> TorchLinear:
    """Pack weight (out, in) with GPTQModel's plain torch layer; the result holds the gptq_v2 convention."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    scales, zeros, g_idx = grid
    layer = TorchLinear(
        bits=case.bits,
        group_size=case.group_size,
        sym=case.sym,
        desc_act=case.act_order,
        in_features=case.in_features,
        out_features=OUT_FEATURES,
        bias=False,
    )
    linear = torch.nn.Linear(case.in_features, OUT_FEATURES, bias=False)
    linear.weight.data.copy_(weight)
    layer.pack_original(linear, scales.float(), zeros.float(), g_idx)
    slow = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros")}
    layer.pack_block(linear, scales.float(), zeros.float(), g_idx)
    for name, tensor in slow.items():
        assert torch.equal(getattr(layer, name), tensor), f"{case.name}: GPTQModel's two packers disagree on {name}"
    layer.qzero_format(format=2)
    return layer


def zero_minus_one(layer: TorchLinear, case: Case) -> torch.Tensor:
    """Return qzeros of the gptq (v1) convention by GPTQModel's converter; the layer itself stays v2."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    true_zeros = layer.qzeros.clone()
    config = QuantizeConfig(bits=case.bits, group_size=case.group_size, sym=case.sym, offload_to_disk=False)
    convert_gptq_v2_to_v1_format_module(layer, config)
    stored = layer.qzeros.clone()
    convert_gptq_v1_to_v2_format_module(layer, bits=case.bits, pack_dtype=torch.int32)
    assert torch.equal(layer.qzeros, true_zeros), f"{case.name}: v2 -> v1 -> v2 is not the identity"
    return stored


def read_bitstream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words along dim 0 read as one little-endian bit stream: an independent check, in Python integers."""
    rows, columns = words.shape
    result = torch.empty((rows * 32 // bits, columns), dtype=torch.int64)
    for column in range(columns):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * row) for row, word in enumerate(words[:, column]))
        for index in range(result.shape[0]):
            result[index, column] = (stream >> (bits * index)) & (2**bits - 1)
    return result


def check(case: Case, layer: TorchLinear, stored_zeros: torch.Tensor, dequantized: torch.Tensor) -> None:
    """Assert what README.md says of the layout, so that the text is true of the file."""
    codes = draw_codes(case)
    scales, zeros, g_idx = draw_grid(case)
    assert torch.equal(read_bitstream(layer.qweight, case.bits), codes.T.long())
    assert torch.equal(read_bitstream(layer.qzeros.T, case.bits), zeros.long())
    assert torch.equal(read_bitstream(stored_zeros.T, case.bits), zeros.long() - 1)
    assert torch.equal(layer.scales, scales.T) and layer.scales.dtype == torch.float16
    expected = scales.T[g_idx.long()] * (codes.T.to(torch.int16) - zeros.T[g_idx.long()].to(torch.int16))
    assert dequantized.dtype == torch.float16 and torch.equal(dequantized, expected)


def make_case(case: Case) -> dict[str, torch.Tensor]:
    """Pack one case and return its tensors under their final names."""
    codes = draw_codes(case)
    scales, zeros, g_idx = draw_grid(case)
    group = g_idx.long()
    weight = scales.float()[:, group] * (codes.float() - zeros.float()[:, group])
    layer = pack(case, weight, (scales, zeros, g_idx))
    stored_zeros = zero_minus_one(layer, case)
    layer.eval()
    layer._init_wf_unsqueeze_buffers()
    dequantized = layer.dequantize_weight().contiguous()
    check(case, layer, stored_zeros, dequantized)
    return {
        f"{case.shared_name}/codes": codes,
        f"{case.shared_name}/qweight": layer.qweight.clone(),
        f"{case.name}/scales": scales,
        f"{case.name}/zeros": zeros,
        f"{case.name}/g_idx": layer.g_idx.to(torch.int32).clone(),
        f"{case.name}/qzeros_v1": stored_zeros,
        f"{case.name}/qzeros_v2": layer.qzeros.clone(),
        f"{case.name}/dequantized": dequantized,
    }


def main() -> None:
    """Write all cases into one file."""
    parser = argparse.ArgumentParser(description="Write golden tensors of GPTQModel's packing.")
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()

    import gptqmodel
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for case in all_cases():
        for name, tensor in make_case(case).items():
            assert name not in tensors or torch.equal(tensors[name], tensor), f"{name} differs between cases"
            tensors[name] = tensor
    # One key only: safetensors writes several in an order that differs from run to run.
    metadata = {"made_by": f"gptqmodel {gptqmodel.__version__}, torch {torch.__version__}, seed {SEED}"}
    save_file(tensors, args.out, metadata=metadata)
    print(f"{args.out}: {len(all_cases())} cases, {len(tensors)} tensors, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
