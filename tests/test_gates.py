"""Gates compare the unfavourable end of the interval, and an override carries a reason."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qwen_quant.errors import GateError, InputError
from qwen_quant.evaluation.gates import check_gates, with_gates
from qwen_quant.recipe import GateConfig
from qwen_quant.results import Interval, SmokeCase
from tests.support.reports import TASK, make_result


def test_the_unfavourable_end_counts() -> None:
    result = make_result(
        kl=Interval(0.05, 0.04, 0.06), ratio=Interval(1.02, 1.01, 1.03), top1=Interval(0.9, 0.88, 0.92)
    )
    passing = GateConfig(max_kl=0.06, max_perplexity_ratio=1.03, min_top1=0.88)
    assert all(gate.passed for gate in with_gates(result, passing).gates)
    check_gates(with_gates(result, passing))
    failing = with_gates(result, GateConfig(max_kl=0.055, max_perplexity_ratio=1.025, min_top1=0.89))
    assert [(gate.value, gate.passed) for gate in failing.gates] == [(0.06, False), (1.03, False), (0.88, False)]
    with pytest.raises(GateError) as caught:
        check_gates(failing)
    assert caught.value.exit_code == 4
    for word in ("max_kl on text: 0.06, limit 0.055", "max_perplexity_ratio", "min_top1 on text: 0.88, limit 0.89"):
        assert word in str(caught.value)


def test_no_gate_no_failure_and_nan_fails() -> None:
    nan = make_result(kl=Interval(math.nan, math.nan, math.nan))
    assert with_gates(nan, GateConfig()).gates == ()
    with pytest.raises(GateError, match="nan"):
        check_gates(with_gates(nan, GateConfig(max_kl=1.0)))


def test_an_override_lets_it_pass_and_is_kept() -> None:
    result = with_gates(make_result(kl=Interval(0.5, 0.4, 0.6)), GateConfig(max_kl=0.1), "an experiment")
    check_gates(result)
    assert (result.override_reason, result.gates[0].passed) == ("an experiment", False)


def test_a_task_may_not_lose_more_than_its_interval_excludes() -> None:
    task = dataclasses.replace(TASK, difference=Interval(-0.01, -0.03, 0.01))
    result = dataclasses.replace(make_result(), tasks=(task,))
    assert with_gates(result, GateConfig(max_task_drop=0.03)).gates[0].passed
    assert not with_gates(result, GateConfig(max_task_drop=0.029)).gates[0].passed
    with pytest.raises(InputError, match="no task was run"):
        with_gates(make_result(), GateConfig(max_task_drop=0.03))


def test_a_failed_smoke_prompt_is_a_gate_of_its_own() -> None:
    case = SmokeCase("question", "en", "Hi", "!!!!", 4, False, "Hello", ("repeats one token",))
    result = dataclasses.replace(make_result(), texts=(), smoke=(case,))
    with pytest.raises(GateError, match="smoke prompts that fail: 1, limit 0"):
        check_gates(with_gates(result, GateConfig(max_kl=1.0)))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "calibration tokens"),
        ({"quantized_kind": "bitsandbytes nf4"}, "--quant-type"),
        ({"baseline_sha256": "a", "quantized_sha256": "a"}, "--kv-cache"),
    ],
)
def test_the_advice_fits_what_was_measured(changes: dict[str, str], word: str) -> None:
    result = dataclasses.replace(make_result(kl=Interval(0.5, 0.4, 0.6)), **changes)
    with pytest.raises(GateError) as caught:
        check_gates(with_gates(result, GateConfig(max_kl=0.1)))
    assert word in caught.value.next_step
