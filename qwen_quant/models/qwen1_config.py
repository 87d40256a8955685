"""Configuration of first-generation Qwen (model_type "qwen") as a transformers class.

The field names are those of the published config.json files; `FIRST_RELEASE_KEYS` are the ones of August 2023, which
mean the same. `auto_map` is dropped: this class and `qwen1.py` are what it pointed at.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from qwen_quant.checkpoint.families import FIRST_RELEASE_KEYS

logger = logging.getLogger(__name__)

# Keys of the published files that decide nothing here: data types come from the weights, kernels from transformers.
INERT_KEYS = frozenset(
    "activation apply_residual_connection_post_layernorm attn_implementation bf16 bias_dropout_fusion dtype "
    "experts_implementation fp16 fp32 model_type name_or_path num_labels onnx_safe output_attentions params_dtype "
    "per_layer_config pos_emb quantization_config resid_dropout_prob resid_pdrop softmax_in_fp32 tokenizer_class "
    "tokenizer_type torch_dtype use_cache_kernel use_flash_attn".split()
)
# Architecture switches of the first release that every published checkpoint sets the same way.
ONLY_VALUES = {"activation": "swiglu", "apply_residual_connection_post_layernorm": False, "pos_emb": "rotary"}


@functools.cache
def say_auto_map_is_ignored() -> None:
    """Log, once per process, that the folder's own Python is not run."""
    logger.warning("auto_map in config.json is ignored: the model is built in, the repository's Python is not run")


@functools.cache
def _say_unknown(keys: tuple[str, ...]) -> None:
    logger.warning("config.json has keys that no first-generation Qwen model reads: %s", ", ".join(keys))


@strict
class QWenConfig(PreTrainedConfig):
    """Architecture of a first-generation Qwen model.

    Attributes:
        intermediate_size: twice the width of the MLP (as published: 22016 for a width of 11008).
        kv_channels: width of one attention head; times num_attention_heads it must be hidden_size.
        seq_length: the trained length S, in tokens; NTK and LogN act beyond it.
        max_position_embeddings: as published; decides nothing.
        rotary_emb_base, rotary_pct: RoPE base, and the share of each head that is rotated.
        use_dynamic_ntk, use_logn_attn: see `qwen1_rope`.
        no_bias: whether all linears but c_attn lack a bias.
        scale_attn_weights: whether scores are divided by sqrt(kv_channels).
        use_cache_quantization: whether keys and values are cached in the original's Int8 scheme (`kv_cache`).
        attention_windows: tokens that each layer's queries see, themselves included (None: all before them); one entry
            per layer, or None for full attention everywhere. NTK and LogN of a layer then count what it sees.

    Errors: ValueError (StrictDataclassError for a wrong type) for values no such model can have.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int | None = None
    intermediate_size: int = 22016
    seq_length: int = 8192
    max_position_embeddings: int = 8192
    rotary_emb_base: int | float = 10000
    rotary_pct: int | float = 1.0
    layer_norm_epsilon: float = 1e-6
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    scale_attn_weights: bool = True
    emb_dropout_prob: int | float = 0.0
    attn_dropout_prob: int | float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    use_cache_quantization: bool = False
    tie_word_embeddings: bool = False
    attention_windows: list[int | None] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.pop("auto_map", None) is not None:
            say_auto_map_is_ignored()
        self._read_first_release(kwargs)
        for key, only in ONLY_VALUES.items():
            if kwargs.get(key, only) != only:
                raise ValueError(f"{key} is {kwargs[key]!r}; only {only!r} was ever released")
        known = INERT_KEYS | set(GenerationConfig._get_default_generation_params())
        if unknown := tuple(sorted(key for key in kwargs if key not in known and not key.startswith("_"))):
            _say_unknown(unknown)
        if self.kv_channels is None:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        self._check()
        super().__post_init__(**kwargs)

    def _read_first_release(self, kwargs: dict[str, Any]) -> None:
        """Take the old names out of `kwargs` (ValueError when a new name says otherwise)."""
        for old, new in FIRST_RELEASE_KEYS.items():
            if (value := kwargs.pop(old, None)) is None:
                continue
            default = type(self).__dataclass_fields__[new].default
            given = getattr(self, new)
            # vocab_size counts the tokens, padded_vocab_size the rows of the matrices: both may be there.
            if given not in (default, value) and old != "padded_vocab_size":
                raise ValueError(f"{old} is {value!r} but {new} is {given!r}")
            setattr(self, new, value)

    def _check(self) -> None:
        """Sizes fit each other (ValueError otherwise)."""
        assert self.kv_channels is not None
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"kv_channels {self.kv_channels} x num_attention_heads {self.num_attention_heads} is not "
                f"hidden_size {self.hidden_size}"
            )
        if self.intermediate_size % 2 or self.rotary_dim % 2 or self.rotary_dim < 4:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} and rotary width {self.rotary_dim} must be even"
            )
        if self.seq_length < 2:
            raise ValueError(f"seq_length is {self.seq_length}")
        windows = self.attention_windows
        if windows is not None and (
            len(windows) != self.num_hidden_layers or any(w is not None and w < 1 for w in windows)
        ):
            raise ValueError(
                f"attention_windows needs a positive number or null for each of {self.num_hidden_layers} layers"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int((self.kv_channels or 0) * self.rotary_pct)

    def window_of(self, layer: int) -> int | None:
        """Tokens that the queries of `layer` see, None for all before them."""
        return None if self.attention_windows is None else self.attention_windows[layer]
