"""`qwen-quant init`: a commented qwen-quant.toml to start from."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, show
from qwen_quant.errors import InputError
from qwen_quant.recipe import RECIPE_NAME

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="checkpoint folder or hub id to write into it")]
Out = Annotated[str | None, typer.Argument(metavar="OUT", help="output folder to write into it")]

TEMPLATE = """\
# Settings of `qwen-quant` in this folder. Options on the command line override them.

model = {model}    # a checkpoint folder, or a hub id: "org/name" or "org/name@revision"
out = {out}    # the folder to write

[gptq]
bits = 4                         # 2, 3, 4 or 8
group_size = 128                 # input columns per scale: 32, 64, 128, or -1 for one group per row
sym = true                       # symmetric grid; false: a zero point per group
desc_act = false                 # true: groups follow the activation order; few fast kernels can run that
damp_percent = 0.01              # fraction of the mean Hessian diagonal added to it
order = "activation"             # "activation" or "column": the order in which columns are solved
scales = "search"                # "search" (weighted by the Hessian) or "minmax"
asymmetric_calibration = true    # solve against the full-precision model's inputs; false saves time
rounding_only = false            # true: no GPTQ, the baseline of comparisons
checkpoint_format = "gptq"       # "gptq" (every runtime reads it) or "gptq_v2"
expert_policy = "route-all"      # an expert with too few tokens: "route-all", "pool" or "round"
expert_min_tokens = 64           # fewest tokens per group of an expert's input columns

[bnb]
quant_type = "nf4"               # "nf4", "fp4" or "int8"
double_quant = false             # quantize the 4-bit scales too

[calibration]
source = "bundled"               # "bundled", or a .json, .jsonl or .txt file
num_samples = 128                # rows
seq_len = 2048                   # tokens per row
seed = 0                         # picks and orders the rows

[run]
device = "auto"                  # "auto", "cpu" or "cuda"
max_shard_size = "2GB"           # largest file to write
resume = true                    # continue an unfinished run
force = false                    # true: replace an existing output, once the new one is complete

[validation]
texts = ["bundled"]              # files, "FILE.jsonl#field", "hub:org/name:config:split:field", "bundled:en"
window_tokens = 1024             # tokens per window
stride_tokens = 0                # tokens between window starts; 0: disjoint windows
joining = "\\n\\n"                 # between two rows of a data set
lengths = []                     # window lengths of the long-context table, e.g. [1024, 2048, 4096]
smoke = true                     # fixed prompts first
kv_cache = ""                    # "int8", "bf16" or "qwen": the keys and values of OUT in such a cache
seed = 0                         # of every bootstrap

[gates]                          # each compares the unfavourable end of the 95% interval
# max_kl = 0.1                   # mean KL divergence, nats per token
# max_perplexity_ratio = 1.03    # quantized / baseline
# min_top1 = 0.9                 # top-1 agreement
# max_task_drop = 0.02           # loss of any task's score
"""


def init(
    model: Model = None,
    out: Out = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a commented qwen-quant.toml into the working directory, so that `qwen-quant gptq` alone works here.

    \b
    Examples:
      qwen-quant init Qwen/Qwen3-0.6B ./Qwen3-0.6B-Int4
      qwen-quant init ./model ./out --force
      qwen-quant init                          # then edit model and out
    """
    output = Output(json=json, quiet=quiet)
    path = Path(RECIPE_NAME)
    if path.exists() and not force:
        raise InputError(f"{path.absolute()} exists", next_step="edit it, or give --force to replace it")
    temporary = path.with_name(f".{RECIPE_NAME}.{os.getpid()}")
    try:
        temporary.write_text(recipe_text(model or "path/to/model", out or "path/to/output"), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    line = (
        f"wrote {path.absolute()}; next: qwen-quant gptq"
        if model and out
        else f"wrote {path.absolute()}; edit model and out"
    )
    show(Report("init", {"path": str(path.absolute())}, (line,)), output)


def recipe_text(model: str, out: str) -> str:
    """The commented recipe with every built-in default. A TOML basic string quotes as JSON does."""
    quoted = [json_module.dumps(value, ensure_ascii=False) for value in (model, out)]
    width = max(map(len, quoted)) + 1
    return TEMPLATE.format(model=quoted[0].ljust(width), out=quoted[1].ljust(width + 2))
