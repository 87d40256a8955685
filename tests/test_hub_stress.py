"""A random fault or kill, then the same command again: nothing lost, nothing wrong accepted, no second commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hub_stress import make_plan, run_one
from tests.support.pushable import make_pushable

# Chosen so that both commands, both modes, faults and kills occur; the slow test runs many more.
SEEDS = (1, 2, 5, 9, 10, 202)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_pushable(tmp_path_factory.mktemp("stress") / "tiny-Int4", shards=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_and_nothing_wrong_is_accepted(seed: int, tmp_path: Path, artifact: Path) -> None:
    outcome = run_one(make_plan(seed), tmp_path / "run", artifact)
    assert not outcome.problems, outcome


@pytest.mark.slow
def test_two_hundred_times(tmp_path: Path, artifact: Path) -> None:
    outcomes = [run_one(make_plan(seed), tmp_path / str(seed), artifact) for seed in range(1000, 1200)]
    assert [outcome for outcome in outcomes if outcome.problems] == []


def test_the_seeds_cover_what_there_is() -> None:
    plans = [make_plan(seed) for seed in SEEDS]
    assert {(plan.command, plan.mode) for plan in plans} == {
        (command, mode) for command in ("download", "push") for mode in ("lfs", "xet")
    }
    assert {"fault", "kill"} <= {plan.event for plan in plans}
