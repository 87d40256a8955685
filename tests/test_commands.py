"""What each command makes of its stage's answer: gates, exit codes, tables, interruption. Slow stages are faked."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant import cli, sequential
from qwen_quant.errors import NetworkError
from qwen_quant.results import LayerStats, ValidationResult
from tests.support.checkpoints import text_file
from tests.support.reports import make_result

RESULT = make_result()


def stand_in(**values: object) -> object:
    """A dataclass instance with just the fields that a command reads."""
    return dataclasses.make_dataclass("StandIn", values.keys(), frozen=True)(**values)


ESTIMATE = stand_in(lines=("predicted: little",), output_bytes=1000, peak_memory_bytes=2000, seconds=61.0)
QUANTIZED = stand_in(
    out=Path("out"),
    layers=(LayerStats("model.layers.0.mlp.up_proj", 128, 256, 0.05, 0.12, 0.01, 0, 4096, 0.5),),
    tokens=4096,
    calibration_sha256="cd" * 32,
    source_bytes=4_000_000,
    output_bytes=1_000_000,
    quantized_parameters=32768,
    kept_parameters=1000,
    peak_memory_bytes=3000,
    seconds=75.0,
    warnings=("few tokens",),
    predicted=ESTIMATE,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two empty model folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "artifact"):
        (tmp_path / name).mkdir()
    return tmp_path


def fake_validation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stand in for the validation stage; returns the list of its calls."""
    calls: list[tuple[object, ...]] = []

    def validate_pair(*arguments: object, work: Path | None = None) -> ValidationResult:
        calls.append(arguments)
        return RESULT

    monkeypatch.setattr("qwen_quant.evaluation.validate.validate_pair", validate_pair)
    monkeypatch.setattr("qwen_quant.evaluation.measure.validate_pair", validate_pair)
    return calls


def fake_quantization(monkeypatch: pytest.MonkeyPatch, stage: Callable[..., object]) -> None:
    monkeypatch.setattr(sequential, "quantize_checkpoint", stage)


def raising(error: BaseException) -> Callable[..., object]:
    def stage(*arguments: object) -> object:
        raise error

    return stage


