"""qwen-quant: turn Qwen checkpoints into quantized artifacts that can be trusted and released.

Importing the package registers first-generation Qwen (model_type "qwen") with transformers, so that AutoConfig,
AutoTokenizer, AutoModelForCausalLM and generate work on its folders; where gptqmodel is not installed, it also lets
AutoModelForCausalLM load GPTQ folders with this package's Int4 kernels (`runtime/hf_quantizer.py`; where it is, folders
that it would read wrongly are refused), and where bitsandbytes is, folders whose routed experts are packed for it
(`runtime/hf_bnb.py`). That loads torch and transformers: 5.5 CPU seconds where the import of AutoModelForCausalLM alone
takes 4.9 (measured on 2 cores). The command line leaves it to the commands that need a model: `qwen-quant --help`
takes 0.2.
"""

import importlib
import os
import sys

__version__ = "0.1.0"


def _runs_as_command() -> bool:
    """Whether this process is `qwen-quant` or `python -m qwen_quant`, and not a program that uses the package."""
    program, line = (sys.argv or [""])[0], sys.orig_argv
    if program == "-m":  # runpy has not found the module's file yet
        return line[line.index("-m") + 1 :][:1] == [__name__] if "-m" in line else False
    return os.path.splitext(os.path.basename(program))[0] == "qwen-quant"


if not _runs_as_command():
    importlib.import_module("qwen_quant.models.qwen1")
    importlib.import_module("qwen_quant.runtime.hf_quantizer")
    importlib.import_module("qwen_quant.runtime.hf_bnb")
