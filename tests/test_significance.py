"""evaluation/significance.py: intervals cover the truth as often as they say; agreement with scipy and statsmodels."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import signal, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from qwen_quant.errors import InputError
from qwen_quant.evaluation import significance
from qwen_quant.evaluation.significance import (
    accuracy_verdict,
    block_bootstrap,
    holm,
    mcnemar_exact,
    paired_bootstrap_difference,
    perplexity_ratio_interval,
    perplexity_verdict,
    sign_flip_test,
)
from qwen_quant.results import Interval


def binomial_bounds(trials: int, probability: float, *, error: float = 1e-4) -> tuple[float, float]:
    """Counts that a fair run of `trials` leaves only once in 1 / error."""
    low, high = stats.binom.ppf([error / 2, 1 - error / 2], trials, probability)
    return low / trials, high / trials


def ar1(rng: np.random.Generator, windows: int, tokens: int, rho: float) -> np.ndarray:
    """Stationary standard normal tokens with correlation rho between neighbours, windows independent."""
    noise = rng.standard_normal((windows, tokens + 200))
    return signal.lfilter([math.sqrt(1 - rho**2)], [1, -rho], noise, axis=1)[:, 200:]


def coverage(draw, truth: float, runs: int) -> float:
    """Share of runs whose interval holds the truth."""
    hits = 0
    for run in range(runs):
        interval = draw(run)
        assert interval.low <= interval.estimate <= interval.high
        hits += interval.low <= truth <= interval.high
    return hits / runs


@pytest.mark.parametrize(
    ("windows", "tokens", "runs"), [(4, 511, 1000), (8, 255, 1000), (16, 255, 600), (64, 127, 400)]
)
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_block_bootstrap_covers_correlated_tokens(windows: int, tokens: int, runs: int, rho: float) -> None:
    rng = np.random.default_rng(windows)
    share = coverage(lambda run: block_bootstrap(ar1(rng, windows, tokens, rho), seed=run, resamples=800), 0.0, runs)
    low, high = binomial_bounds(runs, 0.95)
    # Windows cut in two depend on each other at the cut: a point is allowed below what independent blocks would give.
    assert low - (0.01 if windows < 8 else 0) <= share <= high


def test_eight_windows_that_differ_as_wholes_are_covered() -> None:
    """Half of the variance lies between windows; stretches of them would cover 91 of 100 runs."""
    rng = np.random.default_rng(8)
    between = math.sqrt((1 + 0.8) / (1 - 0.8) / 255)
    draw = lambda run: block_bootstrap(  # noqa: E731
        ar1(rng, 8, 255, 0.8) + between * rng.standard_normal((8, 1)), seed=run, resamples=800
    )
    low, high = binomial_bounds(1000, 0.95)
    assert low <= coverage(draw, 0.0, 1000) <= high


@pytest.mark.parametrize(("windows", "runs"), [(8, 1000), (16, 600), (64, 300)])
def test_block_bootstrap_covers_skewed_values(windows: int, runs: int) -> None:
    """exp of AR(1), as skewed as KL divergences are (the 99th percentile is 10 times the mean)."""
    rng = np.random.default_rng(windows)
    draw = lambda run: block_bootstrap(np.exp(1.5 * ar1(rng, windows, 255, 0.5)), seed=run, resamples=800)  # noqa: E731
    share = coverage(draw, math.exp(1.5**2 / 2), runs)
    low, high = binomial_bounds(runs, 0.95)
    assert low - 0.01 <= share <= high


def test_resampling_tokens_instead_of_blocks_would_not_cover() -> None:
    """The reason for blocks: the same interval with every token a block of its own misses far too often."""
    rng = np.random.default_rng(5)
    share = coverage(
        lambda run: block_bootstrap(ar1(rng, 8, 64, 0.8).reshape(-1, 1), seed=run, resamples=300), 0.0, 150
    )
    assert share < 0.7


def test_perplexity_ratio_is_paired_and_transformed() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.gamma(2, 1.5, (32, 200))
    quantized = baseline + 0.02 + 0.05 * rng.standard_normal(baseline.shape)
    interval = perplexity_ratio_interval(baseline, quantized, seed=1)
    assert interval.estimate == pytest.approx(math.exp(quantized.mean() - baseline.mean()), rel=1e-12)
    assert 1.017 < interval.low < interval.estimate < interval.high < 1.023
    error = (quantized - baseline).mean(axis=1).std(ddof=1) / math.sqrt(32)
    assert math.log(interval.high / interval.low) == pytest.approx(2 * stats.t.ppf(0.975, 31) * error, rel=0.1)


def test_blocks_are_windows_stretches_or_joined_windows() -> None:
    values = np.arange(4 * 1023, dtype=np.float64).reshape(4, 1023)
    sums, sizes = significance._block_sums(values)
    assert sums.size == 8 and sizes.min() == 511 and sums.sum() == values.sum() and sizes.sum() == values.size
    assert sums[0] == values[0, : int(sizes[0])].sum()
    assert significance._block_sums(np.ones((3, 300)))[0].size == 9
    assert significance._block_sums(np.ones((8, 300)))[0].size == 8
    assert significance._block_sums(np.ones((20, 300)))[0].size == 20
    sums, sizes = significance._block_sums(np.ones((5001, 10)))
    assert sums.size <= 1024 and np.array_equal(sums, sizes) and sizes.sum() == 50010
    assert significance._block_sums(np.ones((1, 40)))[0].size == 8


def test_one_million_tokens_take_under_two_seconds() -> None:
    values = np.random.default_rng(0).standard_normal((1000, 1000))
    started = time.process_time()
    block_bootstrap(values, seed=0)
    assert time.process_time() - started < 2


def test_the_seed_decides_everything() -> None:
    values = np.random.default_rng(0).standard_normal((20, 70))
    scores = np.random.default_rng(1).random((2, 40))
    first, again, other = (block_bootstrap(values, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    a, b, c = (paired_bootstrap_difference(scores[0], scores[1], seed=seed) for seed in (7, 7, 8))
    assert a == b != c
    assert sign_flip_test(scores[0] - scores[1], seed=7) == sign_flip_test(scores[0] - scores[1], seed=7)


def test_constant_values_and_a_confidence_of_ones_own() -> None:
    assert block_bootstrap(np.full((8, 64), 0.25), seed=0) == Interval(0.25, 0.25, 0.25)
    values = np.random.default_rng(0).standard_normal((20, 70))
    wide, narrow = (block_bootstrap(values, seed=0, confidence=c) for c in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high and wide.confidence == 0.99


def test_values_that_no_interval_can_be_made_of() -> None:
    with pytest.raises(InputError, match="7 tokens are too few"):
        block_bootstrap(np.zeros((1, 7)), seed=0)
    with pytest.raises(InputError, match="not finite"):
        block_bootstrap(np.full((4, 64), np.nan), seed=0)
    with pytest.raises(InputError, match="no items"):
        paired_bootstrap_difference(np.zeros(0), np.zeros(0), seed=0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (5, 0), (3, 9), (10, 10), (120, 80), (1, 600)])
def test_mcnemar_equals_scipy_and_statsmodels(first: int, second: int) -> None:
    value = mcnemar_exact(first, second)
    if first + second:
        assert value == pytest.approx(stats.binomtest(first, first + second).pvalue, rel=1e-9)
        table = [[50, first], [second, 50]]
        assert value == pytest.approx(min(1.0, mcnemar(table, exact=True).pvalue), rel=1e-9)
    assert value == mcnemar_exact(second, first)


def test_mcnemar_by_hand_and_at_thousands() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_exact(5200, 4800) == pytest.approx(stats.binomtest(5200, 10000).pvalue, rel=1e-9)
    assert mcnemar_exact(0, 5000) == 0.0 or mcnemar_exact(0, 5000) < 1e-300


def pairs(rng: np.random.Generator, items: int, only_first: float, only_second: float) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores of `items` questions with the given rates of both disagreements; half of the rest is right."""
    draw = rng.random(items)
    both = (rng.random(items) < 0.5).astype(np.float64)
    first = np.where(draw < only_first, 1.0, np.where(draw < only_first + only_second, 0.0, both))
    second = np.where(draw < only_first, 0.0, np.where(draw < only_first + only_second, 1.0, both))
    return first, second


