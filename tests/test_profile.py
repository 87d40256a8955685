"""profile: the published protocol, timing on a fake clock, fresh processes, out of memory as a result."""

from __future__ import annotations

import json
import math
import signal
import struct
import subprocess
import sys
import time
import xml.dom.minidom
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, StaticCache

from qwen_quant import cli, profile
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.errors import InputError, UsageError
from qwen_quant.models.skeleton import compute_dtype
from qwen_quant.profile import Subject, measurement, profile_models
from qwen_quant.profiling import child, memory, parent, png
from qwen_quant.profiling.energy import energy_meter, joules_between
from qwen_quant.profiling.page import protocol_lines, render_page, write_outputs
from qwen_quant.profiling.protocol import Cell, ProfileConfig, parse_numbers, planned_cells
from qwen_quant.profiling.published import matching, published_figures
from qwen_quant.profiling.results import (
    DEQUANTIZED,
    FAILED,
    MEASURED,
    OOM,
    ProfileResult,
    Published,
    read_profile,
    write_profile,
)
from qwen_quant.profiling.roofline import MeanCache, roofline
from qwen_quant.profiling.tables import _head, tables
from qwen_quant.profiling.timing import Timing, clear_slope, latency_curve, percentile, time_generation, total_seconds
from qwen_quant.runtime import quantized_model
from qwen_quant.runtime.loading import load_model
from tests.support.artifacts import make_artifact
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import make_family_checkpoint

SMALL = ProfileConfig(batch_sizes=(2,), new_tokens=(5,), runs=2, warmup_tokens=1, device="cpu", threads=1)


class FakeClock:
    """A clock that only moves when told: prefill takes 1 s, step k takes 0.1 + k x `growth` s."""

    def __init__(self, growth: float = 0.0) -> None:
        self.now, self.growth, self.steps = 100.0, growth, 0

    def __call__(self) -> float:
        return self.now

    def prefill(self) -> None:
        self.now += 1.0

    def step(self) -> None:
        self.now += 0.1 + self.growth * self.steps
        self.steps += 1


def timed(clock: FakeClock, tokens: int, max_seconds: float | None = None) -> Timing:
    return time_generation(clock.prefill, clock.step, tokens, clock, max_seconds)


# Protocol.


def test_the_default_is_the_published_protocol() -> None:
    assert planned_cells(ProfileConfig()) == (Cell(1, 2048), Cell(1, 8192), Cell(2048, 1))


def test_sweeps_are_the_published_cache_tables() -> None:
    by_batch = planned_cells(ProfileConfig(batch_sizes=(1, 100), kv_caches=("bf16", "int8")))
    assert by_batch == tuple(Cell(1, 1024, batch, kind) for kind in ("bf16", "int8") for batch in (1, 100))
    assert planned_cells(ProfileConfig(new_tokens=(512, 8192))) == (Cell(1, 512), Cell(1, 8192))
    both = planned_cells(ProfileConfig(batch_sizes=(1, 4, 4), new_tokens=(8, 16), context_tokens=3))
    assert both == tuple(Cell(3, new, batch) for batch in (1, 4) for new in (8, 16))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"batch_sizes": (4, 0)}, "batch size is 0"),
        ({"new_tokens": (-1,)}, "new tokens is -1"),
        ({"runs": 0}, "runs is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0"),
        ({"max_seconds": math.nan}, "max_seconds is nan"),
        ({"kv_caches": ("bf16", "fp8")}, "kv_cache is 'fp8'"),
        ({"context_tokens": 0}, "context_tokens is 0"),
        ({"context_tokens": 512}, "context_tokens is 512, without a sweep"),
        ({"batch_sizes": (10**22,)}, "batch size is 10000000000000000000000"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 10**6}, "threads is 1000000"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
    ],
)
def test_values_that_cannot_be_measured(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        ProfileConfig(**changes)


def test_numbers_on_the_command_line() -> None:
    assert parse_numbers(None, "--x") == () and parse_numbers("1,4, 16", "--x") == (1, 4, 16)
    with pytest.raises(UsageError, match="--batch-sizes is '1,a'"):
        parse_numbers("1,a", "--batch-sizes")


# Timing, on a fake clock.


def test_every_token_is_timed_and_the_first_apart() -> None:
    timing = timed(FakeClock(), 11)
    assert timing.first_token_seconds == pytest.approx(1.0)
    assert timing.step_seconds == pytest.approx((0.1,) * 10)
    assert timing.tokens == 11 and total_seconds(timing) == pytest.approx(2.0)
    assert timed(FakeClock(), 1).step_seconds == ()


def test_a_budget_stops_the_generation_and_the_rest_is_extrapolated() -> None:
    timing = timed(FakeClock(), 1001, max_seconds=5.0)
    assert timing.tokens in (41, 42)
    assert total_seconds(timing) == pytest.approx(101.0)


def test_extrapolation_follows_a_time_that_grows_with_the_context() -> None:
    full = timed(FakeClock(growth=1e-3), 2000)
    cut = timed(FakeClock(growth=1e-3), 2000, max_seconds=60.0)
    assert 64 < cut.tokens < 500
    assert total_seconds(cut) == pytest.approx(total_seconds(full), rel=1e-6)


def test_noise_is_no_growth() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 + 0.02 * torch.rand(200, generator=generator)).tolist()
    assert clear_slope(noise) < 2e-5
    assert clear_slope([0.3 - 1e-3 * k for k in range(100)]) == 0
    assert clear_slope([0.1 * k for k in range(10)]) == 0  # too few to tell
    busy = [0.02 + 1e-6 * (k % 7) + (0.05 if k > 60 and k % 3 else 0.0) for k in range(90)]
    assert clear_slope(busy) < 1e-7, "what another program takes towards the end is no growth"
    growing = [0.02 + 1e-5 * k + (0.05 if k % 3 else 0.0) for k in range(96)]
    assert clear_slope(growing) == pytest.approx(1e-5, rel=0.2)


