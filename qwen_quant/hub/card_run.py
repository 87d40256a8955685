"""How to load, serve and make this artifact: only commands that are right for what is in it.

Rules, each with where it is known from:
- vLLM's GPTQ reader takes symmetric weights of 4 or 8 bits without desc_act, and refuses the rest (0.32, run here);
- where a shape does not fit Marlin kernels vLLM falls back to ones that compute in FP16 only; SGLang's GPTQ goes
  through Marlin, symmetric, 4 or 8 bits (its gptq.py);
- neither knows first-generation Qwen without remote code, which an artifact does not carry;
- vLLM reads bitsandbytes folders by their config.json (its documentation); SGLang has not been checked.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from qwen_quant.checkpoint.identity import weights_sha256_of
from qwen_quant.hub.card_facts import CardFacts, Made
from qwen_quant.hub.card_markdown import code, fence, plain
from qwen_quant.hub.card_words import say
from qwen_quant.hub.download import HUB_ID
from qwen_quant.recipe import BnbConfig, CalibrationConfig, GPTQConfig, RunConfig

SERVED_BITS = (4, 8)
MARLIN = "Marlin"
FIRST_GENERATION = "qwen"
# Families that transformers' own GPTQ reader (optimum, gptqmodel) takes as they are: plain dense decoders.
STOCK_FAMILIES = ("qwen2", "qwen3")
_GPTQ_FLAGS = {
    "bits": "--bits",
    "group_size": "--group-size",
    "damp_percent": "--damp-percent",
    "order": "--order",
    "scales": "--scales",
    "checkpoint_format": "--format",
    "expert_policy": "--expert-policy",
    "expert_min_tokens": "--expert-min-tokens",
}
_GPTQ_SWITCHES = {
    ("sym", False): "--asym",
    ("desc_act", True): "--desc-act",
    ("asymmetric_calibration", False): "--no-asymmetric-calibration",
    ("rounding_only", True): "--rounding-only",
}
_BNB_FLAGS = {
    "quant_type": "--quant-type",
    "block_size": "--block-size",
    "compute_dtype": "--compute-dtype",
    "int8_threshold": "--int8-threshold",
}


def use_section(facts: CardFacts, language: str) -> list[str]:
    """transformers, vLLM, SGLang."""
    parts = [f"## {say(language, 'use')}", f"### {say(language, 'use_transformers')}", *_transformers(facts, language)]
    parts += ["### vLLM", *_vllm(facts, language)]
    return [*parts, "### SGLang", *_sglang(facts, language)]


def needs_import(facts: CardFacts) -> bool:
    """Whether `import qwen_quant` belongs to the snippet: always, but for bitsandbytes folders of known families."""
    return facts.made.method != "bitsandbytes" or facts.model_type == FIRST_GENERATION


def _transformers(facts: CardFacts, language: str) -> list[str]:
    if facts.model_type == FIRST_GENERATION:
        key = "use_qwen1"
    elif facts.made.method == "bitsandbytes":
        key = "use_bnb"
    else:
        key = "use_gptq" if facts.model_type in STOCK_FAMILIES else "use_gptq_own"
    install = [say(language, key)]
    if facts.made.method == "bitsandbytes" and key != "use_bnb":
        install.append(say(language, "use_bnb"))
    return [*install, fence("python", snippet(facts, language))]


def snippet(facts: CardFacts, language: str) -> str:
    """A program that loads the artifact and generates one answer."""
    remark = "  # leave this out where gptqmodel is installed" if facts.model_type in STOCK_FAMILIES else ""
    first = [f"import qwen_quant{remark}", ""] if needs_import(facts) else []
    return program(facts.target, language, chat=facts.has_chat_template, first=first)


def program(target: str, language: str, *, chat: bool, first: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """A program that loads `target` with transformers and generates one answer, through the chat template with `chat`.

    `first` are lines after the imports; `options` further keywords of both `from_pretrained`.
    """
    more = "".join(f", {option}" for option in options)
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", "", *first]
    lines += [
        f"name = {quoted(plain(target))}",
        f"tokenizer = AutoTokenizer.from_pretrained(name{more})",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'model = AutoModelForCausalLM.from_pretrained(name{more}, dtype="auto", device_map=device)',
        "",
    ]
    if chat:
        lines += [
            chat_line(language),
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        lines.append(f'inputs = tokenizer({prompt(language)}, return_tensors="pt").to(model.device)')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """`text` as a string of a program."""
    return json.dumps(text, ensure_ascii=False)


def prompt(language: str) -> str:
    """The question of every example, as a string of a program."""
    return quoted(say(language, "prompt"))


def chat_line(language: str) -> str:
    """The line that makes a conversation of it."""
    return f'messages = [{{"role": "user", "content": {prompt(language)}}}]'


def refusal(facts: CardFacts, runtime: str) -> str:
    """The key of the text that says why there is no command for `runtime` ("vLLM", "SGLang"); "" when there is one."""
    config = facts.made.config
    if facts.model_type == FIRST_GENERATION:
        return "not_qwen1" if isinstance(config, GPTQConfig) else "not_qwen1_bnb"
    if isinstance(config, BnbConfig):
        return "not_bnb" if runtime == "SGLang" else ""
    if not config.sym:
        return "not_asym" if runtime == "vLLM" else "not_asym_sglang"
    if config.desc_act:
        return "not_desc_act"
    if config.bits not in SERVED_BITS:
        return "not_bits"
    return "not_shapes" if runtime == "SGLang" and not _fits_marlin(facts) else ""


def _refused(facts: CardFacts, runtime: str, key: str, language: str) -> list[str]:
    bits = getattr(facts.made.config, "bits", "")
    told = [say(language, key, runtime=runtime, bits=bits)]
    if key == "not_qwen1":
        name = PurePath(facts.target).name
        told.append(
            fence("bash", shlex.join(["qwen-quant", "convert", facts.target, f"./{name}-qwen2", "--to", "qwen2"]))
        )
    return told


def _vllm(facts: CardFacts, language: str) -> list[str]:
    key = refusal(facts, "vLLM")
    if key:
        return _refused(facts, "vLLM", key, language)
    gptq = isinstance(facts.made.config, GPTQConfig)
    half = gptq and not _fits_marlin(facts)
    command = ["vllm", "serve", plain(facts.target), *(["--dtype", "float16"] if half else [])]
    notes = [say(language, "float16_shapes")] if half else []
    notes += [] if gptq else [say(language, "needs_bitsandbytes")]
    return [fence("bash", shlex.join(command)), *notes]


def _sglang(facts: CardFacts, language: str) -> list[str]:
    key = refusal(facts, "SGLang")
    if key:
        return _refused(facts, "SGLang", key, language)
    command = ["python", "-m", "sglang.launch_server", "--model-path", plain(facts.target)]
    return [fence("bash", shlex.join(command))]


def _fits_marlin(facts: CardFacts) -> bool:
    return all(limit.target != MARLIN for limit in facts.inspected.limits)


def reproduce_section(facts: CardFacts, language: str) -> list[str]:
    """The command that made the weights, and what of its input is not public."""
    parts = [
        f"### {say(language, 'reproduce')}",
        say(language, "reproduce_note"),
        fence("bash", reproduce_command(facts)),
    ]
    return [*parts, *private_inputs(facts.made, language)]


def private_inputs(made: Made, language: str, *, text_key: str = "reproduce_text") -> list[str]:
    """How to recognize what of the command's input is a local file; `text_key` is the sentence about the text."""
    parts = []
    if not HUB_ID.fullmatch(made.source_id):
        parts.append(say(language, "reproduce_source", sha256=weights_sha256_of(made.source_sha256)))
    if made.calibration is not None and made.calibration.source != "bundled":
        text = code(PurePath(made.calibration.source).name)
        parts.append(say(language, text_key, text=text, sha256=made.calibration.sha256))
    return parts