@pytest.mark.parametrize(
    ("items", "only_first", "only_second"),
    [(50, 0.1, 0.1), (200, 0.002, 0.002), (200, 0.01, 0.0), (500, 0.08, 0.03), (1000, 0.001, 0.004), (100, 0.3, 0.1)],
)
def test_accuracy_difference_covers(items: int, only_first: float, only_second: float) -> None:
    rng = np.random.default_rng(items)
    runs = 1000
    draw = lambda run: paired_bootstrap_difference(  # noqa: E731
        *pairs(rng, items, only_first, only_second), seed=run, resamples=2000
    )
    share = coverage(draw, only_second - only_first, runs)
    low, _ = binomial_bounds(runs, 0.95)
    assert share >= low  # rare disagreements are covered more often than asked, never less


def test_no_discordant_item_leaves_the_exact_bound() -> None:
    scores = np.ones(100)
    interval = paired_bootstrap_difference(scores, scores, seed=0)
    bound = stats.binomtest(0, 100).proportion_ci(0.95, "exact").high
    assert (interval.low, interval.high) == (pytest.approx(-bound), pytest.approx(bound)) and interval.estimate == 0
    one = paired_bootstrap_difference(scores, np.r_[0.0, scores[1:]], seed=0)
    assert one.low < one.estimate < 0 < one.high and one.estimate == pytest.approx(-0.01)


def test_graded_scores_are_covered() -> None:
    rng = np.random.default_rng(3)

    def draw(run: int) -> Interval:
        first = rng.beta(2, 5, 80)
        second = np.clip(first + rng.choice([0.0, 0.15, -0.1], 80, p=[0.6, 0.2, 0.2]), 0, 1)
        return paired_bootstrap_difference(first, second, seed=run)

    sample = rng.beta(2, 5, 400000)
    truth = 0.2 * (np.clip(sample + 0.15, 0, 1) - sample).mean() + 0.2 * (np.clip(sample - 0.1, 0, 1) - sample).mean()
    low, high = binomial_bounds(500, 0.95)
    assert low <= coverage(draw, truth, 500) <= high