def test_a_long_prefill_is_not_cut_before_a_few_tokens() -> None:
    assert timed(FakeClock(), 100, max_seconds=0.5).tokens == 4


def test_percentiles() -> None:
    values = [float(k) for k in range(101)]
    assert percentile(values, 0.5) == 50 and percentile(values, 0.99) == 99
    assert percentile([3.0, 1.0], 0.5) == 2 and percentile([7.0], 0.99) == 7


def test_the_curve_has_medians_of_equal_stretches() -> None:
    curve = latency_curve(Timing(1.0, tuple([1.0] * 64 + [2.0] * 64), 129))
    assert len(curve) == 64 and curve[0] == (3, 1.0) and curve[-1] == (129, 2.0)
    assert latency_curve(Timing(1.0, (), 1)) == ()


# Figures from an answer.


def answer(**changes: Any) -> dict[str, Any]:
    """What a child says of two runs of 4 x (8 + 5) tokens."""
    runs = [
        {
            "timing": {"first_token_seconds": 2.0, "step_seconds": [step] * 4, "wanted_tokens": 5},
            "joules": joules,
            "cache_bytes": 1200,
            "cache_capacity": 12,
            "cache_fixed_bytes": 0,
            "cache_tokens": 12,
        }
        for step, joules in ((0.5, 30.0), (1.0, 10.0))
    ]
    sizes = {"process_bytes": 300, "weights_bytes": 1000, "step_weights_bytes": 900, "device_peak_bytes": None}
    peaks = {"peak_bytes": 4000, "generation_peak_bytes": 3500}
    words = {"status": MEASURED, "reason": "", "kernel": "dense bfloat16", "energy_source": "RAPL package"}
    words |= {"compile_seconds": None, "cache_dtype": "bfloat16"}
    return {**words, "runs": runs, **sizes, **peaks, **changes}


def test_figures_are_medians_of_the_runs() -> None:
    m = measurement("m", Cell(8, 5, 4), answer(), bandwidth=1e4)
    assert m.speed is not None and m.memory is not None and m.roofline is not None
    assert not m.extrapolated and m.measured_tokens == 5
    rates = m.speed.tokens_per_second
    assert (rates.high, rates.low, rates.runs) == (pytest.approx(20 / 4), pytest.approx(20 / 6), 2)
    assert rates.median == pytest.approx((20 / 4 + 20 / 6) / 2)
    assert m.speed.inter_token_p50_seconds == pytest.approx(0.75)
    assert m.speed.prefill_tokens_per_second == pytest.approx(4 * 8 / 2)
    assert m.speed.joules_per_token == pytest.approx(40 / (4 * 5 * 2))
    assert (m.memory.peak_bytes, m.memory.rest_bytes, m.memory.extrapolated) == (4000, 1000, False)
    assert m.roofline.bytes_per_step == 900 + 100 * (8 + 2)
    assert m.roofline.tokens_per_second == pytest.approx(4 * 1e4 / 1900)
    assert m.roofline.share == pytest.approx((4 / 0.75) / (4 * 1e4 / 1900))


