"""First-generation Qwen (model_type "qwen") as a transformers model: no repository code is run.

Module names are those of the published weights (`qwen1_layers` has the blocks). Past the trained length (`qwen1_rope`),
which only inference does:
- a request's NTK factors are settled at its prefill and kept as `ntk_alphas` on its cache, so one model may serve many
  requests at once. `ntk_alpha` given to `forward` replaces them: a prompt that is fed in chunks needs the factor of the
  whole prompt from its first chunk on, and `generate(prefill_chunk_size=...)` passes it by itself.
- positions are `position_ids` where they are given, as `generate` does: a left-padded row then gets what it would get
  alone. Without them they are slots, padding included, as in the original.

With use_cache_quantization in the config, a cache that is made here or by `generate` is the original's Int8 one.

Importing this module registers the classes, and the tokenizer, with transformers' Auto classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from qwen_quant.kv_cache import PLAIN, make_cache
from qwen_quant.models.qwen1_config import QWenConfig
from qwen_quant.models.qwen1_layers import QWenAttention, QWenBlock, QWenRMSNorm
from qwen_quant.models.qwen1_rope import QWenRotaryEmbedding, as_alphas, prefill_alphas
from qwen_quant.qwen1_auto import register_auto_tokenizer

GivenAlphas = float | Sequence[float] | Tensor


def new_cache(config: QWenConfig) -> Cache:
    """An empty cache of the kind that the config asks for: the original's Int8 one, or the plain one."""
    return make_cache(config, "qwen" if config.use_cache_quantization else PLAIN)


class QWenPreTrainedModel(PreTrainedModel):
    """What the two models share with transformers."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}
    # Recomputed buffers of the original code, saved by some of its versions.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"attn\.masked_bias", r"attn\.bias$"]


class QWenModel(QWenPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = QWenRotaryEmbedding(config)
        self.h = nn.ModuleList([QWenBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0913 (transformers' signature)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        ntk_alpha: GivenAlphas | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [rows, tokens, hidden] of `input_ids` (int64 [rows, tokens]) or `inputs_embeds`.

        Args:
            attention_mask: 1 for real tokens [rows, cached and new tokens], or one that is ready to use (4 dimensions).
            position_ids: int64 [rows or 1, tokens]; slots where absent.
            past_key_values: the request's cache, extended in place.
            ntk_alpha: the request's NTK factor, or one per row; settled at the prefill where absent.

        Errors: ValueError for arguments that do not go together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = past + hidden.shape[1]
        alphas = self._alphas(ntk_alpha, past, (hidden.shape[0], length), attention_mask, position_ids, past_key_values)
        slots = torch.arange(past, length, device=hidden.device).unsqueeze(0) if position_ids is None else position_ids
        logn = self.config.use_logn_attn and not self.training and length > self.config.seq_length
        windows = [self.config.window_of(layer) for layer in range(len(self.h))]
        contexts = {}
        for window in dict.fromkeys(windows):
            contexts[window] = {
                "attention_mask": self._mask(window, hidden, attention_mask, past_key_values, position_ids),
                "position_embeddings": self.rotary_emb(slots, alphas, window, logn=logn),
            }
        hidden = self.drop(hidden)
        for block, window in zip(self.h, windows, strict=True):
            hidden = block(hidden, past_key_values=past_key_values, **contexts[window], **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _alphas(
        self,
        given: GivenAlphas | None,
        past: int,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> tuple[float, ...]:
        """NTK factors of this call, for all rows or one per row; `shape` is (rows, cached and new tokens)."""
        if self.training:
            return (1.0,)
        if given is not None:
            alphas = as_alphas(given)
        elif past == 0:
            alphas = prefill_alphas(self.config, shape[1], attention_mask, position_ids)
        elif hasattr(cache, "ntk_alphas"):
            alphas = cache.ntk_alphas  # type: ignore[union-attr]
        elif past <= self.config.seq_length or not self.config.use_dynamic_ntk:
            alphas = (1.0,)
        else:
            raise ValueError(
                f"a cache of {past} tokens that this model did not fill is longer than seq_length "
                f"{self.config.seq_length}: its NTK factor is not known; give ntk_alpha"
            )
        if len(alphas) not in (1, shape[0]):
            raise ValueError(
                f"{len(alphas)} NTK factors for {shape[0]} rows: a cache serves the rows it was filled with"
            )
        if cache is not None:
            cache.ntk_alphas = alphas
        return alphas

    def _mask(
        self,
        window: int | None,
        hidden: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None,
    ) -> Any:
        """The mask of layers with this window, as the attention implementation wants it (None: plain causal)."""
        arguments = {
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        if window is None:
            return create_causal_mask(config=self.config, **arguments)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_windows needs an attention_mask [rows, tokens]")
        config = copy.copy(self.config)
        config.sliding_window = window  # where transformers looks for it; ours differ by layer
        return create_sliding_window_causal_mask(config=config, **arguments)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """The language model. The class name is the one published configs and other runtimes use."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913 (transformers' signature)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        ntk_alpha: GivenAlphas | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [rows, tokens or logits_to_keep, vocabulary], and the loss where there are labels.

        Args:
            labels: int64 [rows, tokens], -100 where no loss is taken; the mean cross entropy of the next tokens.
            Others: as `QWenModel.forward`.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ntk_alpha=ntk_alpha,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Keep `generate`'s mask [rows, tokens] as it is: the rows' lengths are read from it."""
        return attention_mask

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        """transformers' own; where it would make a plain cache, the config's use_cache_quantization decides."""
        free = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if free and generation_config.use_cache is not False and self.config.use_cache_quantization:
            model_kwargs["past_key_values"] = new_cache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """transformers' prefill; one in chunks gets the NTK factors of the whole prompt, not of its first chunk."""
        cache = model_kwargs.get("past_key_values")
        fresh = cache is not None and int(cache.get_seq_length()) == 0
        if generation_config.prefill_chunk_size is not None and fresh and model_kwargs.get("ntk_alpha") is None:
            mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
            alphas = prefill_alphas(self.config, input_ids.shape[1], mask, positions)
            model_kwargs["ntk_alpha"] = torch.tensor(alphas)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)


def register() -> None:
    """Tell transformers' Auto classes about model_type "qwen" (done once, when this module is imported)."""
    AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    register_auto_tokenizer(QWenConfig)


register()
