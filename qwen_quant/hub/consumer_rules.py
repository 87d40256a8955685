"""Rules about configs, tokenizer and files. Each yields what is wrong; docs/consumers.md says who minds and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from jinja2 import TemplateError

from qwen_quant.checkpoint.manifest import QUANTIZE_CONFIG_FILE, SEALABLE_PATTERNS
from qwen_quant.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from qwen_quant.errors import InputError
from qwen_quant.hub.consumer_tokenizer import open_tokenizer
from qwen_quant.hub.consumers import ALL, SERVERS, Artifact, Rule, read_object
from qwen_quant.inspection import inspect_path

LEGACY_KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method", "dynamic")
CHAT_NAME = re.compile(r"(chat|instruct|thinking)(\b|[-_])", re.IGNORECASE)
TURN_END = "<|im_end|>"
CANARY = "Which city is the capital of France?"
_GPTQ_TYPES: dict[str, type | tuple[type, ...]] = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}


def quant_method(artifact: Artifact) -> Iterator[str]:
    """quantization_config says by which method the weights are packed."""
    known = ("gptq", "bitsandbytes", "16-bit")
    packed = any(name.endswith((".qweight", ".absmax", ".SCB")) for name in artifact.reader.names)
    if artifact.method not in known:
        yield f"quantization_config.quant_method is {artifact.method!r}"
    elif packed and artifact.method == "16-bit":
        yield "config.json has no quantization_config, but the tensors are packed"


def gptq_keys(artifact: Artifact) -> Iterator[str]:
    """bits, group_size, sym and desc_act are there, with their types and possible values."""
    settings = artifact.quantization
    for key, kind in _GPTQ_TYPES.items():
        value = settings.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            yield f"quantization_config.{key} is {value!r}"
    if settings.get("bits") not in (2, 3, 4, 8):
        yield f"bits is {settings.get('bits')!r}; readers know 2, 3, 4 and 8"
    size = settings.get("group_size")
    if isinstance(size, int) and size != -1 and size <= 0:
        yield f"group_size is {size}"
    if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        yield f"checkpoint_format is {settings['checkpoint_format']!r}"


def gptq_legacy_file(artifact: Artifact) -> Iterator[str]:
    """quantize_config.json, which some loaders read instead, says the same as config.json."""
    legacy = read_object(artifact.folder / QUANTIZE_CONFIG_FILE)
    if legacy is None:
        yield f"{QUANTIZE_CONFIG_FILE} is missing"
        return
    for key in LEGACY_KEYS:
        if legacy.get(key) != artifact.quantization.get(key):
            yield f"{key} is {legacy.get(key)!r} in {QUANTIZE_CONFIG_FILE} and another in config.json"


def gptq_asymmetric_v1(artifact: Artifact) -> Iterator[str]:
    """An asymmetric v1 file names a quantizer whose zeros GPTQModel trusts."""
    settings = artifact.quantization
    if settings.get("sym") is not False or settings.get("checkpoint_format", "gptq") != "gptq":
        return
    quantizer = (settings.get("meta") or {}).get("quantizer") or []
    listed = [quantizer] if isinstance(quantizer, str) else list(quantizer)
    versions = [str(name).partition(":")[2] for name in listed if str(name).startswith("gptqmodel:")]
    if not any(version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6 for version in versions):
        yield "asymmetric zeros in the gptq (v1) layout without meta.quantizer naming gptqmodel 6 or later"


def gptq_symmetric(artifact: Artifact) -> Iterator[str]:
    """Servers take symmetric GPTQ only."""
    if artifact.quantization.get("sym") is False:
        yield "it is asymmetric (sym false), which the GPTQ loaders of vLLM and SGLang's Marlin do not take"


def gptq_bits(artifact: Artifact) -> Iterator[str]:
    """Servers' Marlin kernels have 4 and 8 bit."""
    if artifact.quantization.get("bits") not in (4, 8):
        yield f"it has {artifact.quantization.get('bits')} bits; the GPTQ kernels of vLLM and SGLang have 4 and 8"


def gptq_act_order(artifact: Artifact) -> Iterator[str]:
    """Group act-order (desc_act) is not served any more."""
    if artifact.quantization.get("desc_act") is True:
        yield "desc_act is true: vLLM dropped group act-order, and SGLang cannot split it over devices"


