"""The parts of `release`: recipes, records of finished stages, the plan, the workflow that runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_quant.errors import InputError, QwenQuantError
from qwen_quant.recipe import load_recipe
from qwen_quant.release import ReleaseJob, check_job, plan_release, stage_names
from qwen_quant.releasing.planning import LEFT_OUT, NOT_ASKED, WOULD_RUN, prediction_text
from qwen_quant.releasing.records import (
    FileFacts,
    Record,
    file_facts,
    inputs_sha256,
    locked,
    read_record,
    why_run,
    write_record,
)
from qwen_quant.releasing.settings import load_release
from qwen_quant.releasing.stage import artifact_name, plain

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
GATED = 'model = "org/name"\n[gates]\nmax_kl = 0.1\n'


def test_there_is_a_recipe_for_every_model_of_the_issue() -> None:
    models = {load_release(path).model.rpartition("/")[2] for path in RECIPES}
    wanted = {"Qwen-7B-Chat", "Qwen-14B-Chat", "Qwen2.5-7B-Instruct", "Qwen3-8B", "Qwen3-30B-A3B"}
    assert models == wanted | {"bundled:demo_checkpoint"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_loaded_by_every_command(path: Path) -> None:
    recipe = load_release(path)
    assert recipe.base == dataclasses.replace(load_recipe(path))
    assert recipe.base.gates.max_kl is not None and recipe.release.kind == "gptq"
    check_job(ReleaseJob(recipe, Path("work"), "org/name"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gates]\nmax_kl = 1\n", "model is missing"),
        ('model = "org/name"\n', "there is no gate"),
        (GATED + "[release]\nrepp = 1\n", "unknown key 'repp' in [release]"),
        (GATED + '[release]\nkind = "awq"\n', "kind is 'awq'"),
        (GATED + '[release]\nrepo = "name"\n', "'name' is not a repository"),
        (GATED + '[release]\ncard_language = "fr"\n', "card_language is 'fr'"),
        (GATED + '[release]\nprivate = "yes"\n', "private = 'yes' is not of type bool"),
        (GATED + '[release]\noverride_gates = " "\n', "override_gates is blank"),
        (GATED + '[release]\nsource = "modelscope"\n[release2]\n', "unknown key 'release2'"),
        (GATED + "[profile]\nruns = 0\n", "runs is 0"),
        (GATED + "[profile]\nthreads = 1.5\n", "threads = 1.5 is not of type"),
        (GATED + '[profile]\nkv_caches = ["fp8"]\n', "kv_cache is 'fp8'"),
        (GATED + '[release]\nformats = ["gguff"]\n', "unknown format 'gguff'"),
        (GATED + '[release]\nkind = "bnb"\nformats = ["awq"]\n', "formats has no meaning with kind 'bnb'"),
        (GATED + "max_task_drop = 0.1\n", "max_task_drop is set but no task is run"),
        ('out = "here"\n' + GATED, "out has no meaning in a release"),
        ("model = ", "cannot read the recipe"),
    ],
)
def test_a_bad_recipe_is_refused_before_any_work(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(QwenQuantError) as refused:
        load_release(path)
    assert message in str(refused.value)
    assert refused.value.exit_code in (2, 3)


def test_until_takes_the_stages_of_the_recipes_kind_only(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(GATED + '[release]\nkind = "bnb"\n')
    recipe = load_release(path)
    assert "gptq" not in stage_names("bnb") and stage_names("bnb")[1] == "bnb"
    with pytest.raises(QwenQuantError, match="there is no such stage"):
        check_job(ReleaseJob(recipe, tmp_path, until="gptq"))


def test_the_artifact_is_named_after_the_source(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(GATED.replace("org/name", "org/name@main"))
    assert artifact_name(load_release(path)) == "name-GPTQ-Int4"
    path.write_text(GATED + '[release]\nkind = "bnb"\n')
    assert artifact_name(load_release(path)) == "name-bnb-nf4"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A finished stage with two files in tmp_path/out."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("first")
    (out / "b").write_text("second")
    inputs = plain(settings={"bits": 4, "group_size": 128}, source="abc")
    return Record("made", inputs, "out", file_facts(out, ("a", "b")), ("a",), {"x": 1}, "two files", 1.5, "now")


def test_a_record_reads_back_as_it_was_written(tmp_path: Path, record: Record) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path, "made") == record
    assert read_record(tmp_path, "other") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "qwen-quant/release-stage/1", "files": 3}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, record: Record, text: str) -> None:
    write_record(tmp_path, record)
    (tmp_path / "stages" / "made.json").write_text(text)
    assert read_record(tmp_path, "made") is None


def test_a_stage_runs_when_an_input_changed_and_says_which(tmp_path: Path, record: Record) -> None:
    assert why_run(record, record.inputs, tmp_path) == ""
    assert why_run(None, record.inputs, tmp_path) == "it has not run yet"
    changed = plain(settings={"bits": 8, "group_size": 128}, source="abc")
    assert why_run(record, changed, tmp_path) == "settings.bits was 4, is now 8"
    assert inputs_sha256(changed) != inputs_sha256(record.inputs)


def test_a_stage_runs_when_its_output_is_not_whole(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "out" / "a"
    path.write_text("FIRST")
    os.utime(path, ns=(1, 1))
    assert why_run(record, record.inputs, tmp_path) == f"{path} has changed"
    path.write_text("first")  # the same bytes at another time are the same output
    assert why_run(record, record.inputs, tmp_path) == ""
    path.unlink()
    assert why_run(record, record.inputs, tmp_path) == f"{path} is missing"


def test_the_digest_is_of_names_and_bytes(record: Record) -> None:
    renamed = {"c" if name == "b" else name: facts for name, facts in record.files.items()}
    touched = {name: dataclasses.replace(facts, mtime_ns=7) for name, facts in record.files.items()}
    other = {**record.files, "b": FileFacts("0" * 64, 6, 0)}
    same, name, content = (dataclasses.replace(record, files=files).digest for files in (touched, renamed, other))
    assert same == record.digest and len({record.digest, name, content}) == 3


def test_a_work_folder_belongs_to_one_release_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "work"):
        with pytest.raises(InputError, match="another release is working"), locked(tmp_path / "work"):
            pass
    with locked(tmp_path / "work"):
        pass


def test_a_release_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "work"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with locked(tmp_path / "work"):
        pass


def test_the_demo_recipe_is_planned_without_writing(tmp_path: Path) -> None:
    job = ReleaseJob(load_release(ROOT / "recipes" / "demo.toml"), tmp_path / "work", until="gate")
    plan = plan_release(job)
    rows = {row.name: row for row in plan.stages}
    assert not (tmp_path / "work").exists()
    gptq = rows["gptq"].prediction
    assert rows["gptq"].status == WOULD_RUN
    assert gptq.seconds and gptq.peak_memory_bytes and gptq.output_bytes and gptq.disk_bytes
    assert 3 << 20 < gptq.output_bytes < 5 << 20
    assert rows["bnb"].status == LEFT_OUT and rows["card"].status == NOT_ASKED
    assert rows["validate"].prediction.seconds is None and rows["validate"].prediction.why
    assert prediction_text(rows["validate"])[0] == "not predicted" and plan.problems == ()
    json.dumps(dataclasses.asdict(plan), default=str)


def test_a_source_that_is_not_here_is_not_predicted(tmp_path: Path) -> None:
    job = ReleaseJob(load_release(ROOT / "recipes" / "Qwen3-8B.toml"), tmp_path / "work", "org/name")
    rows = {row.name: row for row in plan_release(job).stages}
    assert rows["gptq"].prediction.seconds is None
    assert "the source is not here yet" in rows["gptq"].prediction.why
    assert rows["download"].prediction.output_bytes is None
    assert "the hub does not say" in rows["download"].prediction.why


def test_the_workflow_fits_its_schema_and_names_every_recipe() -> None:
    from ruamel.yaml import YAML

    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, workflows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    workflow = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "release.yml")
    inputs = workflow["on"]["workflow_dispatch"]["inputs"]
    assert sorted(inputs["recipe"]["options"]) == sorted(f"recipes/{path.name}" for path in RECIPES)
    steps = workflow["jobs"]["release"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(len(action.partition("@")[2]) == 40 for action in used), "pinned by commit"
    with_token = [step for step in steps if "secrets.HF_TOKEN" in str(step.get("env"))]
    assert [step["name"] for step in with_token] == ["Push"]
    condition = with_token[0]["if"]
    assert "success()" in condition and "HAS_TOKEN == 'true'" in condition and "inputs.push" in condition
    assert not any("${{" in step.get("run", "") for step in steps), "inputs reach a shell through its environment only"