def test_a_cut_run_is_marked_and_its_cache_completed() -> None:
    m = measurement("m", Cell(8, 105, 4), cut_answer(105), bandwidth=1e4)
    assert m.extrapolated and m.measured_tokens == 5 and m.speed is not None and m.memory is not None
    assert m.speed.seconds.low == pytest.approx(2 + 104 * 0.5)
    assert m.memory.extrapolated and m.memory.kv_cache_bytes == 1200 + 100 * 100
    assert m.memory.generation_peak_bytes == 3500 + 100 * 100 and m.memory.rest_bytes == 1000


def test_spare_room_of_the_cache_is_not_counted_twice() -> None:
    """Codes for 24 tokens are allocated where 12 are used: a token costs 50 bytes, and 24 more fit already."""
    found = cut_answer(17)
    found["runs"][0]["cache_capacity"] = 24
    m = measurement("m", Cell(8, 17, 4), found, bandwidth=1e4)
    assert m.extrapolated and m.memory is not None and m.memory.kv_cache_bytes == 1200 and not m.memory.extrapolated
    found = cut_answer(33)
    found["runs"][0]["cache_capacity"] = 24
    m = measurement("m", Cell(8, 33, 4), found, bandwidth=1e4)
    assert m.memory is not None and m.memory.kv_cache_bytes == 40 * 50 and m.memory.extrapolated


def cut_answer(wanted: int) -> dict[str, Any]:
    found = answer()
    for run in found["runs"]:
        run["timing"]["wanted_tokens"] = wanted
    return found


def test_states_of_linear_attention_do_not_grow_with_the_tokens() -> None:
    """480 of 1200 bytes are fixed: 60 bytes a token."""
    found = cut_answer(105)
    for run in found["runs"]:
        run["cache_fixed_bytes"] = 480
    m = measurement("m", Cell(8, 105, 4), found, bandwidth=1e4)
    assert m.memory is not None and m.memory.kv_cache_bytes == 480 + 60 * 112
    assert m.roofline is not None and m.roofline.bytes_per_step == 900 + 480 + 60 * (8 + 52)


def test_the_protocol_says_how_often_and_after_what(swept: ProfileResult) -> None:
    for changes, words in (
        ({}, "; 3 runs of each cell after 8 warm-up tokens, "),
        ({"max_seconds": 5.0}, "; up to 3 runs of each cell after 8 warm-up tokens, "),
        ({"compile": True, "kv_caches": ("bf16",), "runs": 1}, "; 1 run of each cell after compiling, "),
    ):
        assert words in protocol_lines(replace(swept, config=replace(SWEEP, **changes)))[1]


def test_the_plain_cache_is_named_by_its_dtype() -> None:
    rows = [measurement("m", Cell(8, 5, 4, kind), answer(cache_dtype=dtype), bandwidth=0.0)
            for kind, dtype in (("bf16", "bfloat16"), ("bf16", "float32"), ("int8", "int8"))]  # fmt: skip
    assert [_head(m)[2] for m in rows] == ["bf16", "bf16 (held in float32)", "int8"]


def test_one_token_has_no_decoding_figures() -> None:
    found = answer()
    for run in found["runs"]:
        run["timing"] = {"first_token_seconds": 2.0, "step_seconds": [], "wanted_tokens": 1}
    m = measurement("m", Cell(2048, 1), found, bandwidth=1e4)
    assert m.speed is not None and m.speed.inter_token_p50_seconds is None and m.roofline is None
    assert m.speed.prefill_tokens_per_second == 1024


def test_energy_is_left_out_where_a_run_was_not_counted() -> None:
    found = answer()
    found["runs"][1]["joules"] = None
    m = measurement("m", Cell(8, 5, 4), found, bandwidth=0.0)
    assert m.speed is not None and m.speed.joules_per_token is None and m.roofline is None
    assert joules_between(5.0, 3.0) is None and joules_between(3.0, 5.0) == 2.0