def test_sign_flips_by_hand_and_against_scipy() -> None:
    assert sign_flip_test(np.array([1.0, 1.0, 1.0]), seed=0) == 2 / 8
    assert sign_flip_test(np.array([0.3, 0.0, -0.1]), seed=0) == 1.0
    assert sign_flip_test(np.zeros(50), seed=0) == 1.0
    assert sign_flip_test(np.array([1.0] * 5 + [-1.0]), seed=0) == pytest.approx(mcnemar_exact(1, 5))
    values = np.random.default_rng(2).normal(0.25, 1, 60)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    ).pvalue
    assert sign_flip_test(values, seed=0) == pytest.approx(expected, abs=0.01)
    assert sign_flip_test(np.full(200, 0.1), seed=0) == 1 / 10000


def test_sign_flips_hold_their_level() -> None:
    rng = np.random.default_rng(4)
    rejected = np.mean([sign_flip_test(rng.laplace(0, 1, 25), seed=run) < 0.05 for run in range(400)])
    low, high = binomial_bounds(400, 0.05)
    assert low <= rejected <= high


def test_holm_equals_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 60):
        values = list(rng.random(size) ** 3)
        assert holm(values) == pytest.approx(list(multipletests(values, method="holm")[1]), rel=1e-12)
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_accuracy_verdicts() -> None:
    lost = accuracy_verdict(Interval(-0.03, -0.05, -0.01), 0.004, 1000, 90)
    assert lost.word == "loss" and lost.text.startswith(
        "loss of 3.0 points (95% interval -5.0 to -1.0 points, p = 0.004"
    )
    assert accuracy_verdict(Interval(0.03, 0.01, 0.05), 0.004, 1000, 90).word == "gain"
    quiet = accuracy_verdict(Interval(-0.002, -0.0148, 0.0108), 0.8, 2000, 60)
    assert quiet.word == "no loss detected"
    assert quiet.text.startswith("no loss detected (smallest loss this could have seen: 1.8 points")
    assert quiet.smallest_detectable == pytest.approx((1.959964 + 0.841621) * 0.0256 / (2 * 1.959964), rel=1e-6)
    assert "2000 items, 60 of them discordant" in quiet.text
    small = accuracy_verdict(Interval(0.0, -0.1, 0.1), 1.0, 40)
    assert small.word == "too little data" and "14.3 points" in small.text


def test_a_loss_needs_both_the_interval_and_the_corrected_test() -> None:
    assert accuracy_verdict(Interval(-0.03, -0.05, -0.01), 0.05, 1000, 90).word == "no loss detected"
    assert accuracy_verdict(Interval(-0.03, -0.05, 0.0), 0.001, 1000, 90).word == "no loss detected"
    nothing = accuracy_verdict(Interval(0.0, -1.0, 1.0), 0.001, 0)
    assert nothing.word == "too little data" and nothing.smallest_detectable is None


def test_perplexity_verdicts() -> None:
    lost = perplexity_verdict(Interval(1.05, 1.04, 1.06))
    assert lost.word == "loss" and "5.0% higher" in lost.text and "1.0400 to 1.0600" in lost.text
    assert perplexity_verdict(Interval(0.99, 0.98, 0.999)).word == "gain"
    quiet = perplexity_verdict(Interval(1.0, 0.998, 1.002))
    assert quiet.word == "no loss detected"
    assert quiet.text == "no loss detected (smallest loss this could have seen: 0.29% of perplexity)"
    assert quiet.smallest_detectable == pytest.approx(math.exp(2.801585 * 0.004 / 3.919928) - 1, rel=1e-3)
    assert perplexity_verdict(Interval(1.0, 0.9, 1.1)).word == "too little data"
    broken = perplexity_verdict(Interval(math.nan, math.nan, math.nan))
    assert broken.word == "too little data" and broken.smallest_detectable is None


def test_the_smallest_detectable_loss_is_seen_four_times_in_five() -> None:
    """Power by simulation: a true loss of that size is called one in 80% of runs."""
    rng = np.random.default_rng(11)
    typical = accuracy_verdict(paired_bootstrap_difference(*pairs(rng, 2000, 0.05, 0.05), seed=0), 1.0, 2000)
    loss = typical.smallest_detectable
    assert loss is not None
    seen = 0
    for run in range(400):
        first, second = pairs(rng, 2000, 0.05 + loss / 2, 0.05 - loss / 2)
        interval = paired_bootstrap_difference(first, second, seed=run, resamples=2000)
        p_value = mcnemar_exact(int((first > second).sum()), int((second > first).sum()))
        seen += accuracy_verdict(interval, p_value, 2000).word == "loss"
    assert 0.7 <= seen / 400 <= 0.88
