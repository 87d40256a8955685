"""The command line through its real entry point: exit codes, one JSON document, one clear message, nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_quant import cli
from qwen_quant.recipe import Recipe, load_recipe

COMMANDS = (
    "download",
    "gptq",
    "bnb",
    "validate",
    "compare",
    "profile",
    "card",
    "release",
    "verify",
    "sign",
    "push",
    "convert",
    "export",
    "inspect",
    "plan",
    "doctor",
    "init",
    "demo",
)
SCRIPT = Path(sys.executable).with_name("qwen-quant")


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `qwen-quant` in `folder`, as installed (or by `python -m` where only the source tree is there)."""
    start = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "qwen_quant"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **variables}
    command = [*start, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@dataclass(frozen=True)
class Called:
    """What one command line left behind."""

    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Called]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The same command line in this process and in tmp_path: everything but the interpreter's start is the same."""
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments: str) -> Called:
        code = cli.run(list(arguments))
        return Called(code, *capsys.readouterr())

    return run_here


def failure(done: Called | subprocess.CompletedProcess[str], code: int) -> str:
    """Check exit code, silence on stdout and the absence of a traceback; returns the message."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_json_quiet_and_examples(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: qwen-quant {command}" in done.stdout
    for word in ("--json", "--quiet", "Examples:", f"    qwen-quant {command}"):
        assert word in done.stdout


def test_top_help_is_fast_and_lists_every_command(tmp_path: Path) -> None:
    run(tmp_path, "--help")
    started = time.perf_counter()
    done = run(tmp_path, "--help")
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert all(re.search(rf"^  {command} ", done.stdout, re.MULTILINE) for command in COMMANDS)
    assert seconds < 3, f"{seconds:.2f} s: a heavy import has crept into start-up (0.4 s on a quiet core)"


def test_no_arguments_shows_help_and_exits_2(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "Usage: qwen-quant" in done.stderr


def test_version(tmp_path: Path) -> None:
    from qwen_quant import __version__

    assert run(tmp_path, "--version").stdout == f"qwen-quant {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nosuch",), "No such command 'nosuch'"),
        (("gptq", "--nosuch"), "--nosuch"),
        (("gptq", "a", "b", "c"), "unexpected extra argument"),
        (("gptq", "a", "b", "--bits", "four"), "'--bits'"),
        (("gptq", "a", "b", "--scales", "best"), "'--scales'"),
        (("gptq", "a", "b", "--max-shard-size", "2 apples"), "'2 apples' is not a size"),
        (("bnb", "a", "b", "--max-shard-size", "1e400"), "'1e400' is not a size"),
        (("gptq",), "OUT is missing"),
        (("gptq", "model"), "OUT is missing"),
        (("plan",), "MODEL is missing"),
        (("inspect",), "PATH"),
        (("validate",), "OUT is missing"),
        (("validate", "out"), "'--baseline'"),
    ],
)
def test_usage_errors_exit_2(call: Call, tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in failure(call(*arguments), 2)
    assert list(tmp_path.iterdir()) == []


def test_without_a_recipe_the_error_says_how_to_make_one(call: Call) -> None:
    message = failure(call("gptq", "--bits", "4"), 2)
    assert "qwen-quant.toml" in message and "qwen-quant init" in message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--bits", "5"), "bits is 5"),
        (("--group-size", "100"), "group_size is 100"),
        (("--damp-percent", "1.5"), "damp_percent is 1.5"),
        (("--num-samples", "0"), "num_samples is 0"),
        (("--seq-len", "3"), "seq_len is 3"),
    ],
)
def test_values_out_of_range_exit_3(call: Call, tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in failure(call("gptq", "model", "out", *arguments), 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["nosuch", "./no/such", "/no/such/folder", "a/b/c"])
def test_not_a_checkpoint_exits_3(call: Call, model: str) -> None:
    assert "is not a checkpoint" in failure(call("plan", model), 3)


def test_a_file_is_not_a_checkpoint(call: Call, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "it is a file" in failure(call("plan", "model.gguf"), 3)
    assert "it is a file" in failure(call("inspect", "model.gguf"), 3)


def test_a_hub_id_without_network_exits_5(tmp_path: Path) -> None:
    message = failure(run(tmp_path, "plan", "some-org/some-model@main", HF_HOME=str(tmp_path / "hub")), 5)
    assert "some-org/some-model@main" in message and "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("recipe", "word", "code"),
    [
        ("model = 'm'\nout = 'o'\n[gptq]\nbitz = 4\n", "unknown key 'bitz' in [gptq]", 3),
        ("model = 'm'\nout = 'o'\n[gptq]\nbits = '4'\n", "bits = '4' is not of type int", 3),
        ("model = 'm'\nout = 'o'\n[gptq]\nbits = 7\n", "bits is 7", 3),
        ("model = 3\nout = 'o'\n", "model = 3 is not a string", 3),
        ("nonsense = 1\n", "unknown key 'nonsense'", 3),
        ("model = \n", "cannot read the recipe", 3),
        ("model = 'm'\n", "OUT is missing", 2),
    ],
)
def test_bad_recipes_name_file_and_key(call: Call, tmp_path: Path, recipe: str, word: str, code: int) -> None:
    (tmp_path / "qwen-quant.toml").write_text(recipe)
    message = failure(call("gptq", "--quiet"), code)
    assert word in message and "qwen-quant.toml" in message


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("gptq", "--json"), 2),
        (("gptq", "--json", "--bits", "x"), 2),
        (("plan", "nosuch", "--json"), 3),
        (("inspect", "nosuch", "--json"), 3),
        (("validate", "nosuch", "--baseline", "nosuch", "--json"), 3),
        (("plan", "some-org/some-model", "--json"), 5),
    ],
)
def test_json_error_is_one_document(call: Call, arguments: tuple[str, ...], code: int) -> None:
    done = call(*arguments)
    assert done.returncode == code
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code and error["message"] and error["next_step"]
    # A resolver that says "try again" is asked again, with a warning before the error.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: no answer yet")]
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize("command", ["doctor", "inspect", "init"])
def test_json_result_is_one_document(tmp_path: Path, qwen2_folder: Path, command: str) -> None:
    arguments = (str(qwen2_folder),) if command == "inspect" else ()
    done = run(tmp_path, command, *arguments, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["command"]) == ("qwen-quant/1", command)
    assert done.stderr == ""


def test_exit_codes_and_json_through_the_real_process(tmp_path: Path) -> None:
    failure(run(tmp_path, "gptq"), 2)
    failure(run(tmp_path, "gptq", "model", "out", "--bits", "5"), 3)
    done = run(tmp_path, "gptq", "model", "out", "--bits", "5", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["exit_code"] == 3


def test_init_writes_the_defaults_and_refuses_to_overwrite(call: Call, tmp_path: Path) -> None:
    assert call("init", "./a model", "out").returncode == 0
    path = tmp_path / "qwen-quant.toml"
    assert load_recipe(path) == Recipe(model="./a model", out="out")
    text = path.read_text()
    assert all(f"\n{key} = " in text for key in ("bits", "group_size", "seq_len", "max_shard_size"))
    assert "exists" in failure(call("init", "other"), 3)
    assert path.read_text() == text
    assert call("init", "other", "--force").returncode == 0
    assert load_recipe(path).model == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["qwen-quant.toml"]


def test_an_existing_out_is_refused_before_any_work(call: Call, tmp_path: Path, qwen2_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    message = failure(call("gptq", str(qwen2_folder), "out"), 3)
    assert "out exists" in message and "--force" in message
    assert (tmp_path / "out" / "keep.txt").read_text() == "mine"


def test_names_that_no_json_can_hold_are_refused(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work: a run over such a folder would end at its manifest."""
    assert "'model\\udcff' is not valid UTF-8" in failure(call("gptq", "model\udcff", "out"), 3)
    odd = tmp_path / "here\udcff"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert "is not valid UTF-8" in failure(call("gptq", "model", "out"), 3)


@pytest.mark.parametrize(("number", "word"), [(errno.EFBIG, "--max-shard-size"), (errno.EMFILE, "ulimit")])
def test_what_a_file_system_refuses_is_no_bug_of_ours(number: int, word: str) -> None:
    error = cli.as_known_error(OSError(number, os.strerror(number)))
    assert error.exit_code == 3 and word in error.next_step


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path, qwen2_folder: Path) -> None:
    command = f"'{sys.executable}' -m qwen_quant inspect '{qwen2_folder}' --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    shell = ["bash", "-c", command]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("{")[1].strip() == "0"
    assert done.stderr == ""


def test_a_full_disk_under_stdout_exits_3(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qwen_quant", "init", "--json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 3
    assert "disk full" in done.stderr and "Traceback" not in done.stderr
