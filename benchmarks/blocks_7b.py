#!/usr/bin/env python3
"""Qwen2-7B-shaped blocks with random weights, packed and dense, for `benchmarks/int4.py --int4 ... --dense ...`.

    python benchmarks/blocks_7b.py WORK [--blocks 4]

Writes WORK/int4 (GPTQ, 4 bit, group 128, symmetric) and WORK/dense (the same weights in BF16). The vocabulary shrinks
with the number of blocks (152064 x blocks / 32), so that blocks and head keep the shares of a token that they have in
all 32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import Qwen2Config

from qwen_quant.checkpoint.families import model_spec
from qwen_quant.checkpoint.writer import PlannedTensor, PlannedWriter, plan_shards
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.models.skeleton import expected_tensors, meta_model
from qwen_quant.packing import pack_weight

GROUP_SIZE, BLOCKS_OF_7B, VOCABULARY = 128, 32, 152064
SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False}


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> QuantizedWeight:
    out, width = shape
    groups = width // GROUP_SIZE
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, groups, generator=generator).mul(0.008).half()
    return QuantizedWeight(
        codes, scales, torch.full((out, groups), 8, dtype=torch.uint8), torch.arange(width).int() // GROUP_SIZE
    )


def plan(shapes: dict[str, tuple[int, ...]], packed: bool) -> list[PlannedTensor]:
    """What the folder holds: packed linears as GPTQ names them, or all of it in BF16."""
    planned = []
    for name, shape in shapes.items():
        if not packed or not name.endswith("proj.weight"):
            planned.append(PlannedTensor(name, torch.bfloat16, shape))
            continue
        base, (out, width), groups = name.removesuffix("weight"), shape, shape[1] // GROUP_SIZE
        planned += [
            PlannedTensor(f"{base}qweight", torch.int32, (width // 8, out)),
            PlannedTensor(f"{base}qzeros", torch.int32, (groups, out // 8)),
            PlannedTensor(f"{base}scales", torch.float16, (groups, out)),
            PlannedTensor(f"{base}g_idx", torch.int32, (width,)),
        ]
    return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    sizes = {"vocab_size": VOCABULARY * arguments.blocks // BLOCKS_OF_7B, "num_hidden_layers": arguments.blocks}
    config = Qwen2Config(**SIZES, **sizes, tie_word_embeddings=False).to_dict()
    shapes = expected_tensors(meta_model(model_spec(config, "7B-shaped blocks")))
    writers = {}
    for kind in ("int4", "dense"):
        folder = arguments.work / kind
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"quantization_config": {**SETTINGS, "checkpoint_format": "gptq"}} if kind == "int4" else {}
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", **settings}))
        writers[kind] = PlannedWriter(folder, plan_shards(plan(shapes, kind == "int4"), 1 << 40))
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if name.endswith("proj.weight"):
            weight = random_weight(shape, generator)
            for suffix, tensor in pack_weight(weight, 4, "gptq").items():
                writers["int4"].write(name.removesuffix("weight") + suffix, tensor)
            writers["dense"].write(name, weight.dequantized().bfloat16())
            continue
        value = torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
        value = value if len(shape) == 1 else value.normal_(0, 0.02, generator=generator)
        for writer in writers.values():
            writer.write(name, value.bfloat16())
    for writer in writers.values():
        writer.finish()


if __name__ == "__main__":
    main()
