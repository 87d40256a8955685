"""AutoModelForCausalLM.from_pretrained of GPTQ folders with our kernels, where gptqmodel is not installed.

transformers 5 finds the loader of a quantized folder in two tables by quant_method; for "gptq" both lead to optimum and
gptqmodel, without which loading fails. `register()` puts our loader into these two places, only when gptqmodel is
absent, and touches nothing else. With gptqmodel its own kernels serve, but that way transformers leaves packed routed
experts as they were initialized, without a word (5.23 with gptqmodel 7.7, docs/interop.md): such folders are refused.
`register_quantizer`, transformers' public door, refuses names that are taken, so the tables are assigned.

The packed linears are built from the folder before transformers loads the rest: one linear at a time, straight into
their kernel's layout, in their own dtypes. transformers then finds nothing to do for the packed tensors, which are
named as known so that it does not report them.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPTQConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError, UsageError
from qwen_quant.models.experts import separate_experts
from qwen_quant.packing import SUFFIXES
from qwen_quant.runtime.gptq_folder import GptqLinears, packed_format
from qwen_quant.runtime.linear import Int4Linear, LinearSettings
from qwen_quant.runtime.quantized_model import kernel_report

METHOD = "gptq"
_CPU = torch.device("cpu")
_KNOWN = rf"\.({'|'.join(SUFFIXES)})$"
logger = logging.getLogger(__name__)


class PackedGPTQConfig(GPTQConfig):
    """transformers' settings of a GPTQ folder that forget nothing of what config.json says.

    Args:
        bits: 2, 3, 4 or 8 (ValueError otherwise, also where config.json has none).
        **settings: the rest of quantization_config.
    """

    def __init__(self, bits: int | None = None, **settings: Any) -> None:
        self.stored = {"bits": bits, **copy.deepcopy(settings)}
        self.stored["quant_method"] = METHOD
        settings.pop("quant_method", None)
        # transformers takes this list for optimum, and raises where that is not installed; nothing here needs either.
        modules = settings.pop("modules_in_block_to_quantize", None)
        super().__init__(bits, **settings)
        self.modules_in_block_to_quantize = modules

    def to_dict(self) -> dict[str, Any]:
        """quantization_config as it was read."""
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: no value is left out for being a default."""
        return self.to_dict()


# transformers compares the names of the classes when a caller passes a GPTQConfig for a folder that is quantized.
PackedGPTQConfig.__name__ = GPTQConfig.__name__


