"""Weights of a checkpoint folder of either kind, 16-bit or GPTQ, by the names of the 16-bit model.

A GPTQ folder is one written by this package or a published one in the same layout: `quantization_config` in config.json
or a quantize_config.json beside it, with quant_method "gptq" and checkpoint_format "gptq" (also when absent: the format
is older than the field) or "gptq_v2".
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
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
from qwen_quant.packing import SUFFIXES, WORD_BITS, packed_specs, unpack_weight
from qwen_quant.recipe import BITS, CHECKPOINT_FORMATS

QUANTIZE_CONFIG_FILE = "quantize_config.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK_VALUES = 1 << 23
_RECOMPUTED = ("rotary_emb.inv_freq",)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedFormat:
    """How a folder's linears are packed: bits, and the convention of its zeros ("gptq" or "gptq_v2")."""

    bits: int
    checkpoint_format: str


def _quantization_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
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


def read_packed_format(folder: Path, config: dict[str, Any]) -> PackedFormat | None:
    """How `folder` (with the parsed config.json `config`) is packed; None for a 16-bit checkpoint.

    Errors: InputError for another method than GPTQ, another layout, unknown bits, or settings per module.
    """
    settings = _quantization_settings(folder, config)
    if settings is None:
        return None
    method, bits = settings.get("quant_method"), settings.get("bits")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    step = "give a GPTQ folder (checkpoint_format gptq or gptq_v2) or a 16-bit checkpoint"
    if method != "gptq":
        raise InputError(f"{folder} is quantized with quant_method {method!r}", "only gptq is read here", step)
    if layout not in CHECKPOINT_FORMATS or settings.get("is_marlin_format"):
        raise InputError(f"{folder} has checkpoint_format {layout!r}", "its codes are laid out for one kernel", step)
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{folder}: quantization_config has bits {bits!r}", f"known widths: {BITS}", step)
    if settings.get("dynamic"):
        raise InputError(f"{folder} gives modules settings of their own ('dynamic')", "one width for all is read", step)
    return PackedFormat(bits, layout)


def dequantized_by_rows(quantized: QuantizedWeight) -> Tensor:
    """FP32 [out, in] as `QuantizedWeight.dequantized`, made in row chunks so that temporaries stay near 100 MiB."""
    out_features, in_features = quantized.codes.shape
    result = torch.empty(out_features, in_features)
    step = max(1, _CHUNK_VALUES // max(in_features, 1))
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        part = QuantizedWeight(quantized.codes[rows], quantized.scales[rows], quantized.zeros[rows], quantized.g_idx)
        result[rows] = part.dequantized()
    return result


class WeightSource:
    """Reads the weights of one folder, one tensor at a time, quantized or not.

    Attributes:
        folder, spec, reader: the folder, its architecture and its tensors as stored.
        packed: how its linears are packed, None for a 16-bit checkpoint.

    Errors: InputError for anything that is not a checkpoint of a known family or not in a layout that is read here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = read_model_spec(folder)
        self.packed = read_packed_format(folder, self.spec.config)
        self.reader = CheckpointReader(folder)
        if self.packed is None and any(name.endswith(".qweight") for name in self.reader.names):
            raise InputError(
                f"{folder} holds qweight tensors but no quantization settings",
                f"neither config.json nor {QUANTIZE_CONFIG_FILE} says how they are packed",
                "fetch both files again",
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the folder is a GPTQ artifact."""
        return self.packed is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.reader.nbytes

    def base_of(self, name: str) -> str | None:
        """The linear (without suffix) whose packed tensors stand for weight `name`, or None when it is stored plainly.

        Errors: InputError when the folder holds both, so that nobody can tell which one is meant.
        """
        base = name.removesuffix(".weight")
        if not any(f"{base}.{suffix}" in self.reader for suffix in SUFFIXES):
            return None
        if name in self.reader:
            raise InputError(
                f"{self.folder} holds '{name}' both packed and plain", next_step="fetch or write the artifact again"
            )
        return base

    def quantized(self, base: str) -> QuantizedWeight:
        """The codes and grid of linear `base`. Errors: InputError for a tensor that is missing or misshapen."""
        assert self.packed is not None
        bits = self.packed.bits
        tensors = {}
        for suffix in SUFFIXES:
            if f"{base}.{suffix}" not in self.reader:
                raise InputError(
                    f"{self.folder} lacks the tensor '{base}.{suffix}'",
                    "a GPTQ linear is qweight, qzeros, scales and g_idx",
                    "fetch the artifact again",
                )
            tensors[suffix] = self.reader.read(f"{base}.{suffix}")
        self._check(base, tensors)
        weight = unpack_weight(tensors, bits, self.packed.checkpoint_format)
        if self.packed.checkpoint_format == "gptq" and not bool(weight.zeros.all()):
            logger.warning("%s has zeros of 0, which readers of the gptq format understand differently", base)
        return weight

    def _check(self, base: str, tensors: dict[str, Tensor]) -> None:
        """Shapes and dtypes fit each other and the settings (InputError otherwise)."""
        assert self.packed is not None
        qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors["g_idx"]
        step = "check that quantization_config belongs to these weights"
        if qweight.dim() != 2 or scales.dim() != 2 or g_idx.dim() != 1:
            raise InputError(f"{self.folder}: the packed tensors of '{base}' are not matrices", next_step=step)
        in_features = qweight.shape[0] * WORD_BITS // self.packed.bits
        specs = packed_specs(in_features, qweight.shape[1], self.packed.bits, -1)
        groups = scales.shape[0]
        for suffix, (dtype, shape) in specs.items():
            expected = (groups, *shape[1:]) if suffix in ("qzeros", "scales") else shape
            right = tensors[suffix].dtype in (_FLOATS if suffix == "scales" else (dtype,))
            if tuple(tensors[suffix].shape) != expected or not right:
                raise InputError(
                    f"{self.folder}: '{base}.{suffix}' is {tensors[suffix].dtype} {tuple(tensors[suffix].shape)}",
                    f"{dtype} {expected} is needed at {self.packed.bits} bits",
                    step,
                )
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise InputError(f"{self.folder}: '{base}.g_idx' names a group outside 0..{groups - 1}", next_step=step)

    def dense(self, name: str) -> Tensor:
        """Weight `name` of the 16-bit model: as stored, or FP32 [out, in] dequantized exactly.

        Errors: InputError when it is missing, or not a floating-point tensor.
        """
        base = self.base_of(name) if self.is_quantized else None
        if base is not None:
            return dequantized_by_rows(self.quantized(base))
        info = self.reader.info(name)
        if info.dtype not in _FLOATS:
            raise InputError(f"{self.folder}: '{name}' is {info.dtype}", "weights must be BF16, F16 or F32")
        return self.reader.read(name)

    def unused(self, expected: set[str]) -> list[str]:
        """Stored tensors that stand for none of the parameters `expected` (rotary buffers left out)."""
        packed = {f"{name.removesuffix('.weight')}.{suffix}" for name in expected for suffix in SUFFIXES}
        names = self.reader.names
        return [n for n in names if n not in expected and n not in packed and not n.endswith(_RECOMPUTED)]


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder, 16-bit or GPTQ, as transformers' own class with plain (dequantized) weights in `dtype`.

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
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()