def test_rapl_counters_are_read_and_summed(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1500000\n")
    cpu = torch.device("cpu")
    meter = energy_meter(cpu, tmp_path)
    assert meter.source == "RAPL package" and meter.read() == pytest.approx(3.0)
    assert energy_meter(cpu, tmp_path / "none").read() is None
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "root" in energy_meter(cpu, tmp_path).source


def test_a_cut_run_is_compared_with_the_lengths_it_saw() -> None:
    m = measurement("m", Cell(8, 105, 4), cut_answer(105), bandwidth=1e4)
    assert m.roofline is not None and m.roofline.bytes_per_step == 900 + 100 * (8 + 52)
    assert m.roofline.share == pytest.approx((900 + 100 * (8 + 2)) / 1e4 / 0.75)


def test_packed_weights_that_ran_dense_say_so_in_their_rows() -> None:
    m = measurement("m", Cell(8, 5, 4), answer(kernel=f"dense bfloat16 (x {DEQUANTIZED}: no y)"), bandwidth=1e4)
    assert m.dequantized and _head(m)[0] == "m (dequantized)"
    assert _head(measurement("m", Cell(8, 5, 4), answer(), bandwidth=1e4))[0] == "m"


def test_the_bandwidth_is_measured_without_the_models_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "limit_memory", lambda limit: pytest.fail(f"limited to {limit}"))
    monkeypatch.setattr(child, "read_bandwidth", lambda device: 7.0)
    settings = {**asdict(ProfileConfig(memory_limit_bytes=1000)), "threads": None}
    assert child.answer({"task": "bandwidth", "settings": settings})["bytes_per_second"] == 7.0


def test_roofline_by_hand() -> None:
    line = roofline(Cell(1, 10, 2), weights_bytes=300, cache=MeanCache(100, 100), bandwidth=4000.0, step_seconds=0.2)
    assert line is not None and line.tokens_per_second == 20 and line.share == pytest.approx(0.5)
    assert roofline(Cell(1, 1), 300, MeanCache(100, 100), 4000.0, None) is None


# Published figures.


def test_published_figures_are_those_of_the_same_model_and_cells() -> None:
    rows = published_figures("qwen", 4096, 32, "16-bit")
    found = {(row.quantity, row.cell): row.value for row in rows}
    assert found["tokens_per_second", Cell(1, 2048)] == 30.34 and found["peak_memory", Cell(2048, 1)] == 17.66
    assert found["peak_memory", Cell(1, 1024, 64, "bf16")] is None  # out of memory there
    assert found["peak_memory", Cell(1, 1024, 100, "int8")] == 72.4
    assert all(row.hardware.startswith("A100") for row in rows)
    int4 = published_figures("qwen", 5120, 40, "gptq 4 bit")
    assert [row.value for row in int4] == [37.11, 26.11, 13.00, 21.79]
    for wrong in (("qwen2", 4096, 32, "16-bit"), ("qwen", 2048, 24, "16-bit"), ("qwen", 4096, 32, "gptq 3 bit")):
        assert published_figures(*wrong) == ()
    assert [row.cell for row in matching(rows, (Cell(1, 1024, 4, "qwen"),))] == [Cell(1, 1024, 4, "int8")]


# The child, in this process.


def request(folder: Path, cell: Cell, **changes: Any) -> dict[str, Any]:
    settings = {**profile.asdict(SMALL), **changes}
    return {"task": "measure", "folder": str(folder), "cell": profile.asdict(cell), "settings": settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("profile") / "tiny", "qwen2", tied=False)


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "limit_memory", lambda limit: None)


