"""AutoModelForCausalLM.from_pretrained of bitsandbytes folders whose routed experts are packed one by one.

transformers 5 fuses the experts of a block into two 3-D parameters, for which bitsandbytes has no form: it can neither
quantize them nor read them packed, and stops at a folder of ours with a size mismatch. `register()` puts in the place
of its two bitsandbytes loaders ones that differ at such folders only: the fused modules are replaced by lists of
linears (`models/experts.py`), which transformers then turns into bitsandbytes modules like every other linear, and
its conversions that stack experts are left out. Every other folder, and quantizing on the fly, is left to transformers.

bitsandbytes itself is imported by transformers, and only when a folder is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qwen_quant.bnb import is_expert
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.models.experts import separate_experts
from qwen_quant.runtime.bnb_folder import BnbLinears, bnb_format

_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


def _packed_experts(config: BitsAndBytesConfig, files: list[str] | None) -> bool:
    """Whether a folder (its weight files) holds packed experts under names of their own."""
    if not files:
        return False
    reader = CheckpointReader(Path(files[0]).parent)
    experts = [name for name in reader.names if is_expert(name) and name.endswith(".weight")]
    linears = BnbLinears(reader, bnb_format(reader.folder, config.to_dict())) if experts else None
    return linears is not None and any(linears.base_of(name) for name in experts)


def _without_stacking(conversions: list[Any], model: PreTrainedModel) -> list[Any]:
    """transformers' conversions, those left out that would stack experts of which `model` holds no stack."""
    if any(_STACKED.search(name) for name, _ in model.named_parameters()):
        return conversions
    return [
        conversion
        for conversion in conversions
        if not any(".experts." in pattern for pattern in getattr(conversion, "target_patterns", ()))
    ]


class _SeparateExperts:
    """What both loaders add to transformers' own; `separate` is set for a folder with packed experts."""

    separate = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        config: BitsAndBytesConfig = self.quantization_config  # type: ignore[attr-defined]
        if self.pre_quantized and _packed_experts(config, kwargs.get("checkpoint_files")):  # type: ignore[attr-defined]
            separate_experts(model)
            self.separate = True
        super()._process_model_before_weight_loading(model, device_map, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """transformers' conversions, those that stack experts left out where they are separate."""
        kept = _without_stacking(weight_conversions, model) if self.separate else weight_conversions
        return super().update_weight_conversions(kept, model)  # type: ignore[misc]

    def is_serializable(self) -> bool:
        """False for separate experts: transformers would save them for a loader that stacks; copy the folder."""
        return not self.separate


class ExpertBnb4BitHfQuantizer(_SeparateExperts, Bnb4BitHfQuantizer):
    """transformers' NF4 and FP4 loader, and packed experts."""


class ExpertBnb8BitHfQuantizer(_SeparateExperts, Bnb8BitHfQuantizer):
    """transformers' Int8 loader, and packed experts, whose codes are stored as one column."""

    def get_load_operations(self) -> dict[str, Any]:
        """The operation that makes a linear's parameter of its stored tensors."""
        return {"deserialize": _expert_deserialize()} if self.separate else super().get_load_operations()


def _expert_deserialize() -> type[Any]:
    """transformers' own last step for Int8 weights, with codes in the shape of their linear.

    Defined when it is needed: its base class imports bitsandbytes where that is installed.
    """
    from transformers.integrations.bitsandbytes import Bnb8bitDeserialize

    class ExpertDeserialize(Bnb8bitDeserialize):
        """Codes int8 and SCB of one linear -> its Int8Params."""

        def convert(
            self,
            input_dict: dict[str, Any],
            model: PreTrainedModel | None = None,
            full_layer_name: str | None = None,
            **kwargs: Any,
        ) -> dict[str, Tensor]:
            """As the base class; an expert's codes come as one column."""
            if model is not None and full_layer_name is not None and is_expert(full_layer_name):
                linear = model.get_submodule(full_layer_name.rpartition(".")[0])
                stored = input_dict["weight"]
                codes = stored[0] if isinstance(stored, list) else stored
                input_dict["weight"] = codes.view(linear.out_features, linear.in_features)
            found: dict[str, Tensor] = super().convert(input_dict, model, full_layer_name, **kwargs)
            return found

    return ExpertDeserialize


def register() -> None:
    """Serve bitsandbytes folders; whatever else has taken their places is left alone."""
    for name, plain, ours in (
        ("bitsandbytes_4bit", Bnb4BitHfQuantizer, ExpertBnb4BitHfQuantizer),
        ("bitsandbytes_8bit", Bnb8BitHfQuantizer, ExpertBnb8BitHfQuantizer),
    ):
        if AUTO_QUANTIZER_MAPPING.get(name) is plain:
            AUTO_QUANTIZER_MAPPING[name] = ours


register()
