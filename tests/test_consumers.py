"""Every consumer rule is broken once and then found; docs/consumers.md names each; sound artifacts break none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_quant.bnb_convert import BnbJob, quantize_bnb
from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.checkpoint.manifest import skip_lists
from qwen_quant.errors import InputError
from qwen_quant.hub.consumer_rules import RULES
from qwen_quant.hub.consumer_tensors import TENSOR_RULES
from qwen_quant.hub.consumers import VERSIONS, check_consumers, refuse_errors
from qwen_quant.progress import no_progress
from qwen_quant.recipe import BnbConfig, RunConfig
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import edit_tensors, make_checkpoint, split
from tests.support.moe import make_family_checkpoint
from tests.support.pushable import make_pushable, seal_again
from tests.support.qwen1 import copy_checkpoint

DOCS = Path(__file__).parents[1] / "docs" / "consumers.md"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound qwen2 artifact. Read only, as the others."""
    return make_pushable(tmp_path_factory.mktemp("consumers") / "tiny-Chat-Int4")


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound qwen2_moe artifact: routers and the shared expert's gate stay 16-bit."""
    folder = tmp_path_factory.mktemp("consumers") / "sparse"
    make_artifact(make_family_checkpoint(folder.with_name("sparse-source"), "qwen2_moe"), folder)
    spec = read_model_spec(folder)
    change_quantization(folder, **skip_lists(spec))
    (folder / "LICENSE").write_text("made up")
    seal_again(folder)
    return folder


@pytest.fixture(scope="session")
def bnb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound NF4 artifact."""
    folder = tmp_path_factory.mktemp("consumers") / "nf4"
    source = make_checkpoint(folder.with_name("nf4-source"), tied=False)
    quantize_bnb(BnbJob(source, folder, BnbConfig(), RunConfig(), "test/tiny"), no_progress)
    return folder


def change_quantization(folder: Path, **changes: Any) -> None:
    """Set keys of quantization_config in both config files; None removes one."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings = {key: value for key, value in {**config, **changes}.items() if value is not None}
    change_config(folder, quantization_config=settings)
    (folder / "quantize_config.json").write_text(json.dumps(settings))


def change_file(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: item for key, item in value.items() if item is not None}))

    return change


