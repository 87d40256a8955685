"""Rules about the tensors: names, dtypes, shapes, zeros, groups, and which modules readers take for quantized.

qzeros, scales and g_idx are read whole, one linear at a time; qweight is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open

from qwen_quant.checkpoint.families import SparseBlock, SubBlock
from qwen_quant.errors import InputError
from qwen_quant.hub.consumers import ALL, SERVERS, Artifact, Rule
from qwen_quant.inspection import inspect_path
from qwen_quant.packing import SUFFIXES, packed_specs, unpack_weight

_NEGATIVE = "-:"


def safetensors_format(artifact: Artifact) -> Iterator[str]:
    """Every weight file says that its tensors are PyTorch's."""
    for path in artifact.reader.files:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != "pt":
            yield f"{path.name} has no metadata {{'format': 'pt'}}"


def tensors_complete(artifact: Artifact) -> Iterator[str]:
    """Every linear is there, whole or packed, and no tensor is unknown."""
    accounting = inspect_path(artifact.folder).accounting
    for name in accounting.missing:
        yield f"'{name}' is missing or incomplete"
    for name in accounting.unaccounted:
        yield f"'{name}' is a tensor that no reader asks for"


def gptq_tensors(artifact: Artifact) -> Iterator[str]:
    """Each packed linear has its four tensors with the dtypes and shapes of the layout, and no 16-bit copy."""
    bits, group_size = _bits(artifact), int(artifact.quantization.get("group_size", -1))
    for name in quantized(artifact):
        words, out_features = artifact.reader.info(f"{name}.qweight").shape
        try:
            expected = packed_specs(words * 32 // bits, out_features, bits, group_size)
        except InputError as error:
            yield f"'{name}': {error.what}"
            continue
        for suffix in SUFFIXES:
            if f"{name}.{suffix}" not in artifact.reader:
                yield f"'{name}.{suffix}' is missing"
                continue
            info = artifact.reader.info(f"{name}.{suffix}")
            if (info.dtype, info.shape) != expected[suffix]:
                yield f"'{info.name}' is {info.dtype} {info.shape}, the layout asks for {expected[suffix]}"
        if f"{name}.weight" in artifact.reader:
            yield f"'{name}' is there twice, packed and as .weight"


def gptq_zeros(artifact: Artifact) -> Iterator[str]:
    """qzeros follow the declared convention: the middle of the grid where sym, never a zero of 0 in v1."""
    bits, layout = _bits(artifact), str(artifact.quantization.get("checkpoint_format", "gptq"))
    for name in _with(artifact, "qzeros"):
        try:
            zeros = _zeros(artifact.reader.read(f"{name}.qzeros"), bits, layout)
        except RuntimeError:
            yield f"'{name}.qzeros' cannot be unpacked at {bits} bits"
            continue
        if artifact.quantization.get("sym") is True:
            if bool((zeros != 2 ** (bits - 1)).any()):
                yield f"'{name}.qzeros' is not {2 ** (bits - 1)} throughout, read as {layout}, though sym is true"
        elif layout == "gptq" and bool((zeros == 0).any()):
            yield f"'{name}.qzeros' holds a zero point of 0, which readers of the v1 layout decode differently"


def gptq_scales(artifact: Artifact) -> Iterator[str]:
    """Scales are finite (a negative one is fine: it mirrors the grid)."""
    for name in _with(artifact, "scales"):
        scales = artifact.reader.read(f"{name}.scales")
        if not bool(torch.isfinite(scales).all()):
            yield f"'{name}.scales' holds NaN or infinity"


def gptq_groups(artifact: Artifact) -> Iterator[str]:
    """Without desc_act the groups are consecutive columns: readers then ignore g_idx."""
    size = int(artifact.quantization.get("group_size", -1))
    for name in _with(artifact, "g_idx"):
        groups = artifact.reader.read(f"{name}.g_idx")
        plain = torch.arange(groups.numel()) // (size if size > 0 else groups.numel())
        if artifact.quantization.get("desc_act") is False:
            if not torch.equal(groups.long(), plain):
                yield f"'{name}.g_idx' is not in order although desc_act is false, and servers would ignore it"
        elif groups.numel() and (int(groups.min()) < 0 or int(groups.max()) > int(plain[-1])):
            yield f"'{name}.g_idx' names a group that does not exist"


def gptq_dynamic(artifact: Artifact) -> Iterator[str]:
    """`dynamic` excludes every 16-bit linear, matched from the start of the name, and no packed one."""
    dynamic = artifact.quantization.get("dynamic") or {}
    patterns = [pattern.removeprefix(_NEGATIVE) for pattern in dynamic if pattern.startswith(_NEGATIVE)]
    for name in unquantized(artifact):
        if not any(re.match(pattern, name) for pattern in patterns):
            yield f"'{name}' stays 16-bit and no pattern of quantization_config.dynamic excludes it"
    for name in quantized(artifact):
        if any(re.match(pattern, name) for pattern in patterns):
            yield f"'{name}' is packed, but a pattern of quantization_config.dynamic excludes it"


def gptq_modules(artifact: Artifact) -> Iterator[str]:
    """`modules_in_block_to_quantize`, needed where a block keeps 16-bit linears, ends exactly the packed names."""
    prefix = artifact.spec.family.layers_prefix + "."
    kept = [name for name in unquantized(artifact) if name.startswith(prefix)]
    listed = _flat(artifact.quantization.get("modules_in_block_to_quantize") or [])
    if not listed:
        if kept:
            yield f"'{kept[0]}' stays 16-bit and modules_in_block_to_quantize is missing: optimum would replace it"
        return
    for name in quantized(artifact):
        if not name.endswith(tuple(listed)):
            yield f"'{name}' is packed and modules_in_block_to_quantize does not name it"
    for name in kept:
        if name.endswith(tuple(listed)):
            yield f"'{name}' stays 16-bit, but modules_in_block_to_quantize names it"


def gptq_merged(artifact: Artifact) -> Iterator[str]:
    """Linears that servers merge into one (q/k/v, gate/up) are all packed or all 16-bit."""
    packed = set(quantized(artifact))
    for layer, halves in enumerate(artifact.spec.blocks):
        prefix = artifact.spec.layer_prefix(layer)
        parts: list[SubBlock] = []
        for half in halves:
            experts = [half.expert(k) for k in range(half.count)] if isinstance(half, SparseBlock) else [half]
            parts += [*experts, *([half.shared] if isinstance(half, SparseBlock) and half.shared else [])]
        for part in parts:
            states = {prefix + name in packed for name in part.inputs}
            if len(states) > 1:
                yield f"of {prefix}{', '.join(part.inputs)} some are packed and some are not; servers merge them"


def _zeros(qzeros: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    """Zero points uint8 [out, G] of one linear, unpacked by the package's one reader of them (without any codes)."""
    nothing = torch.empty(0, 0, dtype=torch.int32)
    return unpack_weight(
        {"qweight": nothing, "qzeros": qzeros, "scales": nothing, "g_idx": nothing}, bits, layout
    ).zeros


def quantized(artifact: Artifact) -> list[str]:
    """Names of the packed linears."""
    return [name.removesuffix(".qweight") for name in artifact.reader.names if name.endswith(".qweight")]


def unquantized(artifact: Artifact) -> list[str]:
    """Names of the linears (matrices that are neither embedding, head nor normalization) that stay 16-bit."""
    outside = {f"{artifact.spec.family.embedding}.weight", f"{artifact.spec.family.head}.weight"}
    found = []
    for name in artifact.reader.names:
        is_matrix = name.endswith(".weight") and len(artifact.reader.info(name).shape) == 2
        if is_matrix and name not in outside and not name.endswith(("norm.weight", "embed_tokens.weight")):
            found.append(name.removesuffix(".weight"))
    return found


def _with(artifact: Artifact, suffix: str) -> Iterator[str]:
    """Packed linears that have this tensor (an absent one is gptq-tensors' finding)."""
    return (name for name in quantized(artifact) if f"{name}.{suffix}" in artifact.reader)


def _bits(artifact: Artifact) -> int:
    return int(artifact.quantization.get("bits", 4))


def _flat(names: list[Any]) -> list[str]:
    """optimum writes a list of lists of names, GPTQModel one list."""
    return [str(name) for entry in names for name in (entry if isinstance(entry, list) else [entry])]


TENSOR_RULES = (
    Rule("safetensors-format", "error", ("transformers",), safetensors_format),
    Rule("tensors-complete", "error", ALL, tensors_complete),
    Rule("gptq-tensors", "error", ALL, gptq_tensors, "gptq"),
    Rule("gptq-zeros", "error", ALL, gptq_zeros, "gptq"),
    Rule("gptq-scales", "error", ALL, gptq_scales, "gptq"),
    Rule("gptq-groups", "error", SERVERS, gptq_groups, "gptq"),
    Rule("gptq-dynamic", "error", SERVERS, gptq_dynamic, "gptq"),
    Rule("gptq-modules", "error", ("transformers",), gptq_modules, "gptq"),
    Rule("gptq-merged", "error", SERVERS, gptq_merged, "gptq"),
)
