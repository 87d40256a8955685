"""The texts of the cards of exports and conversions, English and Chinese side by side (see `card_words.py`)."""

from __future__ import annotations

EXPORT_TEXTS: dict[str, tuple[str, str]] = {
    # Top
    "export_intro": (
        "{title} version of {base} for {runtimes}: the {bits}-bit codes of {artifact}, written in this format without "
        "quantizing again.",
        "{base} 的 {title} 版本，适用于 {runtimes}：直接沿用 {artifact} 的 {bits} 位量化编码转写而成，未重新量化。",
    ),
    "dense_intro": (
        "{title} version of {base} for {runtimes}: the {bits}-bit codes of {artifact}, dequantized.",
        "{base} 的 {title} 版本，适用于 {runtimes}：由 {artifact} 的 {bits} 位量化编码反量化得到。",
    ),
    "convert_intro": (
        "{base} under the names of Qwen2, for every runtime that serves Qwen2: the same numbers, with tokenizer.json "
        "and a chat template, and no remote code.",
        "{base} 改用 Qwen2 的张量命名，可在所有支持 Qwen2 的推理框架中使用：数值完全不变，附带 tokenizer.json "
        "与对话模板，无需远程代码。",
    ),
    "an_artifact": ("an Int{bits} artifact", "某个 Int{bits} 量化模型"),
    "inexact_title": ("These are not exactly the numbers of the artifact", "本仓库的数值与原量化模型不完全相同"),
    "inexact_line": (
        "{what}: {why}. The largest change of a weight is {largest}; the figures below were measured before it.",
        "{what}：{why}（工具原文）。权重的最大变化为 {largest}；下文的指标是在变化之前测得的。",
    ),
    "inexact_rest": (
        "What is not quantized was written as {rest}; the largest change of such a value is {largest}.",
        "未量化部分以 {rest} 保存，其数值的最大变化为 {largest}。",
    ),
    # Use
    "use_llama": (
        "llama.cpp fetches the file by itself; in a folder that is there already use `-m {file}`.",
        "llama.cpp 会自动下载该文件；若已在本地，请改用 `-m {file}`。",
    ),
    "use_llama_python": (
        "`pip install llama-cpp-python huggingface_hub`",
        "`pip install llama-cpp-python huggingface_hub`",
    ),
    "use_gguf_transformers": (
        "transformers dequantizes the file when it is loaded: `pip install gguf accelerate`",
        "transformers 在加载时会将其反量化：`pip install gguf accelerate`",
    ),
    "no_vocabulary": (
        "The file holds no tokenizer: it takes token ids only.",
        "文件中没有分词器，只能直接输入 token id。",
    ),
    "use_mlx": (
        "`pip install mlx-lm` (on Linux also `pip install 'mlx[cpu]'`)",
        "`pip install mlx-lm`（Linux 上还需 `pip install 'mlx[cpu]'`）",
    ),
    "use_awq_transformers": (
        "`pip install accelerate optimum gptqmodel`",
        "`pip install accelerate optimum gptqmodel`",
    ),
    "use_compressed_transformers": (
        "`pip install accelerate compressed-tensors`",
        "`pip install accelerate compressed-tensors`",
    ),
    "use_dense_transformers": ("`pip install accelerate`", "`pip install accelerate`"),
    "use_genai": (
        "`pip install {package} huggingface_hub`; the folder is fetched once and loaded from the disk.",
        "`pip install {package} huggingface_hub`；模型目录只需下载一次，之后从本地加载。",
    ),
    "no_ov_tokenizer": (
        "There is no tokenizer in IR here, which openvino-genai needs: `pip install openvino-tokenizers`, then "
        "`convert_tokenizer {target} --with-detokenizer -o {target}`.",
        "本目录没有 IR 格式的分词器，而 openvino-genai 需要它：请执行 `pip install openvino-tokenizers`，再执行 "
        "`convert_tokenizer {target} --with-detokenizer -o {target}`。",
    ),
    # Proof
    "proof": ("The same weights", "权重一致性证明"),
    "proof_exact": (
        "After writing, the files were read back and every dequantized weight was compared with the artifact's: all "
        "are the same number.",
        "写出后重新读取全部文件，并将每个反量化后的权重与原量化模型逐一比较：数值全部相同。",
    ),
    "proof_inexact": (
        "After writing, the files were read back and every dequantized weight was compared with the artifact's.",
        "写出后重新读取全部文件，并将每个反量化后的权重与原量化模型逐一比较。",
    ),
    "proof_logits": (
        "Only names changed: every tensor was read back and compared byte by byte, and on {tokens} tokens the largest "
        "difference of a logit between the two models is {largest}.",
        "仅改变了命名：每个张量都重新读取并逐字节比较；"
        "在 {tokens} 个 token 上，两个模型 logit 的最大差值为 {largest}。",
    ),
    "compared_weights": ("weights compared", "比较的权重数"),
    "compared_linears": ("in linear layers", "线性层数"),
    "largest_weight": ("largest difference of a weight", "权重的最大差值"),
    "compared_kept": ("tensors compared that are not quantized", "比较的未量化张量数"),
    "largest_kept": ("largest difference of a value in them", "其中数值的最大差值"),
    "read_back_with": ("read back with", "读取工具"),
    "source_weights": ("sha256 of the artifact's weights", "原量化模型权重的 sha256"),
    # Quality
    "quality_of_codes": (
        "Measured on the artifact that this was made from. The codes, scales and zeros are the same ({weights} weights "
        "compared, largest difference {largest}), so its figures are those of this repository; a runtime that computes "
        "with rounded activations adds its own noise.",
        "以下指标测自本仓库所依据的量化模型。二者的编码、缩放系数与零点相同"
        "（比较 {weights} 个权重，最大差值 {largest}），"
        "因此这些指标同样适用于本仓库；若推理框架对激活值做舍入，会另外带来其自身的误差。",
    ),
    "quality_of_names": (
        "Measured on the weights before they were renamed; no number changed.",
        "以下指标在改名之前测得；数值没有任何变化。",
    ),
    # How it was made
    "export_format": ("format", "格式"),
    "codes": ("codes", "编码"),
    "codes_value": ("{bits} bit, {scheme}", "{bits} 位，{scheme}"),
    "scheme_act_order": ("act-order", "act-order"),
    "quantized_by": ("quantized by", "量化方法"),
    "unknown_method": (
        "not known: the artifact has no record of it",
        "未知：原量化模型没有相关记录",
    ),
    "rest": ("not quantized", "未量化部分"),
    "rest_kept": ("as in the artifact", "与原量化模型一致"),
    "reproduce_export_note": (
        "The commands that give these files again, with the same weights on the same kind of machine and versions.",
        "依次执行以下命令即可重新得到这些文件；在同类机器和相同软件版本下，权重一致。",
    ),
    "reproduce_text_of": (
        "The calibration text {text} is a local file; its token ids have the sha256 `{sha256}`.",
        "校准文本 {text} 为本地文件，其 token id 的 sha256 为 `{sha256}`。",
    ),
    "reproduce_local": (
        "The artifact is a local folder; its weights have the sha256 `{sha256}`.",
        "原量化模型来自本地目录，其权重的 sha256 为 `{sha256}`。",
    ),
    # Other repositories
    "links": ("The same weights in other formats", "同一权重的其他格式"),
    "notes_of_tool": ("Noted by the tool:", "工具提示（原文）："),
    "export_bias": (
        "It has the limits and biases of {base}, and what quantization changed.",
        "它保留了 {base} 的局限与偏差，以及量化带来的变化。",
    ),
    "own_weights": ("sha256 of the weight files here: `{sha256}`", "本仓库权重文件的 sha256：`{sha256}`"),
}
