#!/usr/bin/env python3
"""Make tests/golden/bnb_quantize: what bitsandbytes' CPU kernels compute and transformers' save_pretrained writes.

Runs where bitsandbytes, accelerate and transformers are installed (a CPU is enough). Nothing of ``qwen_quant`` computes
a value here, so the files are an outside witness for ``bnb.py`` and ``bnb_convert.py``; the package is imported only so
that transformers knows first-generation Qwen. What the files hold is in tests/golden/README.md.

    PYTHONPATH=. python scripts/make_golden_bnb_quantize.py tests/golden/bnb_quantize
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import pathlib
import shutil
import tempfile

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen3Config

import qwen_quant  # noqa: F401 (registers model_type "qwen")

SEED = 20261121
QWEN1 = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "qwen1" / "tiny7b"
SIZES = {"vocab_size": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SOURCES = {
    "qwen2": (Qwen2Config(**SIZES, intermediate_size=176, num_hidden_layers=2, tie_word_embeddings=True), "bfloat16"),
    "qwen3": (
        Qwen3Config(**SIZES, intermediate_size=96, num_hidden_layers=1, tie_word_embeddings=False, head_dim=32),
        "float16",
    ),
}
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
CASES = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 4.5},
}
SKIPPED = {"qwen2": ["lm_head", "model.embed_tokens", "o_proj"], "qwen3": ["lm_head", "o_proj"]}


def spread(weight: torch.Tensor) -> torch.Tensor:
    """A random weight whose rows and columns differ in size."""
    rows, columns = torch.randn(weight.shape[0], 1), torch.randn(1, weight.shape[1])
    return torch.randn(weight.shape) * 0.02 * torch.exp(0.5 * rows + 0.5 * columns)


def tail_where_division_matters() -> torch.Tensor:
    """A short block [1, 63] with values that division by absmax and its reciprocal put on two sides of a midpoint."""
    table = functional.get_4bit_type("nf4", device="cpu")
    middles = (table[:-1] + table[1:]) / 2
    while True:
        absmax = torch.rand(()) + 0.5
        values = torch.cat([middles * absmax, torch.nextafter(middles * absmax, torch.tensor(9.0))])
        differ = values[((values / absmax) > middles.repeat(2)) != ((values * (1 / absmax)) > middles.repeat(2))]
        if len(differ) >= 3:
            return torch.cat([absmax[None], differ, torch.zeros(62 - len(differ))])[None]


def nested_values() -> torch.Tensor:
    """FP32 [4096] for the 8-bit kernel of double quantization: random ones of every size, and ones beside its steps."""
    sizes = torch.randn(2048) * torch.logspace(-5, 0, 2048)
    steps = torch.randint(0, 65536, (2048,)) / 32767.5 - 1 + (torch.randint(0, 2, (2048,)) - 0.5) / 32767.5
    return torch.cat([sizes, torch.tensor([1.0]), steps[1:].clamp(-1, 1)])


def kernel_weights() -> dict[str, torch.Tensor]:
    """Weights with short last blocks, short nested blocks, odd counts, zeros, ties and constants, in each dtype."""
    torch.manual_seed(SEED)
    wide, zeros = spread(torch.empty(72, 260)), spread(torch.empty(24, 100))
    zeros[::3] = 0
    zeros[1, :64] = 0.5
    ties = torch.linspace(-1, 1, 4097)[:-1].view(32, 128).clone()
    ties[:, 0] = 1
    tables = [functional.get_4bit_type(kind, device="cpu").sort().values for kind in ("nf4", "fp4")]
    middles = torch.cat([(table[:-1] + table[1:]) / 2 for table in tables])
    ties[0, 1 : 1 + len(middles)] = middles
    return {
        "wide": wide.bfloat16(),
        "odd": spread(torch.empty(33, 7)).half(),
        "zeros": zeros,
        "ties": ties,
        "tail": tail_where_division_matters(),
        "one": torch.full((1, 1), -0.25).bfloat16(),
    }


def kernel_outputs(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight through every kernel: "weight/case/tensor"."""
    found = {}
    for name, weight in weights.items():
        found[f"{name}/weight"] = weight
        for kind, size, double in itertools.product(("nf4", "fp4"), (64, 256), (False, True)):
            packed, state = functional.quantize_4bit(
                weight.clone(), quant_type=kind, blocksize=size, compress_statistics=double
            )
            case = f"{name}/{kind}_{size}" + ("_double" if double else "")
            found[f"{case}/weight"] = packed
            found |= {f"{case}/weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        codes, scb, _ = functional.int8_vectorwise_quant(weight.half())
        found |= {f"{name}/int8/weight": codes, f"{name}/int8/SCB": scb}
    values = nested_values()
    indices, state = functional.quantize_blockwise(values, blocksize=256)
    found |= {"nested/values": values, "nested/indices": indices, "nested/absmax": state.absmax}
    return {key: value.contiguous() for key, value in found.items()}


def make_source(name: str, folder: pathlib.Path) -> None:
    """Write a small random checkpoint."""
    torch.manual_seed(SEED)
    config, dtype = SOURCES[name]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parameter.copy_(spread(parameter))
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()


def saved(source: pathlib.Path, settings: dict[str, object]) -> dict[str, object]:
    """What transformers saves for `source` with these settings: every tensor's digest, and quantization_config."""
    with tempfile.TemporaryDirectory() as place:
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
        )
        model.save_pretrained(place)
        tensors = load_file(pathlib.Path(place) / "model.safetensors")
        config = json.loads((pathlib.Path(place) / "config.json").read_text())
    described = {
        key: [
            str(value.dtype).removeprefix("torch."),
            list(value.shape),
            hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for key, value in sorted(tensors.items())
    }
    return {"quantization_config": config["quantization_config"], "tensors": described}


def main() -> None:
    """Write the sources, the kernels' outputs and the digests of what is saved."""
    parser = argparse.ArgumentParser(description="Write golden quantized bitsandbytes tensors.")
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_file(kernel_outputs(kernel_weights()), out / "kernels.safetensors")
    folders: dict[str, dict[str, object]] = {}
    for name in SOURCES:
        make_source(name, out / name)
        folders[name] = {case: saved(out / name, settings) for case, settings in CASES.items()}
        folders[name]["nf4_skip"] = saved(out / name, {**CASES["nf4"], "llm_int8_skip_modules": SKIPPED[name]})
    folders["qwen"] = {case: saved(QWEN1, settings) for case, settings in CASES.items()}
    versions = f"bitsandbytes {bitsandbytes.__version__}, transformers {transformers.__version__}, "
    document = {"made_by": f"{versions}torch {torch.__version__}, seed {SEED}", "folders": folders}
    (out / "saved.json").write_text(json.dumps(document) + "\n")
    files = [file for file in out.rglob("*") if file.is_file()]
    print(f"{document['made_by']}: {len(files)} files, {sum(file.stat().st_size for file in files)} bytes")


if __name__ == "__main__":
    main()