@pytest.mark.parametrize("kind", ["bf16", "int8", "qwen"])
def test_a_measurement_counts_what_it_generated(folder: Path, kind: str, no_limit: None) -> None:
    found = child.answer(request(folder, Cell(3, 6, 2, kind)))
    assert found["status"] == MEASURED and len(found["runs"]) == 2
    for run in found["runs"]:
        assert len(run["timing"]["step_seconds"]) == 5 and run["cache_tokens"] == 8
    tokens = 8 if kind == "bf16" else 256
    assert found["runs"][0]["cache_capacity"] == tokens
    width = {"bf16": 2 * 32, "int8": 32 + 2, "qwen": 32 + 4}[kind]
    assert found["runs"][0]["cache_bytes"] == 2 * 2 * 2 * 2 * tokens * width  # layers, k and v, rows, heads
    weights = sum(p.nbytes for p in load_model(folder, dtype=torch.bfloat16).parameters())
    assert found["weights_bytes"] == pytest.approx(weights, rel=0.01)
    assert found["weights_bytes"] - found["step_weights_bytes"] >= 320 * 128 * 2  # the embedding is only looked up
    assert found["generation_peak_bytes"] >= found["process_bytes"] > 0


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_hybrid_and_vision_models_are_measured(kind: str, no_limit: None, tmp_path: Path) -> None:
    model = make_family_checkpoint(tmp_path / "m", "qwen3_5_moe")
    found = child.answer(request(model, Cell(3, 6, 2, kind)))
    assert found["status"] == MEASURED, found["reason"]
    run = found["runs"][0]
    # 3 blocks, 2 rows: convolutions of 4 tokens over 2 x 64 + 128 channels, and 4 heads of 32 x 32 in FP32
    assert run["cache_fixed_bytes"] == 3 * 2 * (4 * 256 * 2 + 4 * 32 * 32 * 4)
    tokens, width = (8, 64) if kind == "bf16" else (256, 34)
    assert (
        run["cache_bytes"] - run["cache_fixed_bytes"] == 2 * 2 * 2 * tokens * width
    )  # one block, k and v, rows, heads
    assert (found["cache_dtype"], run["cache_capacity"]) == ({"bf16": "bfloat16"}.get(kind, kind), tokens)


def test_experts_that_many_rows_read() -> None:
    config = Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2)
    model = SimpleNamespace(config=config)
    assert quantized_model._routed_share(model, 1) == 2 / 8
    assert quantized_model._routed_share(model, 4) == 1 - (6 / 8) ** 4


