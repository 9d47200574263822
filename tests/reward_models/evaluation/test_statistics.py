# SPDX-License-Identifier: Apache-2.0


import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reward_models.evaluation.statistics import (
    bootstrap_mean,
    estimate_rate,
    holm_p_values,
    paired_difference,
    sign_flip_p_value,
    standard_error,
    totals_by_prompt,
    wilson_interval,
)


def test_totals_equal_hand_computation() -> None:
    sums, counts = totals_by_prompt([7, 2, 7, 2, 5], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert sums.tolist() == [6.0, 5.0, 4.0]
    assert counts.tolist() == [2, 1, 2]


def test_standard_error_counts_prompts_and_not_samples() -> None:
    values = [0.0, 1.0, 5.0, 2.0]
    expected = np.std(values, ddof=1) / 2
    assert standard_error([0, 1, 2, 3], values) == pytest.approx(expected)
    # Samples that repeat what another one of their prompt says add nothing.
    assert standard_error([0, 1, 2, 3] * 2, values * 2) == pytest.approx(expected)
    assert standard_error([4, 4], [0.0, 1.0]) is None


def test_interval_is_that_of_all_possible_draws() -> None:
    # Three prompts can be drawn in 27 ways, which are few enough to write down.
    values = [0.0, 1.0, 5.0]
    means = [sum(draw) / 3 for draw in itertools.product(values, repeat=3)]
    low, high = np.quantile(means, [0.1, 0.9])
    estimate = bootstrap_mean([0, 1, 2], values, confidence=0.8)
    assert estimate.value == pytest.approx(2.0)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(size=2_000)
    estimate = bootstrap_mean(range(2_000), values)
    width = 2 * 1.96 * values.std() / math.sqrt(2_000)
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.03)
    assert (estimate.low + estimate.high) / 2 == pytest.approx(values.mean(), abs=0.03 * width)


def test_copies_of_a_prompt_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=200)
    once = bootstrap_mean(range(200), values)
    often = bootstrap_mean(np.repeat(np.arange(200), 8), np.repeat(values, 8))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (often.num_prompts, often.num_samples) == (200, 1_600)


def test_prompts_with_more_samples_weigh_more() -> None:
    # A prompt whose samples could not all be scored counts with those that could.
    assert bootstrap_mean([0, 0, 0, 1], [1.0, 1.0, 1.0, 0.0]).value == 0.75


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        estimate = bootstrap_mean(range(60), rng.random(60), confidence=0.9, num_resamples=400)
        covered += estimate.low <= 0.5 <= estimate.high
    # Four standard errors of a binomial of 400.
    assert covered / 400 == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 400))


def test_equal_values_give_equal_intervals() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_mean(range(50), values) == bootstrap_mean(range(50), values)
    assert bootstrap_mean(range(50), values, seed=1) != bootstrap_mean(range(50), values)


def test_more_prompts_than_a_batch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(30)
    whole = bootstrap_mean(range(30), values, num_resamples=1_000)
    flipped = sign_flip_p_value(values - 0.45)
    monkeypatch.setattr("reward_models.evaluation.statistics._BATCH_ELEMENTS", 64)
    parts = bootstrap_mean(range(30), values, num_resamples=1_000)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.02)
    assert sign_flip_p_value(values - 0.45) == pytest.approx(flipped, abs=0.03)


def test_no_samples_have_no_mean() -> None:
    estimate = bootstrap_mean([], [])
    assert (estimate.value, estimate.low, estimate.high, estimate.num_samples) == (None, None, None, 0)
    assert paired_difference([], []).p_value is None


@pytest.mark.parametrize("arguments", [{"confidence": 1.0}, {"confidence": 0.0}, {"num_resamples": 0}])
def test_arguments_out_of_range_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        bootstrap_mean([0], [1.0], **arguments)


