"""A GPTQ folder as a runnable transformers model whose linears stay quantized, and the report of their kernels.

Unlike `loading.load_model`, which dequantizes, this holds the packed weights only, in the layout of the kernel that was
chosen for each: folders are read one linear at a time, so no second copy of the model ever exists.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from qwen_quant.errors import InputError, UsageError
from qwen_quant.models.experts import ExpertList
from qwen_quant.models.skeleton import compute_dtype, expected_tensors, meta_model
from qwen_quant.runtime.head import keep_bf16, kept_dtype
from qwen_quant.runtime.head import refusal as head_refusal
from qwen_quant.runtime.linear import Int4Linear, LinearSettings
from qwen_quant.runtime.loading import WeightSource


@dataclass(frozen=True)
class LinearKernel:
    """What runs one linear.

    Attributes:
        linear: its name.
        kernel, arithmetic: of the kernel taken.
        bits: of its codes.
        weight_bytes: what one product reads.
        act_order: whether inputs are permuted for the kernel.
        not_taken: kernel -> why it was passed over.
    """

    linear: str
    kernel: str
    arithmetic: str
    bits: int
    weight_bytes: int
    act_order: bool
    not_taken: dict[str, str]


@dataclass(frozen=True)
class KernelReport:
    """What a quantized model runs on.

    Attributes:
        linears: one entry for each quantized linear, in the model's order.
        seconds: time to load and pack.
        head: what runs the output head.
    """

    linears: tuple[LinearKernel, ...]
    seconds: float
    head: str = "torch"

    def counts(self) -> dict[str, int]:
        """Kernel -> number of linears."""
        return dict(Counter(entry.kernel for entry in self.linears))

    def reasons(self) -> dict[str, dict[str, int]]:
        """Kernel -> reason it was passed over -> number of linears."""
        found: dict[str, Counter[str]] = {}
        for entry in self.linears:
            for kernel, reason in entry.not_taken.items():
                found.setdefault(kernel, Counter())[reason] += 1
        return {kernel: dict(reasons) for kernel, reasons in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        linears = [asdict(entry) for entry in self.linears]
        totals = {"counts": self.counts(), "reasons": self.reasons(), "seconds": self.seconds, "head": self.head}
        return {**totals, "linears": linears}

    def summary(self) -> str:
        """One line for people: counts, and why others were passed over."""
        taken = ", ".join(f"{count} x {kernel}" for kernel, count in self.counts().items())
        missed = [
            f"{kernel}: {reason} ({count})" for kernel, why in self.reasons().items() for reason, count in why.items()
        ]
        return taken + ("; not taken: " + "; ".join(missed) if missed else "")


def kernel_report(model: nn.Module, seconds: float) -> KernelReport:
    """The report of every Int4Linear of `model`, which took `seconds` to load."""
    entries = [
        LinearKernel(
            linear=name,
            kernel=module.kernel.name,
            arithmetic=module.kernel.arithmetic,
            bits=module.bits,
            weight_bytes=module.nbytes,
            act_order=module.order is not None,
            not_taken=dict(module.not_taken),
        )
        for name, module in model.named_modules()
        if isinstance(module, Int4Linear)
    ]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return KernelReport(tuple(entries), seconds, getattr(head, "name", "torch"))


def bytes_per_token(model: PreTrainedModel, rows: int = 1) -> int:
    """Bytes of weights that decoding one token of each of `rows` rows must read.

    Every parameter and packed weight of the decoder and its head once; of an embedding that is not also the head
    nothing (one row each); of routed experts the share that some token is sent to (`_routed_share`).
    """
    output = model.get_output_embeddings()
    head, parts = output.weight, [*model.get_decoder().modules(), output]
    routed = {id(part) for experts in parts if isinstance(experts, ExpertList) for part in experts.modules()}
    total, seen = 0.0, set()
    for module in parts:
        share = _routed_share(model, rows) if id(module) in routed else 1.0
        if isinstance(module, Int4Linear):
            total += module.nbytes * share
            continue
        for parameter in module.parameters(recurse=False):
            lookup_only = isinstance(module, nn.Embedding) and parameter is not head
            if id(parameter) not in seen and not lookup_only:
                seen.add(id(parameter))
                total += (parameter.nbytes + sum(part.nbytes for part in bnb_scales(parameter))) * share
    return round(total)


def bnb_scales(parameter: nn.Parameter) -> tuple[Tensor, ...]:
    """What bitsandbytes keeps beside the codes of a parameter and no module lists: absmax, or Int8's row scales."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    held = (getattr(state, "absmax", None), getattr(nested, "absmax", None), getattr(parameter, "SCB", None))
    return tuple(part for part in held if isinstance(part, Tensor))


