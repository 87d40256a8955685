"""How to run an export or a conversion: for each runtime of its format, commands with the files as they are named.

docs/card.md says which of them were run on a real export, and with which versions.
"""

from __future__ import annotations

import shlex

from qwen_quant.hub.card_markdown import fence, plain
from qwen_quant.hub.card_run import SERVED_BITS, chat_line, program, prompt, quoted
from qwen_quant.hub.card_words import say
from qwen_quant.hub.export_facts import ExportFacts
from qwen_quant.hub.gguf_head import gguf_files

# Architectures that transformers reads from a GGUF file, as far as that was run (docs/interop.md).
TRANSFORMERS_GGUF = ("qwen2", "qwen3")


def export_use_section(facts: ExportFacts, language: str) -> list[str]:
    """Every runtime of the format."""
    makers = {
        "gguf": _gguf,
        "mlx": _mlx,
        "awq": _awq,
        "compressed-tensors": _compressed,
        "gptq": _gptq,
        "gptq_v2": _gptq,
        "onnx": _onnx,
        "openvino": _openvino,
        "": _converted,
    }
    make = makers.get(facts.made.format, _dense)
    return [f"## {say(language, 'use')}", *make(facts, language)]


def _shell(*commands: list[str]) -> str:
    return fence("bash", "\n".join(shlex.join(command) for command in commands))


def _question(language: str) -> str:
    return say(language, "prompt")


def _gguf(facts: ExportFacts, language: str) -> list[str]:
    files = gguf_files(facts.made.files)
    at = ["--hf-repo", facts.repo_id, "--hf-file", files[0]] if facts.repo_id else ["-m", _path(facts, files[0])]
    parts = ["### llama.cpp", *([say(language, "use_llama", file=files[0])] if facts.repo_id else [])]
    parts.append(_shell(["llama-cli", *at, "-p", _question(language)], ["llama-server", *at]))
    if not facts.has_tokenizer:
        return [*parts, say(language, "no_vocabulary")]
    if len(files) > 1:
        return parts  # the others fetch or read one file
    parts += [
        "### llama-cpp-python",
        say(language, "use_llama_python"),
        fence("python", _llama_python(facts, files[0], language)),
    ]
    if facts.model_type in TRANSFORMERS_GGUF:
        text = program(facts.target, language, chat=facts.has_chat_template, options=[f'gguf_file="{files[0]}"'])
        title = say(language, "use_transformers")
        parts += [f"### {title}", say(language, "use_gguf_transformers"), fence("python", text)]
    return parts


def _path(facts: ExportFacts, name: str) -> str:
    return f"{plain(facts.target)}/{name}"


def _llama_python(facts: ExportFacts, file: str, language: str) -> str:
    if facts.repo_id:
        load = f'Llama.from_pretrained(repo_id={quoted(facts.repo_id)}, filename="{file}", n_ctx=4096)'
    else:
        load = f"Llama(model_path={quoted(_path(facts, file))}, n_ctx=4096)"
    lines = ["from llama_cpp import Llama", "", f"model = {load}"]
    if facts.has_chat_template:
        lines += [
            chat_line(language),
            "answer = model.create_chat_completion(messages, max_tokens=256)",
            'print(answer["choices"][0]["message"]["content"])',
        ]
    else:
        lines.append(f'print(model({prompt(language)}, max_tokens=256)["choices"][0]["text"])')
    return "\n".join(lines)


def _mlx(facts: ExportFacts, language: str) -> list[str]:
    lines = ["from mlx_lm import generate, load", "", f"model, tokenizer = load({quoted(plain(facts.target))})"]
    if facts.has_chat_template:
        lines += [chat_line(language), "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"]
    else:
        lines.append(f"prompt = {prompt(language)}")
    lines.append("print(generate(model, tokenizer, prompt=prompt, max_tokens=256))")
    commands = _mlx_commands(facts, language)
    return ["### mlx-lm", say(language, "use_mlx"), commands, fence("python", "\n".join(lines))]


def _mlx_commands(facts: ExportFacts, language: str) -> str:
    at = ["--model", plain(facts.target)]
    return _shell(["mlx_lm.generate", *at, "--prompt", _question(language)], ["mlx_lm.server", *at])