class Int4HfQuantizer(HfQuantizer):
    """Loads GPTQ folders with Int4Linear. Raises UsageError instead of quantizing a 16-bit model on the fly."""

    requires_calibration = False
    quantization_config: PackedGPTQConfig

    def __init__(self, quantization_config: PackedGPTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.started = time.perf_counter()
        if not self.pre_quantized:
            raise UsageError(
                "from_pretrained quantizes nothing here",
                "gptqmodel is not installed, and qwen-quant quantizes from the command line",
                "run: qwen-quant gptq MODEL OUT --bits 4, then load OUT",
            )

    def update_device_map(self, device_map: str | dict[str, Any] | None) -> dict[str, Any]:
        """One device for the whole model: the CPU when none is named.

        Of names only "auto" and its like arrive here (transformers turns devices into a map): the GPU, if there is one.
        """
        if isinstance(device_map, str):
            return {"": torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU}
        return {"": _CPU} if device_map is None else device_map

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise UsageError(
                "a GPTQ model is loaded from a folder", next_step="give from_pretrained a folder or hub id"
            )
        linears = _linears(Path(files[0]).parent, self.quantization_config)
        settings = LinearSettings(
            linears.packed.bits, _device(kwargs.get("device_map")), kwargs.get("dtype") or torch.get_default_dtype()
        )
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        stored = {name.rpartition(".")[0] for name in linears.reader.names if name.endswith(".qweight")}
        stored = {name for name in stored if not any(re.search(pattern, name) for pattern in ignored)}
        if any(".experts." in name for name in stored):
            separate_experts(model)
        places = _places(model, stored)
        with torch.device("cpu"):  # transformers builds models under torch.device("meta")
            built = [_replace(model, places[name], name, linears, settings) for name in sorted(stored)]
        model._keys_to_ignore_on_load_unexpected = {*ignored, _KNOWN, *filter(None, built)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        report = kernel_report(model, time.perf_counter() - self.started)
        model.kernel_report = report
        logger.info("Int4 kernels: %s", report.summary())
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """transformers' conversions without those that stack experts: ours stay separate, as on disk."""
        fused = [c for c in weight_conversions if any("experts" in p for p in getattr(c, "target_patterns", ()))]
        parameters = [name for name, _ in model.named_parameters()]
        if any(".experts.gate_up_proj" in name for name in parameters):
            return weight_conversions
        return [conversion for conversion in weight_conversions if conversion not in fused]

    def is_serializable(self) -> bool:
        """False: packed weights are laid out for one kernel; the folder they came from is the saved form."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True: gradients reach the inputs, so that adapters can be trained beside the quantized weights."""
        return True


def _linears(folder: Path, config: PackedGPTQConfig) -> GptqLinears:
    return GptqLinears(CheckpointReader(folder), packed_format(folder, config.to_dict()))


def _device(device_map: dict[str, Any] | None) -> torch.device:
    """The one device of a device map. Errors: UsageError when it names several, or the disk."""
    places = {str(place) for place in (device_map or {"": "cpu"}).values()}
    place = places.pop()
    if places or place == "disk":
        raise UsageError(
            "an Int4 model runs on one device",
            f"device_map names {', '.join(sorted({place, *places}))}",
            'give device_map={"": "cuda:0"} or {"": "cpu"}',
        )
    return torch.device(f"cuda:{place}" if place.isdigit() else place)


def _places(model: PreTrainedModel, stored: set[str]) -> dict[str, str]:
    """Name on disk -> name in the model, by transformers' own renamings (text models of vision checkpoints)."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix
    keys = {name: rename_source_key(f"{name}.weight", renamings, [], prefix, state)[0] for name in stored}
    return {name: key.removesuffix(".weight") for name, key in keys.items()}


def _replace(model: nn.Module, place: str, name: str, linears: GptqLinears, settings: LinearSettings) -> str:
    """Put an Int4Linear of the stored linear `name` in `place`; the bias stays transformers' to load.

    Returns: a pattern for a stored bias that the model has no place for (AutoGPTQ wrote zeros), else "".

    Errors: InputError when the model has no such linear, or one of another shape.
    """
    try:
        module = model.get_submodule(place)
    except AttributeError:
        module = None
    weight = linears.quantized(name)
    if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != tuple(weight.codes.shape):
        what = f"{linears.reader.folder}: the packed linear '{name}' has no place of its shape in the model"
        raise InputError(what, f"it is {tuple(weight.codes.shape)}", "check that config.json belongs to these weights")
    linear = Int4Linear(weight, None, settings)
    linear.bias = module.bias
    model.set_submodule(place, linear)
    odd_bias = module.bias is None and f"{name}.bias" in linears.parts(f"{name}.weight")
    return f"^{re.escape(place)}[.]bias$" if odd_bias else ""


class GuardedGptqHfQuantizer(GptqHfQuantizer):
    """transformers' own loader through gptqmodel. Raises InputError for packed routed experts: they would be random."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        names = CheckpointReader(Path(files[0]).parent).names if files else ()
        if any(".experts." in name and name.endswith(".qweight") for name in names):
            raise InputError(
                f"{Path(files[0]).parent}: transformers with gptqmodel would leave its packed experts random",
                "it fuses experts and drops the packed ones",
                "load it with GPTQModel.load, or where gptqmodel is not installed: qwen_quant then serves it",
            )
        super()._process_model_before_weight_loading(model, **kwargs)


def register() -> bool:
    """Serve quant_method "gptq" where gptqmodel is absent; whether it did."""
    if importlib.util.find_spec("gptqmodel") is not None:
        if AUTO_QUANTIZER_MAPPING.get(METHOD) is GptqHfQuantizer:
            AUTO_QUANTIZER_MAPPING[METHOD] = GuardedGptqHfQuantizer
        return False
    AUTO_QUANTIZER_MAPPING[METHOD] = Int4HfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedGPTQConfig
    return True


register()