def reproduce_command(facts: CardFacts) -> str:
    """One command line with every setting that is not the default, broken after options."""
    return quantize_command(facts.made, f"./{plain(facts.name)}")


def quantize_command(made: Made, out: str) -> str:
    """The command that makes `out` as `made` says."""
    local = not HUB_ID.fullmatch(made.source_id)
    model = f"./{plain(made.source_id)}" if local else made.source_id
    if made.revision is not None and not local:
        model += f"@{made.revision}"
    gptq = isinstance(made.config, GPTQConfig)
    pairs = _gptq_options(made, made.config) if isinstance(made.config, GPTQConfig) else _bnb_options(made.config)
    pairs += _shard_option(made)
    head = ["qwen-quant", "gptq" if gptq else "bnb", model, out]
    return " \\\n    ".join([shlex.join(head), *(shlex.join(pair) for pair in pairs)])


def _shard_option(made: Made) -> list[list[str]]:
    """--max-shard-size where the files were cut at another size than by default: their bytes depend on it."""
    size = made.max_shard_size_bytes
    return [] if size in (None, RunConfig().max_shard_size_bytes) else [["--max-shard-size", str(size)]]


def _gptq_options(made: Made, config: GPTQConfig) -> list[list[str]]:
    default, found = GPTQConfig(), []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _GPTQ_FLAGS and (
            value != getattr(default, field.name) or field.name in ("bits", "group_size")
        ):
            found.append([_GPTQ_FLAGS[field.name], str(value)])
        elif (field.name, value) in _GPTQ_SWITCHES:
            found.append([_GPTQ_SWITCHES[field.name, value]])
    return found + _calibration_options(made) + ([["--device", made.compute[0]]] if made.compute else [])


def _calibration_options(made: Made) -> list[list[str]]:
    calibration, default = made.calibration, CalibrationConfig()
    if calibration is None:
        return []
    given: tuple[tuple[str, Any, Any], ...] = (
        ("--calibration", PurePath(calibration.source).name, default.source),
        ("--num-samples", calibration.rows, default.num_samples),
        ("--seq-len", calibration.seq_len, default.seq_len),
        ("--seed", calibration.seed, default.seed),
    )
    return [[flag, plain(str(value))] for flag, value, usual in given if value != usual]


def _bnb_options(config: BnbConfig) -> list[list[str]]:
    default = BnbConfig()
    found = [
        [flag, str(getattr(config, name))]
        for name, flag in _BNB_FLAGS.items()
        if getattr(config, name) != getattr(default, name) or name == "quant_type"
    ]
    found += [["--double-quant"]] if config.double_quant else []
    return found + [["--skip", plain(pattern)] for pattern in config.skip]
