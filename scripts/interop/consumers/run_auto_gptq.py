"""AutoGPTQ 0.7.1 (the reader of 2024) reads a gptq folder with its plain torch layers; widened to FP32 after loading.

transformers 4.37 knows `rope_theta` at the top of config.json only: without it Qwen2 turns with 10000, silently. The
consumer's view of the folder has that key added where newer transformers wrote `rope_parameters`, which is said in
`facts`. The tensors are the folder's own, by link.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from common import Runner, main
from run_transformers import answers


def with_old_keys(folder: Path, out: Path) -> list[str]:
    """Fill `out` with links to the files of `folder` and an edited config.json; returns the keys that were added."""
    for file in folder.iterdir():
        if file.name != "config.json":
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    added = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope and "rope_theta" not in config else {}
    added |= {"torch_dtype": config["dtype"]} if "dtype" in config and "torch_dtype" not in config else {}
    (out / "config.json").write_text(json.dumps({**config, **added}), encoding="utf-8")
    return sorted(added)


def load(folder: Path) -> Runner:
    """The folder as AutoGPTQForCausalLM.from_quantized reads it."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as view:
        added = with_old_keys(folder, Path(view))
        options = {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True, "use_safetensors": True}
        wrapped = AutoGPTQForCausalLM.from_quantized(view, device="cpu", torch_dtype=torch.float32, **options)
        model = wrapped.model.eval()
    own = dict(model.named_parameters())
    for parameter in own.values():
        parameter.data = parameter.data.float()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in set(stored.keys()) & set(own):
                own[name].data.copy_(stored.get_tensor(name).float())
    for module in model.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    return answers(model, facts={"quantized_linears": packed, "keys_added_to_config": added})


if __name__ == "__main__":
    main(load, ("auto-gptq", "transformers", "torch"))
