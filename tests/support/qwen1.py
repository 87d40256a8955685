"""First-generation folders for tests, made from the golden checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_quant.checkpoint.families import FIRST_RELEASE_KEYS
from tests.support.artifacts import change_config

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen1"
# Other keys of a config.json of August 2023, with their published values.
FIRST_RELEASE = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "bias_dropout_fusion": True,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "tokenizer_type": "QWenTokenizer",
    "use_flash_attn": True,
}
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}


def copy_checkpoint(folder: Path, name: str = "tiny7b", *, auto_map: bool = False) -> Path:
    """A copy of a golden checkpoint; with `auto_map` it names Python files that must not be run."""
    shutil.copytree(GOLDEN / name, folder)
    if auto_map:
        change_config(folder, auto_map=AUTO_MAP)
        for file in ("configuration_qwen.py", "modeling_qwen.py"):
            (folder / file).write_text('raise SystemExit("remote code was run")\n')
    return folder


def use_first_release_keys(folder: Path) -> None:
    """Write config.json with the keys of August 2023."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for old, new in FIRST_RELEASE_KEYS.items():
        config[old] = config.pop(new)
    config["vocab_size"] = 500  # the tokens; padded_vocab_size has the rows of the matrices
    path.write_text(json.dumps({**config, **FIRST_RELEASE}))
