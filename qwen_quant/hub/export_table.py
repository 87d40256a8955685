"""What the Hub needs to know of each format of `export`: the name of its repository, its files, its metadata.

The one table of that. A runtime loads the root of a repository, so every format gets a repository of its own beside the
artifact's, named by the suffix that the field uses for it.
"""

from __future__ import annotations

from dataclasses import dataclass

SAFETENSORS = ("*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class HubFormat:
    """One row.

    Attributes:
        title: the format as people write it.
        suffix: of the repository's name; "{bits}" is the width of the codes.
        library: `library_name` of the card, by which the Hub chooses snippets and counts downloads.
        tags: of the card. quant_method: of config.json's quantization_config; "" where it must have none.
        weights: patterns of the files that hold the weights, at the root; files: those that the format adds to them.
            No other format's weights are pushed with it.
    """

    title: str
    suffix: str
    library: str
    tags: tuple[str, ...]
    quant_method: str = ""
    weights: tuple[str, ...] = SAFETENSORS
    files: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """Patterns of everything that is this format's."""
        return (*self.weights, *self.files)


HUB_FORMATS = {
    "gptq": HubFormat("GPTQ", "-GPTQ", "transformers", ("gptq",), "gptq"),
    "gptq_v2": HubFormat("GPTQ v2", "-GPTQ-v2", "transformers", ("gptq",), "gptq"),
    "awq": HubFormat("AWQ", "-AWQ", "transformers", ("awq",), "awq"),
    "compressed-tensors": HubFormat(
        "compressed-tensors", "-W{bits}A16", "transformers", ("compressed-tensors", "vllm"), "compressed-tensors"
    ),
    "bf16": HubFormat("BF16", "-BF16", "transformers", ()),
    "f16": HubFormat("FP16", "-FP16", "transformers", ()),
    "f32": HubFormat("FP32", "-FP32", "transformers", ()),
    "mlx": HubFormat("MLX", "-MLX-{bits}bit", "mlx", ("mlx",)),
    "gguf": HubFormat("GGUF", "-GGUF", "gguf", ("gguf", "llama.cpp"), weights=("model.gguf", "model-*-of-*.gguf")),
    "openvino": HubFormat(
        "OpenVINO",
        "-int{bits}-ov",
        "openvino",
        ("openvino", "openvino-genai"),
        weights=("openvino_model.xml", "openvino_model.bin"),
        files=(
            "openvino_tokenizer.xml",
            "openvino_tokenizer.bin",
            "openvino_detokenizer.xml",
            "openvino_detokenizer.bin",
        ),
    ),
    "onnx": HubFormat(
        "ONNX",
        "-ONNX",
        "onnxruntime-genai",
        ("onnx", "onnxruntime-genai"),
        weights=("model.onnx", "model.onnx.data"),
        files=("genai_config.json",),
    ),
}


def repository_of(repo_id: str, format_name: str, bits: int) -> str:
    """Where a format of the artifact at `repo_id` goes, unless a name is given: "me/X" -> "me/X-GGUF"."""
    return repo_id + HUB_FORMATS[format_name].suffix.format(bits=bits)
