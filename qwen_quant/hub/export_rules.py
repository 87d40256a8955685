"""What the runtimes of an export's format expect of its folder, checked before a push (docs/consumers.md has the list).

That the numbers are right was proved when the export was written, and the hashes say that these are those files. Here
it is asked whether the files belong together and say what a runtime needs to be told: the format's own head, the
configs, the tokenizer. Nothing needs the format's library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from qwen_quant.checkpoint.manifest import SEALABLE_PATTERNS
from qwen_quant.errors import InputError
from qwen_quant.hub.consumers import Consumer, Finding, Severity, check_consumers, read_object
from qwen_quant.hub.export_table import HUB_FORMATS, SAFETENSORS
from qwen_quant.hub.gguf_head import gguf_files, read_head
from qwen_quant.hub.reencoded import CONVERT, Reencoded

GPTQ_FORMATS = ("gptq", "gptq_v2")
# Rules about 16-bit and GPTQ folders that say nothing of another packed format.
_OTHER_FORMAT = ("quant-method", "tensors-complete", "safetensors-format")
_READERS = {"gguf": "llama.cpp", "mlx": "mlx-lm", "onnx": "onnxruntime-genai", "openvino": "openvino-genai"}

Row = tuple[str, Severity, str]


def check_reencoded(folder: Path, made: Reencoded) -> tuple[Finding, ...]:
    """Every broken rule of an export or a conversion, errors first.

    Errors: InputError when the folder cannot be read at all.
    """
    if made.method == CONVERT or made.format in GPTQ_FORMATS:
        return check_consumers(folder)
    if HUB_FORMATS[made.format].weights == SAFETENSORS:
        kept = [found for found in check_consumers(folder) if found.rule not in _OTHER_FORMAT]
        found = [_renamed(row, made.format) for row in kept] + _findings(made.format, _safetensors(folder, made))
    else:
        rules: dict[str, Callable[[Path], Iterator[Row]]] = {"gguf": _gguf, "onnx": _onnx, "openvino": _openvino}
        found = _findings(made.format, [*_read(rules[made.format], folder), *_licence(folder)])
    return tuple(sorted(found, key=lambda row: row.severity != "error"))


def _renamed(found: Finding, format_name: str) -> Finding:
    """The same finding, of the reader that this format has."""
    reader = _READERS.get(format_name)
    return found if reader is None else Finding(found.rule, found.severity, (reader,), found.message)


def _findings(format_name: str, rows: Iterable[Row]) -> list[Finding]:
    everybody: tuple[Consumer, ...] = ("transformers", "vLLM")
    who = (_READERS[format_name],) if format_name in _READERS else everybody
    return [Finding(rule, severity, ("Hub",) if rule == "licence" else who, text) for rule, severity, text in rows]


def _read(rule: Callable[[Path], Iterator[Row]], folder: Path) -> list[Row]:
    """What a rule finds; a file that it cannot read breaks it."""
    found: list[Row] = []
    try:
        found += list(rule(folder))
    except InputError as error:
        found.append(("export-files", "error", str(error)))
    except OSError as error:
        found.append(("export-files", "error", f"{error.filename}: {error.strerror}"))
    return found


def _safetensors(folder: Path, made: Reencoded) -> Iterator[Row]:
    """config.json speaks of the format that the manifest names."""
    config = read_object(folder / "config.json") or {}
    settings, wanted = config.get("quantization_config"), HUB_FORMATS[made.format].quant_method
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if wanted and method != wanted:
        yield (
            "export-config",
            "error",
            f"quantization_config.quant_method is {method!r}, {made.format} needs {wanted!r}",
        )
    if made.format == "mlx" and not isinstance(config.get("quantization"), dict):
        yield "export-config", "error", "config.json has no `quantization`, by which mlx-lm knows packed weights"
    if not wanted and made.format != "mlx" and settings is not None:
        yield "export-config", "error", "config.json has a quantization_config, and the weights are plain"


def _gguf(folder: Path) -> Iterator[Row]:
    """The head names an architecture and a tokenizer, and every tensor begins inside its file; no part is missing."""
    paths = [folder / name for name in gguf_files(path.name for path in folder.iterdir())]
    if not paths:
        yield "export-files", "error", "there is no GGUF file"
        return
    heads = [read_head(path) for path in paths]
    for path, part in zip(paths, heads, strict=True):
        largest = max(part.tensors.values(), default=0)
        if not part.tensors or part.data + largest >= path.stat().st_size:
            yield "gguf-head", "error", f"{path.name} ends before its last tensor begins"
    head, count = heads[0], heads[0].values.get("split.count", 1)
    if count != len(paths):
        yield "gguf-head", "error", f"{paths[0].name} is one of {count} files, and {len(paths)} are there"
    if not head.values.get("general.architecture"):
        yield "gguf-head", "error", f"{paths[0].name} names no general.architecture"
    if head.values.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        yield "gguf-tokenizer", "warning", f"{paths[0].name} holds no tokenizer: it takes token ids only"
    elif "tokenizer.chat_template" not in head.values:
        yield "chat-endpoint", "warning", f"{paths[0].name} holds no chat template: chats use the runtime's default one"


def _onnx(folder: Path) -> Iterator[Row]:
    """genai_config.json names a graph that is there, and the tokenizer is beside it."""
    config = read_object(folder / "genai_config.json")
    if config is None:
        yield "onnx-config", "error", "genai_config.json is missing"
    else:
        name = config.get("model", {}).get("decoder", {}).get("filename")
        if not isinstance(name, str) or not (folder / name).is_file():
            yield "onnx-config", "error", f"genai_config.json names the graph {name!r}, which is not there"
    data = folder / "model.onnx.data"
    if not data.is_file() or not data.stat().st_size:
        yield "export-files", "error", "model.onnx.data, which holds the weights, is missing or empty"
    yield from _tokenizer(folder)


def _openvino(folder: Path) -> Iterator[Row]:
    """Every constant that the graph names lies inside its .bin, and there is a tokenizer in IR."""
    graph, data = folder / "openvino_model.xml", folder / "openvino_model.bin"
    size, needed = data.stat().st_size, 0
    try:
        for _, element in ElementTree.iterparse(graph):
            if element.tag == "data" and "offset" in element.attrib and "size" in element.attrib:
                needed = max(needed, int(element.attrib["offset"]) + int(element.attrib["size"]))
            element.clear()
    except (ElementTree.ParseError, ValueError) as error:
        yield "openvino-graph", "error", f"{graph.name} cannot be read: {error}"
        return
    if needed != size:
        yield "openvino-graph", "error", f"{graph.name} needs {needed} bytes of constants, {data.name} has {size}"
    if not (folder / "openvino_tokenizer.xml").is_file():
        yield "openvino-tokenizer", "warning", "there is no openvino_tokenizer.xml: openvino-genai cannot take text"
    yield from _tokenizer(folder)


def _tokenizer(folder: Path) -> Iterator[Row]:
    """tokenizer.json is JSON."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        yield "fast-tokenizer", "warning", "there is no tokenizer.json"
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield "tokenizer", "error", f"tokenizer.json cannot be read: {error}"


def _licence(folder: Path) -> Iterator[Row]:
    """The terms travel with the weights."""
    patterns = [pattern for pattern in SEALABLE_PATTERNS if pattern != "NOTICE*"]
    if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
        yield "licence", "error", "there is no LICENSE file: copy the source's into the folder"