def _transformers(facts: ExportFacts, language: str, install: str, first: tuple[str, ...] = ()) -> list[str]:
    text = program(facts.target, language, chat=facts.has_chat_template, first=first)
    return [f"### {say(language, 'use_transformers')}", say(language, install), fence("python", text)]


def _vllm(facts: ExportFacts, *options: str) -> list[str]:
    return ["### vLLM", _shell(["vllm", "serve", plain(facts.target), *options])]


def _awq(facts: ExportFacts, language: str) -> list[str]:
    parts = [*_vllm(facts), *_transformers(facts, language, "use_awq_transformers")]
    return [*parts, "### mlx-lm", say(language, "use_mlx"), _mlx_commands(facts, language)]


def _compressed(facts: ExportFacts, language: str) -> list[str]:
    # transformers loads asymmetric folders only dequantized, which needs a configuration of its own.
    own = _transformers(facts, language, "use_compressed_transformers") if facts.made.sym else []
    return [*_vllm(facts), *own]


def _gptq(facts: ExportFacts, language: str) -> list[str]:
    parts = _transformers(facts, language, "use_gptq_own", ("import qwen_quant", ""))
    return [*parts, *(_vllm(facts) if _served(facts) else [])]


def _served(facts: ExportFacts) -> bool:
    """Whether servers take these GPTQ weights (see `card_run.refusal`)."""
    made = facts.made
    return made.sym and not made.act_order and made.bits in SERVED_BITS


def _dense(facts: ExportFacts, language: str) -> list[str]:
    served = [] if facts.made.format == "f32" else _vllm(facts)
    return [*_transformers(facts, language, "use_dense_transformers"), *served]


def _converted(facts: ExportFacts, language: str) -> list[str]:
    if facts.made.quantized:
        return _gptq(facts, language)
    sglang = _shell(["python", "-m", "sglang.launch_server", "--model-path", plain(facts.target)])
    return [*_dense(facts, language), "### SGLang", sglang]


def _fetched(facts: ExportFacts, package: str, language: str) -> list[str]:
    """How to install a runtime that loads folders, and fetch the folder."""
    parts = [say(language, "use_genai", package=package)]
    if facts.repo_id:
        parts.append(_shell(["hf", "download", facts.repo_id, "--local-dir", f"./{plain(facts.name)}"]))
    return parts


def _onnx(facts: ExportFacts, language: str) -> list[str]:
    if facts.has_chat_template:
        lines = [
            f'messages = json.dumps([{{"role": "user", "content": {prompt(language)}}}])',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
        ]
    else:
        lines = [f"prompt = {prompt(language)}"]
    text = "\n".join(
        [
            *(["import json", ""] if facts.has_chat_template else []),
            "import onnxruntime_genai as genai",
            "",
            f"model = genai.Model({quoted(f'./{plain(facts.name)}')})",
            "tokenizer = genai.Tokenizer(model)",
            *lines,
            "parameters = genai.GeneratorParams(model)",
            "parameters.set_search_options(max_length=512)",
            "generator = genai.Generator(model, parameters)",
            "generator.append_tokens(tokenizer.encode(prompt))",
            "stream = tokenizer.create_stream()",
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            '    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)',
        ]
    )
    return ["### onnxruntime-genai", *_fetched(facts, "onnxruntime-genai", language), fence("python", text)]


def _openvino(facts: ExportFacts, language: str) -> list[str]:
    folder = f"./{plain(facts.name)}"
    parts = ["### openvino-genai", *_fetched(facts, "openvino-genai", language)]
    if "openvino_tokenizer.xml" not in facts.made.files:
        parts.append(say(language, "no_ov_tokenizer", target=folder))
    lines = [
        "import openvino_genai",
        "",
        f'pipe = openvino_genai.LLMPipeline({quoted(folder)}, "CPU")  # or "GPU"',
        f"print(pipe.generate({prompt(language)}, max_new_tokens=256))",
    ]
    return [*parts, fence("python", "\n".join(lines))]