def test_a_stop_token_does_not_end_it(folder: Path) -> None:
    model = load_model(folder)
    with torch.no_grad():
        likely = int(model(torch.tensor([[5]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = model.config.eos_token_id = likely
    run = child.run(model, torch.tensor([[5]]), Cell(1, 7), None)
    assert run.timing.tokens == 7 and run.cache_tokens == 7


def test_compiled_steps_generate_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, no_limit: None) -> None:
    """With a compiler that changes nothing: the same tokens from a static cache, and its time reported."""
    model, ids = load_model(folder), torch.tensor([[5], [9]])
    compiled = child.Generation(model, ids, "bf16", 6, model.forward)
    plain, said = child.Generation(model, ids, "bf16", 6), []
    for _ in range(6):
        for generation in (compiled, plain):
            generation.step()
        said.append((compiled.next.tolist(), plain.next.tolist()))
    assert all(ours == theirs for ours, theirs in said) and type(compiled.cache) is StaticCache
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    found = child.answer(request(folder, Cell(3, 6, 2), compile=True))
    assert found["status"] == MEASURED and found["compile_seconds"] > 0 and "torch.compile" in found["kernel"]
    assert found["runs"][0]["cache_capacity"] == found["runs"][0]["cache_tokens"] == 8  # of the 9 that were reserved
    m = measurement("m", Cell(3, 6, 2), found, bandwidth=1e9)
    assert m.compile_seconds == found["compile_seconds"] and not m.memory.extrapolated
    assert m.roofline.bytes_per_step < found["step_weights_bytes"] + found["runs"][0]["cache_bytes"]


def test_packed_folders_say_what_multiplied_them(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    make_artifact(folder, out)
    model, kernel = child.load_for_profile(out, torch.device("cpu"), torch.float32)
    assert kernel.startswith("14 x ") and kernel.startswith(model.kernel_report.summary() + "; activations float32; ")
    dense, kernel = child.load_for_profile(folder, torch.device("cpu"), torch.bfloat16)
    slow = "" if compute_dtype(torch.device("cpu")) == torch.bfloat16 else "; this processor has no BF16 products"
    assert kernel.startswith("dense bfloat16" + slow)
    assert memory.weights_nbytes(model) < 0.7 * memory.weights_nbytes(dense)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no more"), OOM),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), OOM),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), OOM),
        (OSError(12, "Cannot allocate memory"), OOM),
        (RuntimeError("unable to mmap 8399168 bytes from file <model.safetensors>: Cannot allocate memory (12)"), OOM),
        (RuntimeError("shapes cannot be multiplied"), FAILED),
        (RuntimeError("overflow\nframe #0: c10::Error"), FAILED),
        (ValueError("odd"), FAILED),
    ],
)
def test_out_of_memory_is_told_from_other_failures(
    folder: Path, error: Exception, status: str, no_limit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(child, "measure", fail)
    found = child.answer(request(folder, Cell(1, 2)))
    assert found["status"] == status and str(error.args[-1]).split("\n")[0][:20] in found["reason"]
    assert "frame #0" not in found["reason"]


@pytest.mark.parametrize(
    ("code", "said", "status"),
    [
        (-signal.SIGKILL, "", OOM),
        (137, "Killed\n", OOM),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'\n", OOM),
        (1, "libgomp: Thread creation failed: Resource temporarily unavailable\n", OOM),
        (-signal.SIGSEGV, "a line\n", FAILED),
        (1, "ImportError: no torch\n", FAILED),
    ],
)
def test_a_process_without_an_answer(code: int, said: str, status: str) -> None:
    found = parent.death(code, said)
    assert found["status"] == status and found["reason"]


# Fresh processes.


def test_a_fresh_process_measures_and_its_memory_limit_is_a_result(folder: Path) -> None:
    """The same request with and without room: figures, then "oom" from torch's own allocator."""
    found = parent.ask(request(folder, Cell(2, 3, 2)))
    assert found["status"] == MEASURED and len(found["runs"]) == 2
    found = parent.ask(request(folder, Cell(2, 3, 60000), memory_limit_bytes=400 << 20))
    assert found["status"] == OOM and found["reason"]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_measurement_ends_with_the_process_that_asked() -> None:
    """Also when that one is killed with SIGKILL, which it cannot pass on."""
    inner = "import sys, time; from qwen_quant.process import end_with_parent; end_with_parent(); print(1, flush=True)"
    outer = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {inner + '; time.sleep(60)'!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as parent_process:
        assert parent_process.stdout is not None
        pid = int(parent_process.stdout.readline())
        parent_process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and runs(pid):
        time.sleep(0.02)
    assert not runs(pid)


def test_bad_input_in_the_child_is_an_error_here(tmp_path: Path, no_limit: None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(InputError, match="nosuch"):
        parent.checked(child.answer(request(tmp_path, Cell(1, 2))))


# The stage and the command, with a child that only answers.


class FakeChild:
    """Answers as a child would; the cell of `oom` runs out of memory, that of `failed` fails."""

    def __init__(self, oom: Cell | None = None, failed: Cell | None = None) -> None:
        self.oom, self.failed, self.requests = oom, failed, list[dict[str, Any]]()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        if request["task"] == "bandwidth":
            return {"status": MEASURED, "device": "cpu", "name": "", "threads": 2, "bytes_per_second": 1e10}
        cell = Cell(**request["cell"])
        if cell == self.oom:
            return {"status": OOM, "reason": "can't allocate memory"}
        if cell == self.failed:
            return {"status": FAILED, "reason": "ValueError: odd"}
        found = cut_answer(cell.new_tokens)
        found["runs"] = found["runs"][:1] if request["folder"].endswith("b") else found["runs"]
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    place = tmp_path_factory.mktemp("pair")
    return [Subject(name, make_checkpoint(place / name, "qwen2")) for name in ("a", "b")]


SWEEP = ProfileConfig(batch_sizes=(1, 4), new_tokens=(5, 50), kv_caches=("bf16", "int8"))


@pytest.fixture
def swept(pair: list[Subject]) -> Iterator[ProfileResult]:
    yield profile_models(pair, SWEEP, ask_child=FakeChild(oom=Cell(1, 50, 4, "bf16")))


def test_out_of_memory_is_a_cell_and_the_sweep_goes_on(swept: ProfileResult) -> None:
    assert len(swept.measurements) == 2 * 8
    statuses = [m.status for m in swept.measurements]
    assert statuses.count(OOM) == 2 and statuses.count(MEASURED) == 14
    shown = {table.title: table for table in tables(swept)}
    row = next(row for row in shown["Speed"].rows if row[:3] == ("a", "1 + 50 x 4 rows", "bf16"))
    assert row[3] == "oom" and "oom" in str(shown["Peak memory, one process each"].rows)
    assert "~" in next(r for r in shown["Speed"].rows if r[:3] == ("a", "1 + 50", "bf16"))[3]
    assert sum("extrapolated from 5 tokens" in text for text in swept.warnings) == 6


def test_ratios_are_over_the_first_model(swept: ProfileResult) -> None:
    assert len(swept.ratios) == 8 and {r.baseline for r in swept.ratios} == {"a"}
    by_cell = {r.cell: r for r in swept.ratios}
    assert by_cell[Cell(1, 50, 4, "bf16")].tokens_per_second is None
    ratio = by_cell[Cell(1, 5)].tokens_per_second  # b: 5 tokens in 4 s; a: median of 4 s and 6 s
    assert ratio == pytest.approx((5 / 4) / ((5 / 4 + 5 / 6) / 2))
    assert by_cell[Cell(1, 5)].generation_peak_bytes == 1


def test_the_file_is_complete_and_reads_back(swept: ProfileResult, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(swept, path)
    document = read_profile(path)
    assert document["schema"] == "qwen-quant/profile/2"
    assert [m["sha256"] for m in document["models"]] == [weights_sha256(Path(m["folder"])) for m in document["models"]]
    assert {"models", "measurements", "ratios", "published", "config", "warnings"} <= set(document)
    first = document["measurements"][0]
    assert first["cell"] == {"context_tokens": 1, "new_tokens": 5, "batch_size": 1, "kv_cache": "bf16"}
    assert first["speed"]["tokens_per_second"]["runs"] == 2 and first["memory"]["kv_cache_bytes"] == 1200
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]
    path.write_text('{"schema": "other"}')
    with pytest.raises(InputError, match="is not a profile"):
        read_profile(path)


def test_plots_stand_alone_and_the_page_escapes(swept: ProfileResult, tmp_path: Path) -> None:
    names = {path.name for path in write_outputs(swept, tmp_path / "out")}
    assert {"profile.json", "profile.html", "time-per-token.svg", "memory-by-batch-size.svg"} <= names
    for path in (tmp_path / "out").glob("*.svg"):
        drawing = xml.dom.minidom.parse(str(path)).documentElement
        assert drawing.tagName == "svg" and drawing.getElementsByTagName("polyline")
    odd = replace(swept, models=(replace(swept.models[0], name="<b>"), swept.models[1]))
    assert "<b>" not in render_page(odd, [])


def test_png_files_show_the_same_plots(swept: ProfileResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    odd = replace(swept, measurements=tuple(replace(m, model="_$x$ <b>\x1b") for m in swept.measurements))
    names = {path.name for path in write_outputs(odd, tmp_path / "out", png=True)}
    drawn = sorted((tmp_path / "out").glob("*.png"))
    assert {path.stem for path in drawn} == {path.stem for path in (tmp_path / "out").glob("*.svg")} and drawn
    assert {path.name for path in drawn} < names
    for path in drawn:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (1152, 672) and len(data) > 9000


def test_png_without_matplotlib_names_the_extra(
    fake_child: FakeChild, pair: list[Subject], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(png, "find_spec", lambda name: None)
    assert cli.run(["profile", str(pair[0].folder), "--new-tokens", "5", "--png"]) == 3
    assert "qwen-quant[plots]" in capsys.readouterr().err and not fake_child.requests and not Path("profile").exists()


def test_published_figures_stand_beside_ours(swept: ProfileResult) -> None:
    rows = published_figures("qwen", 4096, 32, "16-bit")
    measured = tuple(replace(m, cell=Cell(1, 1024, 4, "qwen")) for m in swept.measurements[:1])
    known = matching(rows, (Cell(1, 1024, 4, "qwen"),))
    result = replace(swept, measurements=measured, published=tuple(replace(row, beside="a") for row in known))
    table = next(table for table in tables(result) if table.title.startswith("Published"))
    assert len(table.rows) == 1 and "17.2 GB" in table.rows[0] and "A100-80G, 2023" in table.rows[0]


def test_published_figures_stand_beside_their_own_model_only(
    pair: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes of one family in one call, and an NF4 folder beside a published Int4 figure."""
    figure = published_figures("qwen", 4096, 32, "16-bit")[0]
    seen: list[str] = []

    def known(model_type: str, *_: object) -> tuple[Published, ...]:
        seen.append(model_type)
        return (replace(figure, model=f"model {len(seen)}"),) if len(seen) == 2 else ()

    monkeypatch.setattr(profile, "published_figures", known)
    result = profile_models(pair, ProfileConfig(), ask_child=FakeChild())
    table = next(table for table in tables(result) if table.title.startswith("Published"))
    assert [row[0] for row in table.rows] == ["b"] and [row.beside for row in result.published] == ["b"]


def test_models_beyond_their_positions_are_said(pair: list[Subject]) -> None:
    result = profile_models(pair, ProfileConfig(), ask_child=FakeChild())
    assert sum("more than its 2048 positions" in text for text in result.warnings) == 2


def test_bad_models_are_refused_before_anything_is_measured(pair: list[Subject], tmp_path: Path) -> None:
    fake = FakeChild()
    with pytest.raises(InputError, match="not a checkpoint"):
        profile_models([*pair, Subject("c", tmp_path)], SWEEP, ask_child=fake)
    with pytest.raises(InputError, match="same name"):
        profile_models([pair[0], pair[0]], SWEEP, ask_child=fake)
    assert fake.requests == []


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeChild:
    fake = FakeChild(failed=Cell(1, 9))
    real = profile.profile_models
    monkeypatch.setattr(profile, "profile_models", lambda *args, **named: real(*args, **named, ask_child=fake))
    monkeypatch.chdir(tmp_path)
    return fake


def test_the_command(fake_child: FakeChild, pair: list[Subject], capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(subject.folder) for subject in pair]
    assert cli.run(["profile", *models, "--new-tokens", "5, 50", "--kv-cache", "bf16, int8", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "Compared with a" in text and "roofline" in text and "warning: " in text
    assert read_profile(Path("profile/profile.json"))["device"] == "cpu"
    assert cli.run(["profile", *models, "--new-tokens", "5"]) == 3
    assert "profile.json exists" in capsys.readouterr().err
    assert cli.run(["profile", *models, "--new-tokens", "5", "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "profile" and len(document["measurements"]) == 2


def test_an_interrupted_profile_keeps_what_it_measured(
    fake_child: FakeChild, pair: list[Subject], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(subject.folder) for subject in pair]
    fake_child.oom = Cell(1, 50)
    answered, ask = [], FakeChild.__call__

    def stopped(self: FakeChild, request: dict[str, Any]) -> dict[str, Any]:
        answered.append(request)
        if len(answered) == 5:  # bandwidth, three cells of a, one of b
            raise KeyboardInterrupt
        return ask(self, request)

    with monkeypatch.context() as context:
        context.setattr(FakeChild, "__call__", stopped)
        assert cli.run(["profile", *models, "--new-tokens", "5,50,6"]) == 130
    assert [path.name for path in Path("profile").iterdir()] == [".profile.partial"]
    fake_child.requests.clear()
    assert cli.run(["profile", *models, "--new-tokens", "5,50,6"]) == 0
    asked = [(request["folder"], request["cell"]["new_tokens"]) for request in fake_child.requests[1:]]
    assert asked == [(models[0], 50), *((models[1], tokens) for tokens in (5, 50, 6))], "oom is tried again"
    assert "2 of 6 measurements are of an earlier run" in capsys.readouterr().out
    assert not Path("profile/.profile.partial").exists()


def test_a_failed_cell_is_shown_with_the_others_and_exits_1(
    fake_child: FakeChild, pair: list[Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["profile", str(pair[0].folder), "--new-tokens", "5,9", "--quiet"]) == 1
    done = capsys.readouterr()
    assert "failed" in done.out and "ValueError: odd" in done.err and done.err.count("error: ") == 1
    assert len(read_profile(Path("profile/profile.json"))["measurements"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--batch-sizes", "x"), 2, "--batch-sizes"),
        (("--kv-cache", "fp8"), 3, "fp8"),
        (("--runs", "0"), 3, "runs is 0"),
        (("--compile", "--kv-cache", "int8"), 3, "cache of fixed size"),
        (("--memory-limit", "2 apples"), 2, "2 apples"),
    ],
)
def test_bad_options(
    fake_child: FakeChild,
    pair: list[Subject],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    word: str,
) -> None:
    assert cli.run(["profile", str(pair[0].folder), *arguments]) == code
    assert word in capsys.readouterr().err and not fake_child.requests and not Path("profile").exists()
