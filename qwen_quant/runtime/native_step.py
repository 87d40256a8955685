"""Decoding steps of dense Qwen2 and Qwen3 models in one native call a token (kernels/native_step.c).

A small model spends most of a token between its products: 30 layers of Python and operators cost four times what its
weights do. Prefill stays transformers'; its cache is then continued in place, so both paths share keys and values.
What the step cannot run (other families, other kernels, batches, BF16 activations) is refused with a reason, which
`decode` reports, and runs through transformers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen_quant.kv_cache import PLAIN, STORED
from qwen_quant.runtime.head import Bf16Embedding, Bf16Head
from qwen_quant.runtime.kernels.native import NativeKernel, library
from qwen_quant.runtime.linear import Int4Linear

FAMILIES = ("qwen2", "qwen3")
CACHES = (PLAIN, "int8", STORED)
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length
MOST_GROUPS = 1024
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class _Linear(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("codes", "scales", "zeros", "bias")],
        *[(name, _SIZE) for name in ("rows", "width", "group_size")],
    ]


_PLAIN_STORAGE = ("keys", "values")
_HALVES = ("key_halves", "value_halves")
_CODED = ("key_codes", "value_codes", "key_scales", "value_scales")


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Linear) for name in (*_ATTENTION, *_GATED)],
        *[
            (name, _POINTER)
            for name in ("input_norm", "middle_norm", "query_norm", "key_norm", *_PLAIN_STORAGE, *_HALVES, *_CODED)
        ],
    ]


_COUNTS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "capacity")
_TABLES = ("layer", "embedding", "head", "final_norm", "cosines", "sines")
_BUFFERS = ("state", "normed", "mixed", "wide", "queries", "gates", "scores", "rounded", "units", "sums", "logits")


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, _SIZE) for name in _COUNTS],
        ("epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        *[(name, _POINTER) for name in (*_TABLES, *_BUFFERS)],
    ]


def refusal(model: PreTrainedModel, batch: int, kv_cache: str = PLAIN) -> str:
    """Why `NativeStep` does not run this model for `batch` rows with such a cache; empty when it does."""
    config = model.config
    if kv_cache not in CACHES:
        return f"made for the caches {', '.join(CACHES)}, this is {kv_cache}"
    if config.model_type not in FAMILIES:
        return f"made for {' and '.join(FAMILIES)}, this is {config.model_type}"
    if batch != 1:
        return "made for one row"
    linears = [part for part in model.get_decoder().modules() if isinstance(part, (nn.Linear, Int4Linear))]
    if not linears or not all(isinstance(part, Int4Linear) and _taken(part) for part in linears):
        return "not every linear runs on the native Int4 kernel, with inputs in their own order"
    if not isinstance(model.get_output_embeddings(), Bf16Head) or not isinstance(
        model.get_input_embeddings(), Bf16Embedding
    ):
        return "the head and the embedding are not kept in BF16"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some layers attend to a window"
    if model.get_decoder().rotary_emb.rope_type not in STATIC_ROTATIONS:
        return f"rotation {model.get_decoder().rotary_emb.rope_type!r} depends on the length"
    return _odd_sizes(model)


def _taken(linear: Int4Linear) -> bool:
    kernel = linear.kernel
    return (
        isinstance(kernel, NativeKernel) and linear.order is None and kernel.width // kernel.group_size <= MOST_GROUPS
    )


def _odd_sizes(model: PreTrainedModel) -> str:
    """Why the sizes do not suit the step's vectors of eight, or linears that share an input round it differently."""
    attention, mlp = model.get_decoder().layers[0].self_attn, model.get_decoder().layers[0].mlp
    if model.config.hidden_act not in ("silu", "swish"):
        return f"made for silu, this is {model.config.hidden_act}"
    if any(size % 8 for size in (model.config.hidden_size, model.config.intermediate_size, attention.head_dim)):
        return "a size is no multiple of 8"
    for layer in model.get_decoder().layers:
        attention, mlp = layer.self_attn, layer.mlp
        for shared in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if len({(part.kernel.group_size, part.kernel.width) for part in shared}) > 1:
                return "linears that share an input have different group sizes"
    return ""