def gptq_shapes(artifact: Artifact) -> Iterator[str]:
    """Linears that Marlin-class kernels cannot take run on slower ones."""
    limits = [limit for limit in inspect_path(artifact.folder).limits if limit.target == "Marlin"]
    for limit in limits:
        yield f"{limit.linear} ({limit.layers} layers): {limit.reason}; Marlin kernels cannot take it"


def bnb_keys(artifact: Artifact) -> Iterator[str]:
    """Exactly one of load_in_4bit and load_in_8bit, and a known 4-bit type."""
    settings = artifact.quantization
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    if bool(four) == bool(eight):
        yield f"load_in_4bit is {four!r} and load_in_8bit is {eight!r}: exactly one must be true"
    if four and settings.get("bnb_4bit_quant_type") not in ("nf4", "fp4"):
        yield f"bnb_4bit_quant_type is {settings.get('bnb_4bit_quant_type')!r}"


def bnb_head(artifact: Artifact) -> Iterator[str]:
    """The list of skipped modules replaces bitsandbytes' own, so it must name the head."""
    skipped = artifact.quantization.get("llm_int8_skip_modules")
    head = artifact.spec.family.head
    if skipped is not None and head not in skipped:
        yield f"llm_int8_skip_modules does not name {head!r}, so it would be quantized at load"


def architectures(artifact: Artifact) -> Iterator[str]:
    """Servers choose the model class by `architectures`."""
    names = artifact.config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        yield f"config.json's architectures is {names!r}"


def known_model_type(artifact: Artifact) -> Iterator[str]:
    """transformers has a class of its own for the model type."""
    if artifact.spec.family.model_type == "qwen":
        yield "model_type 'qwen' is not in transformers: import qwen_quant first, or convert it (--to qwen2)"


def rope_theta(artifact: Artifact) -> Iterator[str]:
    """The base of the rotary embedding is written down: readers have different defaults."""
    text = artifact.spec.text_config
    nested = text.get("rope_parameters") or {}
    if "rope_theta" in text or "rope_theta" in nested or artifact.spec.family.model_type == "qwen":
        return
    yield "config.json names no rope_theta, neither by itself nor in rope_parameters"


def remote_code(artifact: Artifact) -> Iterator[str]:
    """Nothing asks the reader to run code from the repository."""
    for name, config in (("config.json", artifact.config), ("tokenizer_config.json", artifact.tokenizer_config)):
        if "auto_map" in config:
            yield f"{name} has auto_map, which asks readers to run code from the repository"
    for name in sorted(artifact.files):
        if name.endswith(".py"):
            yield f"{name} is code"


def weight_index(artifact: Artifact) -> Iterator[str]:
    """The index names every tensor, and no weights lie beside it."""
    listed = {path.name for path in artifact.reader.files}
    for name in sorted(artifact.files):
        if name.endswith(".safetensors") and name not in listed:
            yield f"{name} is no part of the checkpoint, and some readers load every *.safetensors"
    index = read_object(artifact.folder / INDEX_FILE)
    if index is None:
        return
    if SINGLE_FILE in artifact.files:
        yield f"both {SINGLE_FILE} and {INDEX_FILE} are there, and readers choose differently"
    missing = set(artifact.reader.names) - set(index["weight_map"])
    if missing and not any("experts." in name for name in missing):
        yield f"{INDEX_FILE} does not list {len(missing)} tensors, first '{min(missing)}'"


def generation_config(artifact: Artifact) -> Iterator[str]:
    """generation_config.json is there."""
    if artifact.generation is None:
        yield "generation_config.json is missing: servers then sample with their own defaults"


def stop_tokens(artifact: Artifact) -> Iterator[str]:
    """A chat whose turns end in <|im_end|> stops there."""
    if TURN_END not in artifact.chat_template:
        return
    source: dict[str, Any] = artifact.generation or artifact.config
    stops = source.get("eos_token_id", artifact.config.get("eos_token_id"))
    named = set(stops) if isinstance(stops, list) else {stops}
    try:
        ids = open_tokenizer(artifact).encode(TURN_END)
    except InputError:
        return  # which the rule "tokenizer" tells
    if len(ids) == 1 and ids[0] not in named and artifact.tokenizer_config.get("eos_token") != TURN_END:
        yield f"the chat template ends turns with {TURN_END} (token {ids[0]}), which is not among the stop tokens"


def is_chat_model(artifact: Artifact) -> bool:
    """Whether the name of the source says that it is a chat model."""
    return bool(CHAT_NAME.search(artifact.source_id))


