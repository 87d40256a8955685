"""Commands in a card are right for its artifact: they are taken out of it and run, or absent with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qwen_quant import cli
from qwen_quant.bnb_convert import quantize_bnb
from qwen_quant.bnb_plan import BnbJob
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.hub.card import card_problems, make_card
from qwen_quant.hub.card_facts import CardFacts, Told, gather_facts
from qwen_quant.hub.card_run import refusal, reproduce_command, use_section
from qwen_quant.hub.card_source import SourceCard
from qwen_quant.hub.card_state import CardRequest
from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.recipe import BnbConfig, CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.sequential import quantize_checkpoint
from tests.support import card as evidence
from tests.support.checkpoints import make_checkpoint, text_file, write_tokenizer
from tests.support.moe import make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(folder: Path, language: str = "en") -> dict[str, list[str]]:
    """Language of the fence -> its blocks in a fresh card."""
    found: dict[str, list[str]] = {}
    text = make_card(folder, CardRequest(language)).read_text(encoding="utf-8")
    for kind, body in BLOCK.findall(text):
        found.setdefault(kind, []).append(body)
    return found


def rerun(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the card's own command in `home`, where its source and text lie; returns what it wrote."""
    line = next(body for body in blocks(folder)["bash"] if body.startswith(("qwen-quant gptq", "qwen-quant bnb")))
    words = shlex.split(line.replace("\\\n", " "))
    monkeypatch.chdir(home)
    assert words[3] == f"./{folder.name}"
    words[3] = "./again"
    assert cli.run([*words[1:], "--quiet"]) == 0
    return home / "again"