def quantization(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_quantization(folder, **changes)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tensor(suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = load_file(folder / "model.safetensors")[f"{Q}.{suffix}"]
        edit_tensors(folder, **{f"{Q}.{suffix}".replace(".", "__"): change(value)})

    return edit


def without_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def half_packed(folder: Path) -> None:
    """k_proj of the first block as a 16-bit matrix."""
    name = Q.replace("q_proj", "k_proj")
    tensors = load_file(folder / "model.safetensors")
    shape = tensors[f"{name}.scales"].shape[1], tensors[f"{name}.g_idx"].shape[0]
    packed = {f"{name}.{s}".replace(".", "__"): None for s in ("qweight", "qzeros", "scales", "g_idx")}
    edit_tensors(folder, **packed, **{f"{name}.weight".replace(".", "__"): torch.zeros(shape, dtype=torch.bfloat16)})


def unlisted_tensor(folder: Path) -> None:
    split(folder, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{Q}.scales"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_chat_model(folder: Path) -> None:
    change_file("tokenizer_config.json", chat_template=None)(folder)
    seal_again(folder, source={"id": "Qwen/Qwen2-7B-Chat", "revision": None, "sha256": {}})


def first_generation(folder: Path) -> None:
    seal_again(copy_checkpoint(folder))


def nan_scale(scales: torch.Tensor) -> torch.Tensor:
    scales[0, 0] = float("nan")
    return scales


BREAKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "quant-method": ("dense", quantization(quant_method="awq")),
    "gptq-keys": ("dense", quantization(desc_act=None)),
    "gptq-legacy-file": ("dense", change_file("quantize_config.json", group_size=128)),
    "gptq-asymmetric-v1": ("dense", quantization(sym=False)),
    "gptq-symmetric": ("dense", quantization(sym=False)),
    "gptq-bits": ("dense", quantization(bits=3)),
    "gptq-act-order": ("dense", quantization(desc_act=True)),
    "gptq-shapes": ("sparse", lambda folder: None),
    "bnb-keys": ("bnb", change_file("config.json", quantization_config={"quant_method": "bitsandbytes"})),
    "bnb-head": ("bnb", lambda folder: change_quantization(folder, llm_int8_skip_modules=["x"])),
    "architectures": ("dense", config(architectures=[])),
    "rope-theta": ("dense", config(rope_parameters={}, rope_theta=None)),
    "remote-code": ("dense", config(auto_map={"AutoModel": "modeling.X"})),
    "weight-index": ("dense", lambda folder: shutil.copy(folder / "model.safetensors", folder / "old.safetensors")),
    "generation-config": ("dense", without("generation_config.json")),
    "stop-tokens": ("dense", change_file("tokenizer_config.json", eos_token="<|endoftext|>")),
    "chat-template": ("dense", as_chat_model),
    "chat-endpoint": ("dense", change_file("tokenizer_config.json", chat_template=None)),
    "chat-renders": ("dense", change_file("tokenizer_config.json", chat_template="{{ raise_exception('no') }}")),
    "tokenizer": ("dense", lambda folder: edit_tensors(folder, model__embed_tokens__weight=torch.zeros(9, 128))),
    "fast-tokenizer": ("dense", without("tokenizer.json")),
    "licence": ("dense", without("LICENSE")),
    "safetensors-format": ("dense", without_metadata),
    "tensors-complete": ("dense", tensor("qzeros", lambda value: None)),
    "gptq-tensors": ("dense", tensor("scales", lambda value: value.float())),
    "gptq-zeros": ("dense", tensor("qzeros", lambda value: torch.full_like(value, -0x77777778))),
    "gptq-scales": ("dense", tensor("scales", nan_scale)),
    "gptq-groups": ("dense", tensor("g_idx", lambda value: value.flip(0))),
    "gptq-dynamic": ("sparse", quantization(dynamic={r"-:.*\.mlp\.gate$": {}})),
    "gptq-modules": ("sparse", quantization(modules_in_block_to_quantize=None)),
    "gptq-merged": ("dense", half_packed),
}


def rules_found(folder: Path) -> dict[str, str]:
    return {finding.rule: finding.severity for finding in check_consumers(folder)}


@pytest.mark.parametrize("name", ["dense", "sparse", "bnb"])
def test_sound_artifacts_break_no_rule_of_severity_error(name: str, request: pytest.FixtureRequest) -> None:
    folder = Path(request.getfixturevalue(name))
    refuse_errors(folder, check_consumers(folder))
    assert "error" not in rules_found(folder).values()


@pytest.mark.parametrize("rule", BREAKS)
def test_a_broken_rule_is_found(rule: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kind, change = BREAKS[rule]
    sound = Path(request.getfixturevalue(kind))
    folder = Path(shutil.copytree(sound, tmp_path / "broken"))
    change(folder)
    found = check_consumers(folder)
    assert rule in {finding.rule for finding in found}
    severity = next(row.severity for row in (*RULES, *TENSOR_RULES) if row.name == rule)
    if severity == "error":
        with pytest.raises(InputError, match=r"docs/consumers|not what"):
            refuse_errors(folder, found)
        assert rule not in rules_found(sound)


def test_first_generation_is_told_to_convert(tmp_path: Path) -> None:
    first_generation(tmp_path / "qwen1")
    assert rules_found(tmp_path / "qwen1")["model-type"] == "warning"


def test_a_tensor_missing_from_the_index_is_found(dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "broken"))
    unlisted_tensor(folder)
    assert "weight-index" in rules_found(folder)


def test_gptq_v2_and_asymmetric_zeros_follow_their_convention(tmp_path: Path) -> None:
    for name, settings in (("v2", {"checkpoint_format": "gptq_v2"}), ("asym", {"sym": False})):
        folder = make_pushable(tmp_path / name, **settings)
        assert "gptq-zeros" not in rules_found(folder)
    change_quantization(tmp_path / "v2", checkpoint_format="gptq")
    assert "gptq-zeros" in rules_found(tmp_path / "v2")


def test_every_rule_has_a_break_and_a_row_in_the_docs() -> None:
    names = {rule.name for rule in (*RULES, *TENSOR_RULES)}
    assert names == {*BREAKS, "model-type"}
    text = DOCS.read_text(encoding="utf-8")
    for rule in (*RULES, *TENSOR_RULES):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{rule.name}` "))
        assert f"| {rule.severity} |" in row and all(name in row for name in rule.consumers), row
    assert all(f"{name} | {version}" in text for name, version in VERSIONS.items())