class NativeStep:
    """Runs one token after another of one row through the compiled step.

    Keys and values are appended to `storage`, which may hold those of a prompt already.

    Args:
        model: one that `refusal` takes, on the CPU.
        storage: of every layer, contiguous: FP32 or BF16 keys and values [1, kv_heads, capacity, head_dim], or of an
            Int8 cache int8 key codes and value codes of that shape and their FP32 scales [1, kv_heads, capacity, 1].
    """

    def __init__(self, model: PreTrainedModel, storage: list[tuple[Tensor, ...]]) -> None:
        self._kept: list[Any] = [model, storage]  # whose memory the structures point into
        self.capacity = storage[0][0].shape[2]
        decoder, config = model.get_decoder(), model.config
        attention = decoder.layers[0].self_attn
        layers = [self._layer(layer, held) for layer, held in zip(decoder.layers, storage, strict=True)]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        width = attention.head_dim
        kv_heads = config.num_key_value_heads
        cosines, sines = (part[0].float().contiguous() for part in self._angles(decoder))
        tables = ((_Layer * len(layers))(*layers), head.weight, embedding.weight, cosines, sines)
        counts = (len(layers), config.hidden_size, config.num_attention_heads, kv_heads, width)
        self._model = _Model(*counts, config.intermediate_size, head.weight.shape[0], self.capacity)
        self._model.epsilon, self._model.attention_scale = config.rms_norm_eps, attention.scaling
        self._model.layer = ctypes.addressof(tables[0])
        self._model.embedding, self._model.head = embedding.weight.data_ptr(), head.weight.data_ptr()
        self._model.final_norm = self._pointer(decoder.norm.weight)
        self._model.cosines, self._model.sines = cosines.data_ptr(), sines.data_ptr()
        self._kept += tables
        self.logits = self._buffers(decoder, head.weight.shape[0], config.intermediate_size, kv_heads * width)
        self._step, self._threads = library().decode_step, torch.get_num_threads()

    def __call__(self, token: int, position: int) -> int:
        """The likeliest token after `token`, which stands at `position` < capacity; its FP32 scores are in `logits`."""
        next_token: int = self._step(ctypes.addressof(self._model), token, position, self._threads)
        return next_token

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        value = tensor.detach().float().contiguous()
        self._kept.append(value)
        return value.data_ptr()

    def _linear(self, linear: Int4Linear) -> _Linear:
        kernel = linear.kernel
        assert isinstance(kernel, NativeKernel)
        zeros = None if kernel.zeros is None else kernel.zeros.data_ptr()
        sizes = (kernel.out_features, kernel.width, kernel.group_size)
        return _Linear(kernel.codes.data_ptr(), kernel.scales.data_ptr(), zeros, self._pointer(linear.bias), *sizes)

    def _layer(self, layer: Any, storage: tuple[Tensor, ...]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        linears = [self._linear(getattr(attention, name)) for name in _ATTENTION.values()]
        linears += [self._linear(getattr(mlp, name)) for name in _GATED.values()]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        pointers = [self._pointer(None if norm is None else norm.weight) for norm in norms]
        names = {torch.bfloat16: _HALVES, torch.int8: _CODED}.get(storage[0].dtype, _PLAIN_STORAGE)
        assert all(part.is_contiguous() for part in storage)
        held = {name: part.data_ptr() for name, part in zip(names, storage, strict=True)}
        return _Layer(*linears, *pointers, **held)

    def _angles(self, decoder: Any) -> tuple[Tensor, Tensor]:
        """cos and sin FP32 [1, capacity, head_dim] from the model's own rotation."""
        positions = torch.arange(self.capacity)[None]
        cosines, sines = decoder.rotary_emb(torch.empty(1, dtype=torch.float32), positions)
        return cosines, sines

    def _buffers(self, decoder: Any, vocabulary: int, intermediate: int, kv_width: int) -> Tensor:
        """Give the structure its working memory; returns the logits FP32 [vocabulary]."""
        attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
        hidden = decoder.norm.weight.shape[0]
        widths = [linear.kernel.width for linear in (attention.q_proj, attention.o_proj, mlp.down_proj)]
        queries, scores = attention.q_proj.out_features, self._model.heads * (-(-self.capacity // 8) * 8)
        sizes = {"state": hidden, "normed": widths[0], "mixed": widths[1], "wide": widths[2], "queries": queries}
        sizes |= {"gates": max(intermediate, 2 * kv_width), "scores": scores, "rounded": max(widths)}
        sizes |= {"units": MOST_GROUPS, "sums": MOST_GROUPS, "logits": vocabulary}
        made = {
            name: torch.zeros(size, dtype=torch.int16 if name == "rounded" else torch.float32)
            for name, size in sizes.items()
        }
        self._kept.append(made)
        for name, buffer in made.items():
            setattr(self._model, name, buffer.data_ptr())
        return made["logits"]
