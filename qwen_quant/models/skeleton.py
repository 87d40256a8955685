"""A model as transformers defines it, on the meta device, with one decoder block materialised at a time.

Nothing here knows an architecture: the masks, rotary tables and other arguments of every block are recorded by running
the decoder once with its blocks replaced by recorders, and a block is a copy of transformers' own module whose
parameters are filled from a `fetch(name) -> Tensor` callable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qwen_quant.checkpoint.families import ModelSpec
from qwen_quant.environment import cpu_features
from qwen_quant.errors import InputError
from qwen_quant.models import qwen1  # noqa: F401 (registers model_type "qwen" with transformers)
from qwen_quant.models.experts import ExpertList, separate_experts
from qwen_quant.models.hyper import RowFetch, ShardedLookup, add_halves, separate_tables
from qwen_quant.models.qwen1_config import say_auto_map_is_ignored

Fetch = Callable[[str], Tensor]
# What transformers and torch raise for sizes and types that no model can have.
_NO_MODEL = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
TOKEN_IDS = "ple_input_ids"  # a block's argument, in transformers' words


class StoredLinear(nn.Module):
    """A linear that keeps its weight in a compact form and makes it dense when it runs.

    `dense_weights` makes it dense once for many runs.
    """

    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.dense: Tensor | None = None

    def densified(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        weight = self.densified(inputs.dtype) if self.dense is None else self.dense
        return functional.linear(inputs, weight, bias)


class CastLinear(StoredLinear):
    """A linear that keeps its weight [out, in] as stored and casts it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def densified(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return self.weight.to(dtype)


@contextmanager
def dense_weights(block: nn.Module, names: Iterable[str], dtype: torch.dtype) -> Iterator[None]:
    """Hold the linears `names` of the block dense in `dtype` while many batches pass through them."""
    linears = [linear for linear in map(block.get_submodule, names) if isinstance(linear, StoredLinear)]
    for linear in linears:
        linear.dense = linear.densified(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.dense = None


class _Recorder(nn.Module):
    """Stands in for a block: returns its input and remembers the other arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        for name in ("attention_type", "layer_type"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the keyword arguments, pass the hidden states through."""
        self.kwargs = kwargs
        return hidden_states


def compute_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the hardware multiplies it natively (CUDA, AVX512-BF16, AMX), else FP32."""
    if device.type == "cuda":
        return torch.bfloat16
    features = cpu_features()
    return torch.bfloat16 if features["avx512_bf16"] or features["amx_bf16"] else torch.float32


def meta_model(spec: ModelSpec) -> PreTrainedModel:
    """transformers' own model of `spec` on the meta device, experts apart (InputError when its config does not fit).

    A vision model is built whole, so that its modules carry the names on disk; `get_decoder()` is its text decoder.
    """
    values = {key: value for key, value in spec.config.items() if key not in ("quantization_config", "auto_map")}
    if spec.config.get("auto_map"):
        say_auto_map_is_ignored()
    try:
        config = CONFIG_MAPPING[spec.family.model_type].from_dict(values)
        auto = AutoModelForImageTextToText if spec.family.has_vision else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except _NO_MODEL as error:
        raise InputError(
            "config.json does not describe a model that transformers can build", str(error), "fetch config.json again"
        ) from error
    separate_experts(model)
    separate_tables(model)
    return model.eval()


def ordinary_linears(block: nn.Module, prefix: str = "") -> list[str]:
    """Names of the block's stored linears that are not a routed expert's: those that every token passes.

    Args:
        prefix: where `block` is only a module of a block, its name there, with a dot.
    """
    experts = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, ExpertList))
    names = [name for name, module in block.named_modules() if isinstance(module, StoredLinear)]
    return [prefix + name for name in names if not name.startswith(experts)]


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter a checkpoint of `model` must hold (tied copies left out)."""
    tied = set(model.all_tied_weights_keys)
    # Buffers of integers are constants that transformers computes from config.json.
    persistent = {name: tuple(v.shape) for name, v in model.state_dict().items() if v.is_floating_point()}
    return {name: shape for name, shape in persistent.items() if name not in tied}


class Skeleton:
    """Blocks and their call arguments for one ModelSpec.

    Args:
        spec: architecture.
        device: where blocks live.
        dtype: compute dtype of activations and of everything that is not a linear.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self.model = meta_model(spec)
        self._layers_name = spec.family.layers_prefix.rsplit(".", 1)[-1]
        self._blocks = list(getattr(self.model.get_decoder(), self._layers_name))
        self._contexts: dict[int, list[dict[str, Any]]] = {}

    def context(self, layer: int, sequence_length: int, ids: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments that block `layer` gets for unpadded rows of `sequence_length` tokens.

        Args:
            ids: int64 [rows, sequence_length], the rows' tokens; needed by blocks that look something up by them.
        """
        if sequence_length not in self._contexts:
            self._contexts = {sequence_length: self._record(sequence_length)}
        found = self._contexts[sequence_length][layer]
        if ids is not None and found.get(TOKEN_IDS) is not None:
            return {**found, TOKEN_IDS: ids.to(self.device)}
        return found

    def _record(self, sequence_length: int) -> list[dict[str, Any]]:
        decoder = self.model.get_decoder()
        recorders = [_Recorder(block) for block in self._blocks]
        norm_name = self.spec.family.final_norm.rsplit(".", 1)[-1]
        norm, rotary = getattr(decoder, norm_name), decoder.rotary_emb
        setattr(decoder, self._layers_name, nn.ModuleList(recorders))
        setattr(decoder, norm_name, nn.Identity())
        decoder.rotary_emb = type(rotary)(config=decoder.config).to(self.device)
        embeds = torch.zeros(1, sequence_length, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device=self.device)
        own = {TOKEN_IDS: tokens} if self.spec.family.lookup else {}
        try:
            with torch.no_grad():
                decoder(inputs_embeds=embeds, use_cache=False, **own)
        finally:
            decoder.rotary_emb = rotary
            setattr(decoder, self._layers_name, nn.ModuleList(self._blocks))
            setattr(decoder, norm_name, norm)
        return [recorder.kwargs for recorder in recorders]

    def block(self, layer: int, fetch: Fetch, rows: RowFetch | None = None) -> nn.Module:
        """Block `layer` with its parameters from `fetch(full disk name)`: linears as stored, the rest in `dtype`.

        Args:
            rows: (full disk name, int64 indices) -> those rows of a matrix, for tables too large to be held; without
                it the parts of a table are fetched one at a time.
        """
        block = copy.deepcopy(self._blocks[layer])
        prefix = self.spec.layer_prefix(layer)
        for name, module in block.named_modules():
            if isinstance(module, ShardedLookup):
                read = rows or (lambda full_name, indices: fetch(full_name)[indices])
                module.read_rows(f"{prefix}{name}", read, (self.device, self.dtype))
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                bias = fetch(f"{prefix}{name}.bias").to(self.device) if module.bias is not None else None
                block.set_submodule(name, CastLinear(fetch(f"{prefix}{name}.weight").to(self.device), bias))
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                owner, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                value = fetch(prefix + name).to(self.device, self.dtype)
                setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        add_halves(block)
        return block.to(self.device).eval()

    def final_norm(self, fetch: Fetch) -> nn.Module:
        """What stands in front of the head, in `dtype`: a normalization, or what mixes the streams."""
        name = self.spec.family.final_norm
        norm = copy.deepcopy(self.model.get_submodule(name))
        for leaf, _ in list(norm.named_parameters()):
            value = fetch(f"{name}.{leaf}").to(self.device, self.dtype)
            owner = norm.get_submodule(leaf.rpartition(".")[0])
            setattr(owner, leaf.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        return norm.eval()

    def head_name(self) -> str:
        """Disk name of the output head's weight (the embedding's when they are tied)."""
        family = self.spec.family
        return (family.embedding if self.spec.tied_head else family.head) + ".weight"