@pytest.mark.parametrize("totals", [[1.0], [0.3, 0.2, -0.1], [1.0, -1.0, 2.0, 0.0, 0.5, 0.25], [0.1] * 9])
def test_p_value_is_the_share_of_all_signs(totals: list[float]) -> None:
    sums = [
        abs(sum(s * t for s, t in zip(signs, totals, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(totals))
    ]
    expected = sum(value >= abs(sum(totals)) - 1e-9 for value in sums) / len(sums)
    assert sign_flip_p_value(np.array(totals)) == pytest.approx(expected)


def test_p_value_of_passes_is_that_of_the_sign_test() -> None:
    # 15 prompts fixed and 5 broken: McNemar's exact test, twice the upper tail of a fair binomial.
    expected = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    totals = np.array([1.0] * 15 + [-1.0] * 5 + [0.0] * 100)
    assert sign_flip_p_value(totals, num_flips=40_000) == pytest.approx(expected, abs=0.005)


def test_p_value_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(5)
    p_values = [sign_flip_p_value(rng.normal(size=25), num_flips=500) for _ in range(400)]
    for level in (0.1, 0.5):
        share = np.mean(np.array(p_values) <= level)
        assert share == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 400))


def test_p_value_is_never_zero_and_one_without_differences() -> None:
    assert sign_flip_p_value(np.ones(100), num_flips=99) == pytest.approx(0.01)
    assert sign_flip_p_value(np.zeros(5)) == 1.0
    # Differences of equal scores that were summed in another order.
    assert sign_flip_p_value(np.full(20, 1e-17)) == 1.0


def test_paired_difference_is_narrower_than_its_parts() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.random(300)
    old, new = (difficulty + 0.05 * rng.normal(size=300) for _ in range(2))
    paired = paired_difference(range(300), new - old + 0.02)
    alone = bootstrap_mean(range(300), new)
    assert paired.difference.high - paired.difference.low < 0.4 * (alone.high - alone.low)
    assert paired.difference.low < paired.difference.value < paired.difference.high
    assert paired.p_value < 0.01


@pytest.mark.parametrize("values", [[1.0] * 30, [0.0] * 30, [0.25] * 30, [0.7]])
def test_mean_without_a_spread_has_no_interval(values: list[float]) -> None:
    estimate = bootstrap_mean(range(len(values)), values)
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(values[0]), None, None)
    assert paired_difference(range(len(values)), values).difference == estimate


@pytest.mark.parametrize("count", [1, 5, 19, 200])
def test_rate_without_a_spread_has_the_interval_of_its_prompts(count: int) -> None:
    for passed in (True, False):
        estimate = estimate_rate(np.repeat(np.arange(count), 4), [passed] * (4 * count))
        expected = binomtest(count * passed, count).proportion_ci(method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
        assert estimate.high - estimate.low > 0
        assert (estimate.value, estimate.num_prompts, estimate.num_samples) == (float(passed), count, 4 * count)
    # Half of the samples of every prompt.
    half = estimate_rate(np.repeat(np.arange(count), 2), [True, False] * count)
    assert half.low < 0.5 < half.high


def test_rate_with_a_spread_has_the_interval_of_the_bootstrap() -> None:
    passed = [i % 3 == 0 for i in range(40)]
    assert estimate_rate(range(40), passed) == bootstrap_mean(range(40), passed)
    assert estimate_rate([], []) == bootstrap_mean([], [])


@given(rate=st.integers(0, 40), count=st.integers(1, 40))
def test_wilson_interval_is_that_of_scipy(rate: int, count: int) -> None:
    rate = min(rate, count)
    expected = binomtest(rate, count).proportion_ci(method="wilson")
    assert wilson_interval(rate / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_corrected_p_values_equal_hand_computation() -> None:
    # Holm's: 4 x .005, 3 x .011, then 2 x .02, and .04 is not made smaller than the one before.
    assert holm_p_values([0.02, 0.005, None, 0.04, 0.011]) == pytest.approx([0.04, 0.02, None, 0.04, 0.033])
    assert holm_p_values([0.6, 0.7]) == [1.0, 1.0]
    assert holm_p_values([]) == [] and holm_p_values([None]) == [None]


@given(st.lists(st.none() | st.floats(1e-6, 1.0), max_size=12))
def test_correction_keeps_the_order_and_never_lowers(p_values: list[float | None]) -> None:
    corrected = holm_p_values(p_values)
    pairs = [(p, q) for p, q in zip(p_values, corrected, strict=True) if p is not None]
    assert [q is None for q in corrected] == [p is None for p in p_values]
    assert all(p <= q <= 1.0 for p, q in pairs)
    assert [q for _, q in sorted(pairs)] == sorted(q for _, q in pairs)
    if pairs:
        assert min(pairs)[1] == pytest.approx(min(1.0, len(pairs) * min(pairs)[0]))
