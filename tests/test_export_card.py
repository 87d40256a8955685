"""Cards of exports and conversions: the runtimes' commands, the proof, where the figures come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qwen_quant import cli
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.checkpoint.manifest import provenance, write_manifest
from qwen_quant.errors import InputError
from qwen_quant.hub.card import add_evidence, card_problems, make_card
from qwen_quant.hub.card_names import without_folders
from qwen_quant.hub.card_state import CardRequest
from qwen_quant.hub.export_table import HUB_FORMATS
from qwen_quant.hub.push_formats import export_place, make_export
from qwen_quant.progress import no_progress
from tests.support.pushable import make_pushable, write_report_for

RUN = {
    "awq": ("vllm serve me/X", "gptqmodel", "mlx_lm.generate --model me/X"),
    "compressed-tensors": ("vllm serve me/X", "compressed-tensors"),
    "gptq_v2": ("import qwen_quant", "vllm serve me/X"),
    "mlx": ("mlx_lm.server --model me/X", 'load("me/X")'),
    "onnx": ("hf download me/X --local-dir ./X", 'genai.Model("./X")', "apply_chat_template"),
    "openvino": ("openvino-tokenizers", 'openvino_genai.LLMPipeline("./X", "CPU")'),
    "bf16": ("vllm serve me/X", "AutoModelForCausalLM"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its AWQ export beside it. Read only."""
    folder = make_pushable(tmp_path_factory.mktemp("cards") / "tiny-Int4")
    make_export(folder, "awq", export_place(folder, "awq"), no_progress)
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Keys of the manifest, which fits the folder's files as they are then."""
    manifest = {**json.loads((folder / "qwen-quant.json").read_text()), **changes}
    write_manifest(folder, manifest)


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    """A copy of the export with the artifact's report."""
    folder = Path(shutil.copytree(export_place(made, "awq"), tmp_path / "X"))
    add_evidence(folder, report=made / "report.json")
    return folder


@pytest.mark.parametrize("name", RUN)
def test_commands_and_metadata_of_each_format(export: Path, name: str) -> None:
    change(export, format=name)
    make_card(export, CardRequest("both", "me/X", links=(("gptq", "me/Y"), (name, "me/X"))))
    assert card_problems(export) == []
    card = ModelCard((export / "README.md").read_text())
    for command in RUN[name]:
        assert card.text.count(command) >= 2, f"{command}: once in each language"
    assert card.data.library_name == HUB_FORMATS[name].library and set(HUB_FORMATS[name].tags) <= set(card.data.tags)
    assert card.data.base_model == "Qwen/Qwen2-tiny" and card.data.base_model_relation == "quantized"
    assert "https://huggingface.co/me/Y" in card.text and "huggingface.co/me/X)" not in card.text
    assert f"qwen-quant export ./tiny-Int4 ./X --format {name}" in card.text
    assert "qwen-quant gptq Qwen/Qwen2-tiny@ab12" in card.text, "how the codes were made"
    results = {row.metric_type for row in card.data.eval_results}
    assert "kl_divergence" in results and "largest difference 0)" in card.text


def test_a_local_calibration_text_is_named_with_its_hash(export: Path) -> None:
    source = json.loads((export / "qwen-quant.json").read_text())["source"]
    source["manifest"]["calibration"]["source"] = "/home/me/wiki.txt"
    change(export, source=source)
    text = make_card(export, CardRequest("both", "me/X")).read_text()
    assert text.count("`wiki.txt`") == 2 and text.count(f"`{'ca' * 32}`") == 2 and "/home/me" not in text


def test_an_asymmetric_export_gets_no_command_that_fails(export: Path) -> None:
    grid = {"source_kind": "gptq", "bits": 4, "group_size": 32, "sym": False, "act_order": False}
    for name, word in (("compressed-tensors", "AutoModelForCausalLM"), ("gptq_v2", "vllm serve")):
        change(export, format=name, quantization=grid)
        assert word not in make_card(export, CardRequest("en", "me/X")).read_text()


def test_the_report_of_other_weights_and_a_profile_are_refused(export: Path, made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made, tmp_path / "other"))
    write_report_for(other, quantized_sha256="ab" * 32)
    with pytest.raises(InputError, match="another artifact"):
        add_evidence(export, report=other / "report.json")
    with pytest.raises(InputError, match="takes no profile"):
        add_evidence(export, profile=other / "report.json")


def test_a_conversion(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "as-qwen2"))
    (folder / "report.json").unlink()
    logits = {"tokens": 64, "largest_difference": 0.0, "tolerance": 1e-5}
    source = {"id": "tiny-Int4", "revision": None, "sha256": {}, **provenance(made)}
    (folder / "qwen-quant.json").unlink()
    write_manifest(
        folder,
        {
            "schema": "qwen-quant/1",
            "method": "convert",
            "source": source,
            "proof": {"logits": logits},
            "versions": {"qwen-quant": "0.1.0"},
            "warnings": ["EXACT UP TO 2048 TOKENS ONLY"],
        },
    )
    assert cli.run(["card", str(folder), "--repo", "me/as-qwen2", "--json"]) == 0
    assert "there is no report.json" in str(json.loads(capsys.readouterr().out)["problems"])
    text = (folder / "README.md").read_text()
    assert "names of Qwen2" in text and "on 64 tokens the largest difference" in text and "2048 TOKENS" in text
    assert "qwen-quant convert ./tiny-Int4 ./as-qwen2 --to qwen2" in text and "vllm serve me/as-qwen2" in text
    write_report_for(folder, quantized_sha256=weights_sha256(folder))
    make_card(folder, CardRequest())
    assert card_problems(folder) == [] and "before they were renamed" in (folder / "README.md").read_text()


def test_names_in_place_of_paths() -> None:
    kept = "https://huggingface.co/a/b, Qwen/Qwen3-8B, 3 tokens/s, 1/2 and +/-5"
    assert without_folders(f"{kept} of '/home/me/x y/z.txt' and ~/models/Q") == f"{kept} of 'x y/z.txt' and Q"
