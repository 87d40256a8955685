"""Weights of a checkpoint folder of any kind by the names of the 16-bit model: 16-bit, GPTQ or bitsandbytes.

`quantization_config` in config.json (or, for GPTQ, a quantize_config.json beside it) says which: quant_method "gptq"
(`runtime/gptq_folder.py`), "bitsandbytes" (`runtime/bnb_folder.py`), or nothing for a 16-bit checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError
from qwen_quant.gptq import QuantizedWeight
from qwen_quant.models.skeleton import expected_tensors, meta_model
from qwen_quant.runtime.bnb_folder import BnbLinears, bnb_format
from qwen_quant.runtime.gptq_folder import GptqLinears, PackedFormat, packed_format

QUANTIZE_CONFIG_FILE = "quantize_config.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_RECOMPUTED = ("rotary_emb.inv_freq",)
# Tensors that only packed linears have, and the method they belong to.
_PACKED_SUFFIXES = {".qweight": "GPTQ", ".weight.absmax": "bitsandbytes", ".SCB": "bitsandbytes"}


def quantization_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's quantization settings, or None for a 16-bit checkpoint (InputError for an unreadable file)."""
    path = folder / QUANTIZE_CONFIG_FILE
    settings = config.get("quantization_config")
    if settings is None and path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read", str(error), "fetch this file again") from error
        if isinstance(settings, dict):
            settings = {"quant_method": "gptq", **settings}  # AutoGPTQ's own file may lack the method's name
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"{folder}: quantization_config is not a JSON object", next_step="fetch config.json again")
    return settings


def _packed_linears(reader: CheckpointReader, config: dict[str, Any]) -> GptqLinears | BnbLinears | None:
    """The packed linears of a folder with the parsed config.json `config`; None for a 16-bit checkpoint.

    Errors: InputError for another quant_method, a layout that is not read here, and packed tensors without settings.
    """
    folder = reader.folder
    settings = quantization_settings(folder, config)
    if settings is None:
        for suffix, owner in _PACKED_SUFFIXES.items():
            if any(name.endswith(suffix) for name in reader.names):
                raise InputError(
                    f"{folder} holds {suffix[1:]} tensors ({owner}) but no quantization settings",
                    f"neither config.json nor {QUANTIZE_CONFIG_FILE} says how they are packed",
                    "fetch both files again",
                )
        return None
    method = settings.get("quant_method")
    if method == "gptq":
        return GptqLinears(reader, packed_format(folder, settings))
    if method == "bitsandbytes":
        return BnbLinears(reader, bnb_format(folder, settings))
    raise InputError(
        f"{folder} is quantized with quant_method {method!r}",
        "only gptq and bitsandbytes are read here",
        "give a GPTQ or bitsandbytes folder or a 16-bit checkpoint",
    )


class WeightSource:
    """Reads the weights of one folder, one tensor at a time, quantized or not.

    Attributes:
        folder, spec, reader: the folder, its architecture and its tensors as stored.
        linears: its packed linears, None for a 16-bit checkpoint.

    Errors: InputError for anything that is not a checkpoint of a known family or not in a layout that is read here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = read_model_spec(folder)
        self.reader = CheckpointReader(folder)
        self.linears = _packed_linears(self.reader, self.spec.config)

    @property
    def is_quantized(self) -> bool:
        """Whether the folder holds packed linears, GPTQ's or bitsandbytes'."""
        return self.linears is not None

    @property
    def kind(self) -> str:
        """What the folder is, for reports: "16-bit", "32-bit", "gptq 4 bit", "bitsandbytes nf4" and so on."""
        if self.linears is not None:
            return self.linears.kind
        first = self.spec.linear_names()[0] + ".weight"
        return "32-bit" if first in self.reader and self.reader.info(first).dtype == torch.float32 else "16-bit"

    @property
    def packed(self) -> PackedFormat | None:
        """How GPTQ linears are packed, None for every other folder."""
        return self.linears.packed if isinstance(self.linears, GptqLinears) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.reader.nbytes

    def base_of(self, name: str) -> str | None:
        """The linear (without suffix) that stands packed for weight `name`, or None when it is stored plainly.

        Errors: InputError when a GPTQ folder holds both, so that nobody can tell which one is meant.
        """
        return None if self.linears is None else self.linears.base_of(name)

    def quantized(self, base: str) -> QuantizedWeight:
        """Codes and grid of GPTQ linear `base`. Errors: InputError for a missing or misshapen tensor, or no GPTQ."""
        if not isinstance(self.linears, GptqLinears):
            raise InputError(f"{self.folder} is {self.kind}", "it has no GPTQ codes", "give a GPTQ folder")
        return self.linears.quantized(base)

    def dense(self, name: str) -> Tensor:
        """Weight `name` of the 16-bit model: as stored, or FP32 [out, in] dequantized exactly.

        Errors: InputError when it is missing, or not a floating-point tensor.
        """
        base = self.base_of(name)
        if self.linears is not None and base is not None:
            return self.linears.dense(base)
        info = self.reader.info(name)
        if info.dtype not in _FLOATS:
            raise InputError(f"{self.folder}: '{name}' is {info.dtype}", "weights must be BF16, F16 or F32")
        return self.reader.read(name)

    def unused(self, expected: set[str]) -> list[str]:
        """Stored tensors that stand for none of the parameters `expected` (rotary buffers left out)."""
        parts = set() if self.linears is None else set().union(*map(self.linears.parts, expected))
        names = [name for name in self.reader.names if not self.spec.is_passenger(name)]
        return [n for n in names if n not in expected and n not in parts and not n.endswith(_RECOMPUTED)]


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder of any kind, as transformers' own class with plain (dequantized) weights in `dtype`.

    For tests, interoperability checks and `generate`; it holds the whole model, unlike the streaming stages.

    Errors: InputError for missing, misshapen or unexpected tensors.
    """
    source = WeightSource(folder)
    model = meta_model(source.spec)
    expected = expected_tensors(model)
    odd = source.unused(set(expected) | set(model.all_tied_weights_keys))
    if odd:
        raise InputError(f"{folder} holds the unexpected tensor '{odd[0]}'", "config.json has no place for it")
    state = {}
    for name, shape in expected.items():
        value = source.dense(name)
        if tuple(value.shape) != shape:
            raise InputError(f"{folder}: '{name}' has shape {tuple(value.shape)}", f"config.json asks for {shape}")
        state[name] = value.to(device, dtype)
    model.load_state_dict(state, strict=False, assign=True)  # strict would ask for the tied copies
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    model.requires_grad_(False)
    model.config.dtype = dtype
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()
