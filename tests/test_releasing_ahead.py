"""What stops a release before its first stage, and what no format could hold before anything is quantized."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.errors import InputError, UsageError
from qwen_quant.export.formats import all_formats
from qwen_quant.export.planned import PlannedSource
from qwen_quant.export.source import ExportSource
from qwen_quant.progress import no_progress
from qwen_quant.recipe import GPTQConfig
from qwen_quant.release import ReleaseJob, plan_release, run_release
from qwen_quant.releasing.ahead import problems_ahead
from qwen_quant.releasing.settings import load_release
from tests.export.making import gptq_folder
from tests.support.checkpoints import make_checkpoint
from tests.test_release import write_recipe


def job(tmp_path: Path, model: Path, release: str, repo: str = "me/x", **more: Any) -> ReleaseJob:
    recipe = load_release(write_recipe(tmp_path, model, release=f'profile = "none"\n{release}'))
    return ReleaseJob(recipe, tmp_path / "work", repo, **more)


def refusal(job: ReleaseJob) -> InputError | UsageError:
    with pytest.raises((InputError, UsageError)) as refused:
        run_release(job, no_progress, lambda text: None)
    assert not (job.work / "stages").exists()
    return refused.value


def test_a_format_without_its_package_is_refused_before_any_work(
    tmp_path: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    asked = job(tmp_path, qwen2_folder, 'formats = ["gguf"]', push=False)
    assert "pip install 'qwen-quant[gguf]'" in refusal(asked).next_step
    assert any("qwen-quant[gguf]" in line for line in problems_ahead(asked.recipe, "", ["export"]))
    up_to_gate = job(tmp_path, qwen2_folder, 'formats = ["gguf"]', push=False, until="download")
    assert run_release(up_to_gate, no_progress, lambda text: None).complete


@pytest.mark.parametrize(
    ("release", "repo", "words"),
    [
        ("", "me/x", "base_model is missing"),
        ('base_model = "org/base"', "", "no repository to push to"),
        ('base_model = "org/base"\nsign_key = "/no/key.pem"', "me/x", "/no/key.pem|model-signing"),
    ],
)
def test_what_a_push_needs_is_asked_for_first(
    tmp_path: Path, qwen2_folder: Path, release: str, repo: str, words: str
) -> None:
    asked = job(tmp_path, qwen2_folder, release, repo)
    said = str(refusal(asked))
    assert any(word in said for word in words.split("|"))
    assert any(word in line for line in plan_release(asked).problems for word in words.split("|"))
    without = plan_release(job(tmp_path, qwen2_folder, release, repo, push=False))
    assert without.problems == ()


def test_tasks_without_the_harness_are_refused_before_any_work(
    tmp_path: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    asked = job(tmp_path, qwen2_folder, '[tasks]\ntasks = ["gsm8k"]', push=False)
    assert "pip install 'qwen-quant[eval]'" in refusal(asked).next_step


@pytest.mark.parametrize(("settings", "name"), [("bits = 8\n", "awq"), ("desc_act = true\n", "mlx"), ("", "bf16")])
def test_a_format_that_cannot_hold_it_stops_before_quantizing(
    tmp_path: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: str, name: str
) -> None:
    monkeypatch.setattr("qwen_quant.releasing.ahead.check_machine", lambda recipe, stages: None)
    monkeypatch.setattr("qwen_quant.release.check_machine", lambda recipe, stages: None)
    path = write_recipe(tmp_path, qwen2_folder, release=f'profile = "none"\nformats = ["{name}"]')
    path.write_text(path.read_text().replace("[gptq]\n", f"[gptq]\n{settings}"))
    asked = ReleaseJob(load_release(path), tmp_path / "work", push=False)
    result = run_release(asked, no_progress, lambda text: None)
    assert result.error is not None and f"{name} in formats cannot hold" in str(result.error)
    assert {row.name: row.status for row in result.stages}["gptq"] == "failed"
    with pytest.raises(InputError, match=f"{name} in formats cannot hold"):
        plan_release(asked)


@pytest.mark.parametrize("changes", [{}, {"sym": False}, {"bits": 8}, {"bits": 3}, {"desc_act": True}])
def test_what_is_planned_is_what_comes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every format says of the plan what it says of the artifact."""
    source = make_checkpoint(tmp_path / "model", "qwen2", intermediate_size=256)
    own = {"act_order" if key == "desc_act" else key: value for key, value in changes.items()}
    gptq_folder(source, tmp_path / "made", **own)
    made, planned = ExportSource(tmp_path / "made"), PlannedSource(source, GPTQConfig(group_size=32, **changes))
    assert set(planned.linears) == set(made.linears) and set(planned.kept) == set(made.kept)
    for row in all_formats():
        found, expected = ({reason.what for reason in row.check(one)} for one in (planned, made))
        assert found == expected, row.name