def test_the_gptq_command_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "tiny source", "qwen3", intermediate_size=256)
    text = text_file(tmp_path / "my text.txt")
    config = GPTQConfig(
        group_size=32, sym=False, damp_percent=0.02, order="column", scales="minmax", asymmetric_calibration=False
    )
    job = QuantizeJob(
        model, tmp_path / "out", config, CalibrationConfig(str(text), 12, 64, 3), RunConfig(device="cpu"), "tiny source"
    )
    quantize_checkpoint(job, no_progress)
    again = rerun(tmp_path / "out", tmp_path, monkeypatch)
    assert weights_sha256(again) == weights_sha256(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "does not read asymmetric GPTQ weights" in card and "vllm serve" not in card and "sglang.launch" not in card
    assert weights_sha256(model) in card


def test_the_bnb_command_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "tiny", intermediate_size=256)
    config = BnbConfig(quant_type="fp4", double_quant=True, block_size=128, skip=("layers.0.mlp.down_proj",))
    quantize_bnb(BnbJob(model, tmp_path / "out", config, RunConfig(), "tiny"), no_progress)
    again = rerun(tmp_path / "out", tmp_path, monkeypatch)
    assert weights_sha256(again) == weights_sha256(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "FP4, blocks of 128, double quantization" in card and "kept by --skip" in card
    assert "vllm serve ./out" in card and "sglang.launch" not in card and "import qwen_quant" not in card
    assert "pip install bitsandbytes" in card and "needs no data" in card


def test_the_python_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "tiny", intermediate_size=256)
    calibration = CalibrationConfig(str(text_file(tmp_path / "t.txt")), 12, 64)
    config = GPTQConfig(group_size=32, rounding_only=True)
    quantize_checkpoint(
        QuantizeJob(model, tmp_path / "out", config, calibration, RunConfig(device="cpu"), "t"), no_progress
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code = blocks(tmp_path / "out")["python"][0].replace("max_new_tokens=256", "max_new_tokens=5")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    assert "apply_chat_template" in code and printed.getvalue().endswith("\n")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by plain rounding, without GPTQ" in card and "--rounding-only" in card


@pytest.mark.parametrize("family", ["qwen3_5_moe"])
def test_experts_linear_attention_and_vision(family: str, tmp_path: Path) -> None:
    model = make_family_checkpoint(tmp_path / "tiny", family)
    calibration = CalibrationConfig(str(text_file(tmp_path / "t.txt")), 4, 64)
    config = GPTQConfig(group_size=32, rounding_only=True, expert_policy="round")
    job = QuantizeJob(model, tmp_path / "out", config, calibration, RunConfig(device="cpu"), "Qwen/tiny", "ab" * 20)
    quantize_checkpoint(job, no_progress)
    text = make_card(tmp_path / "out", CardRequest("both")).read_text(encoding="utf-8")
    for words in (
        "mlp.experts.\\*.gate\\_proj",
        "linear_attn.out_proj",
        "routers stay 16-bit",
        "the vision tower stays 16-bit",
    ):
        assert words in text or words.replace("\\", "") in text
    assert "路由器" in text and "视觉编码器" in text and "Routed experts by what calibrated them" in text
    assert "it gives transformers what this architecture needs" in text
    assert f"qwen-quant gptq Qwen/tiny@{'ab' * 20} ./out" in text and "--expert-policy round" in text
    assert all("report" in line or "licence" in line for line in card_problems(tmp_path / "out"))


def test_first_generation_is_converted_before_it_is_served(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "tiny")
    write_tokenizer(model)
    calibration = CalibrationConfig(str(text_file(tmp_path / "t.txt")), 4, 64)
    config = GPTQConfig(group_size=32, rounding_only=True)
    quantize_checkpoint(
        QuantizeJob(model, tmp_path / "out", config, calibration, RunConfig(device="cpu"), "t"), no_progress
    )
    found = blocks(tmp_path / "out")
    assert "qwen-quant convert ./out ./out-qwen2 --to qwen2\n" in found["bash"]
    assert "import qwen_quant\n" in found["python"][0] and "apply_chat_template" in found["python"][0]
    assert not any("vllm" in block or "sglang" in block for block in found["bash"])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> CardFacts:
    folder = evidence.make_card_folder(tmp_path_factory.mktemp("run") / "artifact", with_profile=False)
    return gather_facts(folder, Told(SourceCard()))


def changed(facts: CardFacts, **changes: Any) -> CardFacts:
    """The same facts with other solver settings."""
    return dataclasses.replace(
        facts, made=dataclasses.replace(facts.made, config=dataclasses.replace(facts.made.config, **changes))
    )


@pytest.mark.parametrize(
    ("changes", "vllm", "sglang"),
    [
        ({}, "", ""),
        ({"bits": 8}, "", ""),
        ({"checkpoint_format": "gptq_v2"}, "", ""),
        ({"sym": False}, "not_asym", "not_asym_sglang"),
        ({"desc_act": True}, "not_desc_act", "not_desc_act"),
        ({"bits": 3}, "not_bits", "not_bits"),
    ],
)
def test_what_serves_which_settings(facts: CardFacts, changes: dict[str, Any], vllm: str, sglang: str) -> None:
    fitting = changed(dataclasses.replace(facts, inspected=dataclasses.replace(facts.inspected, limits=())), **changes)
    assert (refusal(fitting, "vLLM"), refusal(fitting, "SGLang")) == (vllm, sglang)
    page = "\n".join(use_section(fitting, "en"))
    assert ("vllm serve ./artifact\n" in page) == (not vllm)
    assert ("--model-path ./artifact" in page) == (not sglang)


def test_shapes_that_marlin_refuses_are_told(facts: CardFacts) -> None:
    limit = dataclasses.replace(
        facts.inspected.limits[0], target="Marlin", reason="in_features 96 is not a multiple of 128"
    )
    odd = dataclasses.replace(facts, inspected=dataclasses.replace(facts.inspected, limits=(limit,)))
    page = "\n".join(use_section(odd, "en"))
    assert "vllm serve ./artifact --dtype float16" in page and refusal(odd, "SGLang") == "not_shapes"


@pytest.mark.parametrize("name", ["a b", "$(touch x)", "it's; rm -rf", "-x", "千问`id`", '"quoted"'])
def test_odd_folder_names_are_quoted(facts: CardFacts, name: str) -> None:
    odd = dataclasses.replace(facts, name=name, target=f"./{name}")
    lines = [body for kind, body in BLOCK.findall("\n".join(use_section(odd, "en"))) if kind == "bash"]
    assert shlex.split(lines[0])[2] == f"./{name}"
    assert shlex.split(reproduce_command(odd).replace("\\\n", " "))[3] == f"./{name}"
    python = next(body for kind, body in BLOCK.findall("\n".join(use_section(odd, "en"))) if kind == "python")
    compile(python, "card", "exec")


def test_the_size_of_shards_is_part_of_the_same_bytes(facts: CardFacts) -> None:
    assert facts.made.max_shard_size_bytes is None and "--max-shard-size" not in reproduce_command(facts)
    for size, there in ((2_000_000_000, False), (500_000_000, True)):
        made = dataclasses.replace(facts.made, max_shard_size_bytes=size)
        command = reproduce_command(dataclasses.replace(facts, made=made))
        assert ("--max-shard-size 500000000" in command) == there