def _routed_share(model: PreTrainedModel, rows: int) -> float:
    """The expected share of the experts that some of `rows` tokens is sent to: 1 - (1 - k / n)^rows, routed evenly."""
    config = model.config.get_text_config()
    return 1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows


def load_quantized(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, kernel: str | None = None
) -> PreTrainedModel:
    """The model of a GPTQ folder (ours or published) with Int4Linear in place of its packed linears.

    Args:
        folder: checkpoint folder.
        device: where it runs; weights are packed for it and cannot move.
        dtype: of activations and of what is not packed; None: BF16 where the hardware multiplies it, else FP32.
        kernel: the name of the one kernel to use, for measurements; None chooses for each linear.

    Returns:
        transformers' own class, in eval mode, with the attribute `kernel_report` (KernelReport).

    Errors: InputError when the folder is no GPTQ artifact, or tensors are missing, misshapen or unexpected; UsageError
    for a kernel by name that does not take a linear.
    """
    started = time.perf_counter()
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    source, dtype = WeightSource(folder), dtype or compute_dtype(place)
    if source.packed is None:
        raise InputError(
            f"{folder} is no GPTQ artifact",
            f"it is {source.kind}",
            "give the folder that qwen-quant gptq wrote, or load this one with load_model",
        )
    model = meta_model(source.spec)
    _refuse_unexpected(source, model)
    settings = LinearSettings(source.packed.bits, place, dtype, kernel)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and source.base_of(f"{name}.weight"):
            model.set_submodule(name, _linear(source, name, module, settings))
    spec = source.spec
    head, embedding = spec.family.head, spec.family.embedding
    stored = source.reader.info(f"{embedding}.weight").dtype
    if not head_refusal(model.get_submodule(head), stored, place, dtype):
        keep_bf16(model, head, embedding)
    _fill(source, model, place, dtype)
    report = kernel_report(model, time.perf_counter() - started)
    model.kernel_report = report
    model.save_pretrained = _refuse_saving
    return model


def _refuse_saving(*arguments: object, **settings: object) -> NoReturn:
    """Packed weights are laid out for one kernel: transformers would write a folder without them."""
    raise UsageError("a model with packed Int4 linears cannot be saved", next_step="copy the folder it was loaded from")


def _refuse_unexpected(source: WeightSource, model: PreTrainedModel) -> None:
    expected = set(expected_tensors(model)) | set(model.all_tied_weights_keys)
    odd = source.unused(expected)
    if odd:
        raise InputError(f"{source.folder} holds the unexpected tensor '{odd[0]}'", "config.json has no place for it")


def _linear(source: WeightSource, name: str, module: nn.Linear, settings: LinearSettings) -> Int4Linear:
    """The Int4Linear of the packed linear `name`."""
    weight = source.quantized(name)
    _check_shape(source, f"{name}.weight", weight.codes, (module.out_features, module.in_features))
    bias = None
    if module.bias is not None:
        bias = source.dense(f"{name}.bias")
        _check_shape(source, f"{name}.bias", bias, (module.out_features,))
    return Int4Linear(weight, bias, settings)


def _check_shape(source: WeightSource, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{source.folder}: '{name}' has shape {tuple(value.shape)}", f"config.json asks for {shape}")


def _fill(source: WeightSource, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Give the model everything that is not packed, tie its head, and compute its rotary tables."""
    tied = set(model.all_tied_weights_keys)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta or name in tied:
            continue
        value = source.dense(name)
        _check_shape(source, name, value, tuple(parameter.shape))
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(owner, leaf, nn.Parameter(value.to(device, kept_dtype(owner, dtype)), requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    path = source.folder / "generation_config.json"
    if path.is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    model.requires_grad_(False)
    model.config.dtype = dtype
    model.eval()
