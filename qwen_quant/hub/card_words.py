"""The model card's texts, English and Chinese side by side, with the places of their values in {}.

The Chinese is written for Chinese readers and not word by word. Values come from the evidence only: no sentence here
holds a measured number. Terms of the field (GPTQ, group_size, KV cache) stay as they are written in code.
"""

from __future__ import annotations

from qwen_quant.hub.export_words import EXPORT_TEXTS

LANGUAGES = ("en", "zh")
LANGUAGE_NAMES = {"en": "English", "zh": "中文"}

TEXTS: dict[str, tuple[str, str]] = {
    # Top
    "intro": (
        "{label} version of {base}: {method}.",
        "{base} 的 {label} 量化版本：{method}。",
    ),
    "method_gptq": (
        "weights of the linear layers in {bits} bit, quantized with GPTQ ({scheme})",
        "线性层权重采用 GPTQ 量化为 {bits} 位（{scheme}）",
    ),
    "method_rounding": (
        "weights of the linear layers in {bits} bit by plain rounding, without GPTQ ({scheme})",
        "线性层权重直接四舍五入为 {bits} 位，未使用 GPTQ（{scheme}）",
    ),
    "method_bitsandbytes": (
        "weights of the linear layers in the bitsandbytes format {scheme}",
        "线性层权重采用 bitsandbytes 的 {scheme} 格式",
    ),
    "scheme_group": ("groups of {group_size}", "每 {group_size} 个输入通道一组"),
    "scheme_row": ("one scale per row", "每行一个缩放系数"),
    "scheme_sym": ("symmetric", "对称量化"),
    "scheme_asym": ("with a zero point per group", "非对称量化，每组一个零点"),
    "scheme_desc_act": ("groups in activation order", "按激活值排序分组（desc_act）"),
    "scheme_blocks": ("blocks of {block_size}", "每 {block_size} 个权重一块"),
    "scheme_double": ("double quantization", "双重量化"),
    "evidence": (
        "Made with {tool}. Every number on this page is read from files in this repository: {files}.",
        "由 {tool} 生成。本页所有数字均取自本仓库中的文件：{files}。",
    ),
    "headers": ("the headers of the weights", "权重文件头"),
    "with": ("{name} ({detail})", "{name}（{detail}）"),
    "failed_title": ("Published although a quality gate failed", "质量门槛未全部通过，仍予发布"),
    "failed_reason": ("Reason given: {reason}", "理由：{reason}"),
    "failed_no_reason": ("No reason was given.", "未说明理由。"),
    "failed_gate": (
        "{gate}: limit {limit}, measured {value} (the unfavourable end of its interval)",
        "{gate}：限值 {limit}，实测 {value}（取置信区间中不利的一端）",
    ),
    # Glance
    "glance": ("At a glance", "概览"),
    "size": ("Size of the weights", "权重大小"),
    "perplexity_of": ("Perplexity, {text}", "困惑度，{text}"),
    "glance_cell": ("generating {tokens} tokens", "生成 {tokens} 个 token"),
    "speed_of": ("Tokens/s, {cell}", "生成速度（tokens/s），{cell}"),
    "memory_of": ("Peak memory, {cell}", "峰值内存，{cell}"),
    # Use
    "use": ("How to use it", "使用方法"),
    "use_transformers": ("With transformers", "使用 transformers"),
    "use_gptq": (
        "`pip install accelerate`, and either `pip install optimum gptqmodel` or install qwen-quant and add "
        "`import qwen_quant`, which "
        "brings its own "
        "kernels (CPU and GPU) and stands aside where gptqmodel is installed.",
        "先执行 `pip install accelerate`，再执行 `pip install optimum gptqmodel`；也可以改为安装 qwen-quant "
        "并加上 `import qwen_quant`，"
        "它自带 CPU 与 GPU 内核，检测到 gptqmodel 时会自动让位。",
    ),
    "use_gptq_own": (
        "`pip install accelerate`, install qwen-quant and keep the line `import qwen_quant`: it gives "
        "transformers what this architecture "
        "needs to "
        "read packed weights. Do this where gptqmodel is not installed: with it, transformers leaves packed experts "
        "unread, and `import qwen_quant` refuses them.",
        "请执行 `pip install accelerate`，安装 qwen-quant 并保留 `import qwen_quant` 这一行：它为 transformers "
        "补上读取该架构打包权重所需的部分。请在未安装 gptqmodel 的环境中使用：安装了它时，transformers 不会读取"
        "打包的专家权重，`import qwen_quant` 会拒绝加载。",
    ),
    "use_qwen1": (
        "`pip install accelerate`, install qwen-quant and keep the line `import qwen_quant`: it registers "
        "first-generation Qwen with "
        "transformers. "
        "No remote code is run.",
        "请执行 `pip install accelerate`，安装 qwen-quant 并保留 `import qwen_quant` 这一行：它会向 "
        "transformers 注册第一代 Qwen 的模型类，"
        "无需执行远程代码。",
    ),
    "use_bnb": ("`pip install bitsandbytes accelerate`", "`pip install bitsandbytes accelerate`"),
    "prompt": (
        "Give me a short introduction to large language models.",
        "请简单介绍一下大语言模型。",
    ),
    "needs_bitsandbytes": ("It needs `pip install bitsandbytes`.", "需要先执行 `pip install bitsandbytes`。"),
    "float16_shapes": (
        "`--dtype float16`: some shapes of this model do not fit Marlin kernels (see the limits), and the "
        "kernels that take "
        "them compute in FP16.",
        "加上 `--dtype float16` 是因为该模型部分矩阵的形状不适用于 Marlin 内核（见“局限”一节），"
        "能处理这些形状的内核只支持 FP16 计算。",
    ),
    "not_asym": (
        "{runtime} does not read asymmetric GPTQ weights, so it cannot serve this repository. Use transformers.",
        "{runtime} 不支持非对称 GPTQ 权重，无法加载本仓库，请使用 transformers。",
    ),
    "not_asym_sglang": (
        "No {runtime} command is given: its Marlin kernels take symmetric GPTQ weights only. Use transformers.",
        "这里不提供 {runtime} 的用法：其 Marlin 内核只支持对称 GPTQ 权重，请使用 transformers。",
    ),
    "not_desc_act": (
        "No {runtime} command is given: these weights need groups in activation order (`desc_act`), which vLLM "
        "rejects and "
        "which has not been checked with SGLang. Use transformers.",
        "这里不提供 {runtime} 的用法：本权重采用按激活值排序的分组（`desc_act`），vLLM 不接受，SGLang 尚未验证，"
        "请使用 transformers。",
    ),
    "not_bits": (
        "{runtime} reads GPTQ weights of 4 or 8 bits, and these have {bits}. Use transformers.",
        "{runtime} 只支持 4 位或 8 位的 GPTQ 权重，而本权重为 {bits} 位，请使用 transformers。",
    ),
    "not_qwen1": (
        "{runtime} reads first-generation Qwen under the names of Qwen2. Convert a copy first (no number in it "
        "changes):",
        "{runtime} 需要以 Qwen2 的张量命名来加载第一代 Qwen，请先转换一份副本（数值完全不变）：",
    ),
    "not_qwen1_bnb": (
        "{runtime} cannot serve this repository: it does not know first-generation Qwen, and bitsandbytes "
        "weights of it "
        "cannot be converted.",
        "{runtime} 无法加载本仓库：它不支持第一代 Qwen，而 bitsandbytes 格式的权重也无法转换。",
    ),
    "not_bnb": (
        "No {runtime} command is given: that it reads bitsandbytes weights as stored here has not been checked.",
        "这里不提供 {runtime} 的用法：尚未验证它能否读取此处保存的 bitsandbytes 权重。",
    ),
    "not_shapes": (
        "No {runtime} command is given: some shapes of this model do not fit Marlin kernels (see the limits).",
        "这里不提供 {runtime} 的用法：该模型部分矩阵的形状不适用于 Marlin 内核（见“局限”一节）。",
    ),
    # Quality
    "quality": ("Quality", "量化效果评测"),
    "quality_protocol": (
        "Both models read the same tokens; the intervals ({confidence}) are paired.",
        "两个模型读取完全相同的 token；括号内为配对计算的 {confidence} 置信区间。",
    ),
    "text": ("Text", "文本"),
    "ratio": ("Ratio", "比值"),
    "kl": ("KL divergence (nats per token)", "KL 散度（nats/token）"),
    "top1": ("Same most likely token", "最可能 token 一致率"),
    "perplexity": ("Perplexity", "困惑度"),
    "to": ("to", "至"),
    "text_protocol": (
        "{text}: {windows} windows of {window} tokens, a new one every {stride}; {tokens} tokens scored. {verdict}",
        "{text}：共 {windows} 个窗口，每个 {window} 个 token，窗口起点间隔 {stride}，计分 {tokens} 个 token。{verdict}",
    ),
    "text_protocol_disjoint": (
        "{text}: {windows} disjoint windows of {window} tokens; {tokens} tokens scored. {verdict}",
        "{text}：共 {windows} 个互不重叠的窗口，每个 {window} 个 token，计分 {tokens} 个 token。{verdict}",
    ),
    "bundled_texts": (
        "Texts named `bundled:` ship with qwen-quant, so that anybody can score them.",
        "名称以 `bundled:` 开头的文本随 qwen-quant 一同发布，任何人都可以复测。",
    ),
    "verdict_no_loss": ("No loss detected", "未检测到损失"),
    "verdict_loss": ("A measurable loss", "存在可测量的损失"),
    "verdict_gain": ("A measurable gain", "存在可测量的提升"),
    "verdict_little": ("Too little data for a verdict", "数据不足，无法下结论"),
    "detectable": (
        "; the smallest loss that this much data would have shown is {smallest}.",
        "；以该数据量，能够检出的最小损失为 {smallest}。",
    ),
    "end": (".", "。"),
    "by_length": ("Perplexity by context length", "不同上下文长度的困惑度"),
    "context_length": ("Context length", "上下文长度"),
    "tasks": ("Benchmarks", "评测基准"),
    "quantization": ("Quantization", "量化方式"),
    "difference": ("Difference", "差值"),
    "interval_row": ("{confidence} interval", "{confidence} 置信区间"),
    "items": ("Items", "题目数"),
    "verdict_row": ("Verdict", "结论"),
    "task": ("Task", "任务"),
    "shots": ("{task} ({shots}-shot)", "{task}（{shots}-shot）"),
    "tasks_note": (
        "Scores in percent, with lm-evaluation-harness on the same items for both models. The verdict rests on "
        "an exact "
        "test with Holm's correction over all tasks.",
        "分数为百分比，由 lm-evaluation-harness 在相同题目上分别评测两个模型得到；"
        "结论依据精确检验，并对全部任务作 Holm 校正。",
    ),
    "smoke": (
        "Fixed prompts through the chat template: {passed} of {count} passed.",
        "固定提示词冒烟测试：{count} 条中通过 {passed} 条。",
    ),
    "kv_used": (
        "The quantized model ran with the KV cache {kv_cache}.",
        "评测量化模型时使用的 KV cache 为 {kv_cache}。",
    ),
    # Speed
    "speed": ("Speed", "推理速度"),
    "speed_note": (
        "Tokens per second, averaged over all generated tokens, from a context of {context} token, greedy, one "
        "sequence.",
        "由 {context} 个上下文 token 开始贪心生成单条序列，按全部生成 token 平均的速度（tokens/s）。",
    ),
    "speed_cell": ("Speed ({tokens} tokens)", "速度（生成 {tokens} 个 token）"),
    "memory": ("Peak memory", "显存与内存占用"),
    "memory_note": ("Peak memory of the process, loading the model included.", "进程的峰值占用，包含加载模型的过程。"),
    "memory_encode": ("Encoding {tokens} tokens", "编码 {tokens} 个 token"),
    "memory_generate": ("Generating {tokens} tokens", "生成 {tokens} 个 token"),
    "hardware": (
        "Measured on {device} ({where}), {versions}.",
        "测试环境：{device}（{where}），{versions}。",
    ),
    "threads": ("CPU threads: {threads}", "CPU 线程数 {threads}"),
    "gpu": ("GPU", "GPU"),
    "kernel": ("{label} ran with: {kernel}.", "{label} 的运行方式（工具原文）：{kernel}。"),
    "extrapolated": (
        "`~`: the run was stopped before its last token, and the figure is extrapolated from the tokens seen.",
        "`~` 表示运行在生成完之前被截止，数值由已生成部分外推得到。",
    ),
    "oom": ("OOM", "内存不足（OOM）"),
    "failed": ("failed", "失败"),
    "kv_cache": ("KV cache quantization", "KV cache 量化"),
    "kv_batch": (
        "Peak memory by batch size, {tokens} generated tokens a sequence:",
        "不同 batch size 下的峰值占用（每条序列生成 {tokens} 个 token）：",
    ),
    "kv_length": (
        "Peak memory by generated length, one sequence:",
        "不同生成长度下的峰值占用（单条序列）：",
    ),
    "kv_row": ("{label}, {cache} cache", "{label}，{cache} cache"),
    # What is quantized
    "what": ("What is quantized and what is not", "哪些部分被量化"),
    "part": ("Part", "部分"),
    "count": ("Tensors", "数量"),
    "stored": ("Stored as", "存储格式"),
    "kept_as": ("as in the source", "与原模型一致"),
    "linears": ("linears: {names}", "线性层：{names}"),
    "share": (
        "{quantized} of {all} parameters are quantized; every parameter of the source is accounted for.",
        "共 {all} 个参数，其中 {quantized} 个被量化；原模型的每个参数都已逐一核对去向。",
    ),
    "experts": (
        "Routed experts by what calibrated them: {counts}. The fewest calibration tokens that one expert was "
        "sent: {fewest}.",
        "各路由专家的校准方式：{counts}。被分配校准 token 最少的专家得到 {fewest} 个。",
    ),
    "worst": (
        "Largest output error of one layer on the calibration text: {error} (relative), {linear}; plain "
        "rounding: {rounding}.",
        "校准文本上输出误差最大的一层为 {linear}，相对误差 {error}；若仅四舍五入则为 {rounding}。",
    ),
    # How it was made
    "how": ("How it was made", "量化过程"),
    "setting": ("Setting", "设置"),
    "value": ("Value", "取值"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "calibration": ("calibration text", "校准文本"),
    "bundled": ("the mix that ships with qwen-quant", "qwen-quant 自带的混合语料"),
    "calibration_size": ("calibration tokens", "校准 token 数"),
    "calibration_shape": (
        "{rows} rows of {seq_len} tokens, {tokens} in all, seed {seed}",
        "{rows} 行，每行 {seq_len} 个，共 {tokens} 个，随机种子 {seed}",
    ),
    "calibration_hash": ("sha256 of the token ids", "token id 的 sha256"),
    "no_calibration": ("none: this format needs no data", "无：该格式不需要数据"),
    "computed": ("computed on", "计算设备"),
    "computed_value": ("{device}, {dtype}", "{device}，{dtype}"),
    "cost": ("time, peak memory", "耗时与峰值内存"),
    "cost_value": ("{seconds}, {memory}", "{seconds}，{memory}"),
    "versions": ("versions", "软件版本"),
    "reproduce": ("Reproduce it", "复现"),
    "reproduce_note": (
        "The command that gives these weights again; on the same kind of machine with the same versions the same "
        "bytes.",
        "执行以下命令即可重新得到这份权重；在同类机器和相同软件版本下，结果逐字节一致。",
    ),
    "reproduce_source": (
        "The source is a local folder; its weights have the sha256 `{sha256}` (the hash of `sha256sum config.json "
        "*.safetensors`, sorted by name).",
        "原模型来自本地目录，其权重的 sha256 为 `{sha256}`（对按文件名排序的 `sha256sum config.json "
        "*.safetensors` 输出再求哈希）。",
    ),
    "reproduce_text": (
        "The calibration text {text} is a local file, recognized by the hash above.",
        "校准文本 {text} 为本地文件，可通过上表中的哈希核对。",
    ),
    # Limits
    "limits": ("Limits", "局限"),
    "gates": ("Quality gates", "质量门槛"),
    "gate": ("Gate", "门槛"),
    "limit": ("Limit", "限值"),
    "measured": ("Measured (unfavourable end)", "实测（不利端）"),
    "result": ("Result", "结果"),
    "passed": ("passed", "通过"),
    "not_passed": ("FAILED", "未通过"),
    "no_report": (
        "The quality of this artifact was not measured.",
        "尚未评测该量化模型的效果。",
    ),
    "no_tasks": (
        "No benchmark tasks were run; only the texts above were compared.",
        "未运行评测基准，仅比较了上述文本。",
    ),
    "no_gates": ("No quality gate was set.", "未设置质量门槛。"),
    "bias": (
        "A quantized model keeps the limits and biases of its source, and answers can differ from the source's.",
        "量化模型保留原模型的局限与偏差，其回答可能与原模型不同。",
    ),
    "marlin": (
        "Marlin-class kernels cannot serve {linears}: {reason}.",
        "Marlin 类内核无法处理 {linears}：{reason}。",
    ),
    "tensor_parallel": (
        "Tensor parallelism over {ranks} GPUs does not split these weights evenly.",
        "张量并行数为 {ranks} 时，这些权重无法均匀切分到各 GPU。",
    ),
    "warnings": ("Noted while measuring or quantizing:", "量化与评测过程中的提示（工具原文）："),
    # Provenance
    "provenance": ("Provenance and licence", "来源与许可证"),
    "source": ("Source: {source}", "原模型：{source}"),
    "source_commit": ("Source: {source} at commit {revision}", "原模型：{source}，提交 {revision}"),
    "weights": ("sha256 of the weights: `{sha256}`", "权重 sha256：`{sha256}`"),
    "verify": (
        "{command} checks every file of this repository against `qwen-quant.json`, which holds the sha256 of "
        "all of them "
        "and of the source's.",
        "执行 {command} 可对照 `qwen-quant.json` 校验本仓库的每个文件；该文件记录了全部文件及原模型文件的 sha256。",
    ),
    "licence": ("Licence: {licence}, as the source.", "许可证：{licence}，与原模型相同。"),
    "licence_text": ("Its text is in `{file}`.", "全文见 `{file}`。"),
    **EXPORT_TEXTS,
}

# English as the program says it -> Chinese; what is not here is shown in English.
PHRASES_ZH: dict[str, str] = {
    "embeddings stay 16-bit": "词嵌入",
    "the output head stays 16-bit": "输出头",
    "normalization weights stay 16-bit": "归一化层",
    "biases stay 16-bit": "偏置",
    "routers stay 16-bit: a changed choice of experts costs most": "路由器（改变专家的选择代价最大）",
    "the shared expert's gate has one output": "共享专家的门控（仅一个输出）",
    "convolutions stay 16-bit": "卷积",
    "decay rates of linear attention stay 16-bit": "线性注意力的衰减率",
    "small projections of linear attention stay 16-bit": "线性注意力的小投影",
    "multi-token prediction is carried through unchanged": "多 token 预测模块，原样保留",
    "the vision tower stays 16-bit": "视觉编码器",
    "hyper-connections stay 16-bit: every block reads through them": "超连接（每个解码层都经由它读取）",
    "the indexer stays 16-bit: it chooses what attention sees": "索引器（决定注意力看到的内容）",
    "constants of the n-gram hash, not weights": "n-gram 哈希的常数（并非权重）",
    "n-gram tables and their projections stay 16-bit": "n-gram 表及其投影",
    "kept by --skip": "由 --skip 指定保留",
    "transformers holds it in another form than a linear": "在 transformers 中不是线性层",
    "routed": "自身收到的 token",
    "route-all": "全部 token（route-all）",
    "pool": "同层共享 token（pool）",
    "round": "仅四舍五入（round）",
}
_VERDICTS = {
    "no loss detected": "verdict_no_loss",
    "loss": "verdict_loss",
    "gain": "verdict_gain",
    "too little data": "verdict_little",
}


def say(language: str, key: str, **values: object) -> str:
    """The text `key` in a language with its values put in (they are Markdown already)."""
    return TEXTS[key][LANGUAGES.index(language)].format(**values)


def phrase(language: str, text: str) -> str:
    """A phrase of the program in the card's language, or as it is."""
    return PHRASES_ZH.get(text, text) if language == "zh" else text


def verdict_key(word: str) -> str:
    """The key of a verdict's word (results.Verdict.word); an unknown word claims nothing."""
    return _VERDICTS.get(word, "verdict_little")