def chat_template_present(artifact: Artifact) -> Iterator[str]:
    """A chat model has a chat template (chat endpoints have no default one)."""
    if is_chat_model(artifact) and not artifact.chat_template and not _has_own_chat(artifact):
        yield f"{artifact.source_id} is a chat model and there is no chat template"


def chat_template_absent(artifact: Artifact) -> Iterator[str]:
    """Without a template the chat endpoints refuse."""
    if not is_chat_model(artifact) and not artifact.chat_template and not _has_own_chat(artifact):
        yield "there is no chat template: chat endpoints will refuse, completions work"


def chat_template_renders(artifact: Artifact) -> Iterator[str]:
    """The template renders a plain conversation and keeps what was said."""
    if not artifact.chat_template:
        return
    try:
        text = open_tokenizer(artifact).render(CANARY)
    except InputError:
        return  # which the rule "tokenizer" tells
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        yield f"the chat template fails on a plain question: {error}"
        return
    if CANARY not in text:
        yield "the chat template drops the user's message"


def tokenizer_loads(artifact: Artifact) -> Iterator[str]:
    """The tokenizer loads, and every token has a row in the embedding."""
    try:
        tokenizer = open_tokenizer(artifact)
    except InputError as error:
        yield f"{error.what}: {error.why}"
        return
    rows = artifact.reader.info(f"{artifact.spec.family.embedding}.weight").shape[0]
    largest = max(tokenizer.encode(f"{CANARY} {TURN_END}<|endoftext|>"), default=0)
    if largest >= rows or tokenizer.size > rows:
        yield f"the tokenizer has {tokenizer.size} tokens and the embedding {rows} rows"


def fast_tokenizer(artifact: Artifact) -> Iterator[str]:
    """tokenizer.json, which every server reads without code."""
    if "tokenizer.json" not in artifact.files:
        yield "there is no tokenizer.json: servers would need the source's own tokenizer code"


def licence(artifact: Artifact) -> Iterator[str]:
    """The terms travel with the weights."""
    patterns = [pattern for pattern in SEALABLE_PATTERNS if pattern != "NOTICE*"]
    if not any(PurePath(name).match(pattern) for name in artifact.files for pattern in patterns):
        yield "there is no LICENSE file: copy the source's into the folder"


def _has_own_chat(artifact: Artifact) -> bool:
    """First-generation chats are built by code of the package (chat.py) from `chat_format`."""
    return artifact.spec.family.model_type == "qwen" and "chat_format" in (artifact.generation or {})


RULES = (
    Rule("quant-method", "error", ALL, quant_method),
    Rule("gptq-keys", "error", ALL, gptq_keys, "gptq"),
    Rule("gptq-legacy-file", "error", ALL, gptq_legacy_file, "gptq"),
    Rule("gptq-asymmetric-v1", "error", ("transformers",), gptq_asymmetric_v1, "gptq"),
    Rule("gptq-symmetric", "warning", SERVERS, gptq_symmetric, "gptq"),
    Rule("gptq-bits", "warning", SERVERS, gptq_bits, "gptq"),
    Rule("gptq-act-order", "warning", SERVERS, gptq_act_order, "gptq"),
    Rule("gptq-shapes", "warning", SERVERS, gptq_shapes, "gptq"),
    Rule("bnb-keys", "error", ALL, bnb_keys, "bitsandbytes"),
    Rule("bnb-head", "error", ("transformers",), bnb_head, "bitsandbytes"),
    Rule("architectures", "error", ALL, architectures),
    Rule("model-type", "warning", ("transformers",), known_model_type),
    Rule("rope-theta", "error", ALL, rope_theta),
    Rule("remote-code", "error", ALL, remote_code),
    Rule("weight-index", "error", ALL, weight_index),
    Rule("generation-config", "error", ALL, generation_config),
    Rule("stop-tokens", "warning", ALL, stop_tokens),
    Rule("chat-template", "error", ALL, chat_template_present),
    Rule("chat-endpoint", "warning", SERVERS, chat_template_absent),
    Rule("chat-renders", "error", ALL, chat_template_renders),
    Rule("tokenizer", "error", ALL, tokenizer_loads),
    Rule("fast-tokenizer", "warning", SERVERS, fast_tokenizer),
    Rule("licence", "error", ("Hub",), licence),
)