def test_validate_prints_the_comparison(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_validation(monkeypatch)
    assert cli.run(["validate", "artifact", "--baseline", "model", "--window", "64", "--max-windows", "3"]) == 0
    text = capsys.readouterr().out
    for word in ("20.000", "21.000", "0.0800 (0.0700 to 0.0900)", "90.00% (89.00 to 91.00)", "3.81 MiB"):
        assert word in text
    baseline, quantized, config, _ = calls[0]
    assert (baseline, quantized) == (Path("model"), Path("artifact"))
    assert (config.texts, config.window_tokens, config.max_windows, config.device) == (("bundled",), 64, 3, "auto")
    assert json.loads(Path("artifact/report.json").read_text())["quantized"] == "artifact"
    assert Path("artifact/report.html").is_file() and not Path("artifact/.validate.partial").exists()


def test_a_report_is_not_overwritten_without_force(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_validation(monkeypatch)
    arguments = ["validate", "artifact", "--baseline", "model"]
    assert cli.run(arguments) == 0
    assert cli.run(arguments) == 3
    assert "--force" in capsys.readouterr().err and len(calls) == 1
    assert cli.run([*arguments, "--force"]) == 0
    assert cli.run([*arguments, "--report", "elsewhere"]) == 0
    assert Path("elsewhere/report.json").is_file()


def test_a_cache_alone_is_compared_on_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_validation(monkeypatch)
    Path("qwen-quant.toml").write_text("model = 'model'\nout = 'artifact'\n")
    assert cli.run(["validate", "artifact", "--kv-cache", "int8"]) == 0
    assert cli.run(["validate", "artifact", "--baseline", "artifact", "--kv-cache", "qwen"]) == 0
    assert cli.run(["validate", "artifact", "--baseline", "model", "--kv-cache", "int8"]) == 0
    Path("qwen-quant.toml").write_text("model = 'model'\nout = 'artifact'\n[validation]\nkv_cache = 'int8'\n")
    assert cli.run(["validate", "--force"]) == 0
    names = [(str(call[0]), str(call[1]), call[2].kv_cache) for call in calls]
    both = ("model", "artifact", "int8")
    assert names == [("artifact", "artifact", "int8"), ("artifact", "artifact", "qwen"), both, both]
    for place in ("artifact-int8-cache", "artifact-qwen-cache", "artifact"):
        assert Path(place, "report.json").is_file()
    assert cli.run(["validate", "artifact", "--kv-cache", "fp8"]) == 2
    assert "fp8" in capsys.readouterr().err


def test_the_recipe_holds_gates_and_texts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_validation(monkeypatch)
    recipe = "model = 'model'\nout = 'artifact'\n[validation]\ntexts = ['a.txt', 'b.txt']\nwindow_tokens = 32\n"
    Path("qwen-quant.toml").write_text(recipe + "[gates]\nmax_kl = 0.01\n")
    assert cli.run(["validate", "--window", "16"]) == 4
    assert (calls[0][2].texts, calls[0][2].window_tokens) == (("a.txt", "b.txt"), 16)
    assert "max_kl" in capsys.readouterr().err
    assert cli.run(["validate", "--force", "--override-gates", "a trial"]) == 0
    assert json.loads(Path("artifact/report.json").read_text())["override_reason"] == "a trial"
    assert cli.run(["validate", "--force", "--override-gates", " "]) == 2


@pytest.mark.parametrize(
    ("options", "failed"),
    [
        (["--max-kl", "0.09", "--max-perplexity-ratio", "1.06", "--min-top1", "0.89"], []),
        (["--max-kl", "0.085"], ["max_kl"]),
        (["--max-perplexity-ratio", "1.055"], ["max_perplexity_ratio"]),
        (["--min-top1", "0.895", "--max-kl", "1"], ["min_top1"]),
        (["--min-top1", "0.95", "--max-kl", "0.01"], ["max_kl", "min_top1"]),
    ],
)
def test_gates_exit_4_and_still_print_the_result(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    failed: list[str],
) -> None:
    fake_validation(monkeypatch)
    arguments = ["validate", "artifact", "--baseline", "model", "--force", *options]
    assert cli.run([*arguments, "--json"]) == (4 if failed else 0)
    document = json.loads(capsys.readouterr().out)
    assert document["texts"][0]["perplexity"]["ratio"] == 1.05
    assert document["passed"] == (not failed) == ("error" not in document)
    assert [gate["name"].split()[0] for gate in document["gates"] if not gate["passed"]] == failed
    assert cli.run(arguments) == (4 if failed else 0)
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert all(name in printed.err for name in failed)


@pytest.mark.parametrize("options", [["--max-kl", "nan"], ["--max-kl", "-1"], ["--min-top1", "2"], ["--stride", "-1"]])
def test_limits_out_of_range_exit_3(folder: Path, options: list[str]) -> None:
    assert cli.run(["validate", "artifact", "--baseline", "model", *options]) == 3


@pytest.mark.parametrize("options", [["--max-task-drop", "0.1"], ["--lengths", "1k"], ["--window", "x"]])
def test_options_that_make_no_sense_exit_2(folder: Path, options: list[str]) -> None:
    assert cli.run(["validate", "artifact", "--baseline", "model", *options]) == 2


def test_gptq_options_override_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "model = 'model'\nout = 'there'\n[gptq]\nbits = 8\ngroup_size = 32\n[run]\nmax_shard_size = '1GB'\n"
    (folder / "qwen-quant.toml").write_text(recipe)
    jobs = []
    fake_quantization(monkeypatch, lambda job, *rest: jobs.append(job) or QUANTIZED)
    options = ["--bits", "4", "--asym", "--format", "gptq_v2", "--no-asymmetric-calibration", "--seed", "7"]
    assert cli.run(["gptq", *options, "--order", "column", "--scales", "minmax", "--no-resume", "--quiet"]) == 0
    job = jobs[0]
    assert (job.model, job.out, job.source_id, job.revision) == (Path("model"), Path("there"), "model", None)
    assert (job.gptq.bits, job.gptq.group_size, job.gptq.sym) == (4, 32, False)
    assert (job.gptq.order, job.gptq.scales, job.gptq.checkpoint_format) == ("column", "minmax", "gptq_v2")
    assert not job.gptq.asymmetric_calibration and not job.run.resume
    assert (job.calibration.seed, job.run.max_shard_size_bytes) == (7, 10**9)


def test_gptq_shows_prediction_and_actual(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(job: object, progress: object, announce: Callable[[object], None]) -> object:
        announce(ESTIMATE)
        return QUANTIZED

    fake_quantization(monkeypatch, stage)
    assert cli.run(["gptq", "model", "out"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "predicted: little\n"
    for word in ("1 min 01 s", "1 min 15 s", "warning: few tokens", "model.layers.0.mlp.up_proj"):
        assert word in printed.out


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 3, "disk full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "/no/entry"), 3, "/no/entry"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "out of memory"),
        (NetworkError("no hub"), 5, "no hub"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_every_exception_becomes_one_message_and_a_code(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    word: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    fake_quantization(monkeypatch, raising(error))
    assert cli.run(["gptq", "model", "out", "--json", "--quiet"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["exit_code"] == code
    assert word in printed.err and "Traceback" not in printed.err
    kept = list(folder.glob("qwen-quant-*.log"))
    assert len(kept) == (1 if code == 1 else 0)
    if kept:
        assert str(kept[0]) in printed.err and "ZeroDivisionError" in kept[0].read_text()


def test_debug_variable_prints_the_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    fake_quantization(monkeypatch, raising(ValueError("odd")))
    assert cli.run(["gptq", "model", "out"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_demo_prints_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_validation(monkeypatch)
    jobs = []
    fake_quantization(monkeypatch, lambda job, progress: jobs.append(job) or QUANTIZED)
    monkeypatch.setattr("qwen_quant.data.bundled_path", lambda name: folder / name)
    assert cli.run(["demo", "--out", "there", "--quiet"]) == 0
    assert (jobs[0].model, jobs[0].out, jobs[0].gptq.group_size) == (folder / "demo_checkpoint", Path("there"), 64)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["BF16", "Int4"] in lines
    assert ["size", "3.81", "MiB", "976.6", "KiB"] in lines
    assert ["top-1", "agreement", "100%", "90.00%", "(89.00", "to", "91.00)"] in lines


def test_sigterm_stops_as_ctrl_c_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stage(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("SIGTERM did not stop the run")

    fake_quantization(monkeypatch, stage)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(["gptq", "model", "out"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_an_interrupted_run_exits_130_and_resumes(tmp_path: Path, qwen2_folder: Path) -> None:
    text = text_file(tmp_path / "text.txt")
    size = ["--group-size", "32", "--num-samples", "24", "--seq-len", "256", "--calibration", str(text)]
    command = [sys.executable, "-m", "qwen_quant", "gptq", str(qwen2_folder), "out", *size, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / ".out.partial" / "state").exists():
        assert run.poll() is None and time.monotonic() < deadline, "the run ended or hung before its first block"
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert out == "" and "run the same command again to resume" in err
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "predicted" in again.stdout and "relative error" in again.stdout
    assert (tmp_path / "out" / "qwen-quant.json").is_file()
    assert not (tmp_path / ".out.partial").exists()
