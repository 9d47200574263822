# SPDX-License-Identifier: Apache-2.0

"""
Uncertainty of a mean: intervals and paired tests over prompts.

Samples of one prompt are not independent: they share its difficulty. So the bootstrap draws whole prompts, and the
randomisation test changes the sign of whole prompts. If it drew samples, the interval of two noise seeds of 504 prompts would be
as narrow as the interval of 1,008 prompts.

Resampling says nothing if all resamples are equal, e.g. if every image passes. Then a rate has Wilson's interval, and another mean
has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


NUM_RESAMPLES = 10_000
MIN_PROMPTS = 20
"""With fewer prompts, an interval by resampling is too narrow."""
# Largest number of values in a batch of resamples, so that a large benchmark fits into memory.
_BATCH_ELEMENTS = 2**22
_ROUNDING = 1e-12
# Larger than errors of rounding.
_ZERO_WIDTH = 1e-12


@dataclass(frozen=True)
class Estimate:
    """
    A mean with its interval.

    Args:
        value (`float`, *optional*): Mean of all samples; `None` if there are none.
        low, high (`float`, *optional*): Bounds of the interval; `None` if there is none.
        num_prompts (`int`): Number of prompts with at least one sample.
        num_samples (`int`): Number of samples.
    """

    value: float | None
    low: float | None
    high: float | None
    num_prompts: int
    num_samples: int


@dataclass(frozen=True)
class PairedDifference:
    """
    The difference of two means that were measured on the same prompts and the same noise.

    Args:
        difference ([`Estimate`]): The mean difference.
        p_value (`float`, *optional*):
            Probability of a difference at least this large, of either sign, if the true difference is zero; see
            [`sign_flip_p_value`]. `None` without pairs.
        holm_p_value (`float`, *optional*):
            The same with Holm's correction for the number of comparisons; see [`holm_p_values`]. `None` for a comparison that is
            not one of several.
    """

    difference: Estimate
    p_value: float | None
    holm_p_value: float | None = None


def totals_by_prompt(prompts: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """
    Sum values by prompt.

    Args:
        prompts (`Sequence[int]`): The prompt of each value.
        values (`Sequence[float]`): The values.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Sum and number of the values of each prompt, both of shape `(prompts,)`, in ascending
        order of prompts.
    """
    _, indices = np.unique(np.asarray(prompts, dtype=np.int64), return_inverse=True)
    return np.bincount(indices, weights=np.asarray(values, dtype=np.float64)), np.bincount(indices)


def bootstrap_mean(
    prompts: Sequence[int],
    values: Sequence[float],
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """
    Compute a mean with the percentile interval of the cluster bootstrap: each resample draws prompts, with all their samples
    (Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, sections 3.8 and 5.3). If all resamples are equal, as
    with a single prompt, there is no interval.

    Args:
        prompts (`Sequence[int]`): The prompt of each value.
        values (`Sequence[float]`): The values.
        confidence (`float`, *optional*, defaults to `0.95`): Share of resamples inside the interval, in (0, 1).
        num_resamples (`int`, *optional*, defaults to `10000`): Number of resamples.
        seed (`int`, *optional*, defaults to `0`): Seed of the resamples. Equal values have equal intervals.

    Raises:
        `ValueError`: If `confidence` or `num_resamples` is out of range.
    """
    from scipy.stats import bootstrap

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, but is {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, but is {num_resamples}")
    if not len(values):
        return Estimate(None, None, None, 0, 0)
    sums, counts = totals_by_prompt(prompts, values)
    mean, num_samples = float(sums.sum() / counts.sum()), int(counts.sum())
    if np.ptp(sums / counts) < _ZERO_WIDTH:
        # All resamples are equal.
        return Estimate(mean, None, None, len(sums), num_samples)
    interval = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=max(_BATCH_ELEMENTS // len(sums), 1),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if high - low < _ZERO_WIDTH:
        return Estimate(mean, None, None, len(sums), num_samples)
    return Estimate(mean, low, high, len(sums), num_samples)


def standard_error(prompts: Sequence[int], values: Sequence[float]) -> float | None:
    """
    Compute the standard error of a mean whose values are independent between prompts only (clustered by prompt).

    Args:
        prompts (`Sequence[int]`): The prompt of each value.
        values (`Sequence[float]`): The values.

    Returns:
        `float`: `None` with fewer than two prompts.
    """
    if len(set(prompts)) < 2:
        return None
    sums, counts = totals_by_prompt(prompts, values)
    residuals = sums - counts * (sums.sum() / counts.sum())
    correction = len(sums) / (len(sums) - 1)
    return float(math.sqrt(correction * (residuals**2).sum()) / counts.sum())


def estimate_rate(prompts: Sequence[int], passed: Sequence[bool], confidence: float = 0.95) -> Estimate:
    """
    Compute a rate with the interval of [`bootstrap_mean`], or with Wilson's interval if all resamples are equal, as if all samples
    pass or none does. Wilson's interval counts prompts and not samples, because samples of one prompt are not independent
    (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        prompts (`Sequence[int]`): The prompt of each sample.
        passed (`Sequence[bool]`): Whether each sample passed.
        confidence (`float`, *optional*, defaults to `0.95`): Confidence of the interval, in (0, 1).
    """
    estimate = bootstrap_mean(prompts, passed, confidence)
    if estimate.value is None or estimate.low is not None:
        return estimate
    low, high = wilson_interval(estimate.value, estimate.num_prompts, confidence)
    return replace(estimate, low=low, high=high)


def wilson_interval(rate: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Compute Wilson's interval of a rate.

    Args:
        rate (`float`): Observed rate, in [0, 1].
        count (`int`): Number of independent observations.
        confidence (`float`, *optional*, defaults to `0.95`): Confidence of the interval, in (0, 1).
    """
    from scipy.stats import norm

    weight = float(norm.ppf((1 + confidence) / 2)) ** 2 / count
    center = (rate + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * rate * (1 - rate) + weight**2 / 4) / (1 + weight)
    return max(center - margin, 0.0), min(center + margin, 1.0)


def holm_p_values(p_values: Sequence[float | None]) -> list[float | None]:
    """
    Correct p-values of several comparisons, so that the probability of any false rejection stays below the level
    (Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979).

    Args:
        p_values (`Sequence[float | None]`): The p-values. `None` stands for a comparison that could not be made, and does not count.

    Returns:
        `list[float | None]`: The corrected p-values, in the same order.
    """
    places = sorted((place for place, p in enumerate(p_values) if p is not None), key=lambda place: p_values[place])
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(places):
        # A larger p-value never becomes the smaller one.
        largest = max(largest, min(1.0, (len(places) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def sign_flip_p_value(totals: np.ndarray, num_flips: int = NUM_RESAMPLES, seed: int = 0) -> float:
    """
    Compute the two-sided p-value of Fisher's randomisation test of paired differences (*The Design of Experiments*, 1935,
    section 21). If two policies do not differ, the difference of each prompt could as well have the other sign.

    If `num_flips` allows, all combinations of signs are tried. Otherwise random ones are, and the observed signs count as one
    of them, so that the p-value is valid and never 0 (Phipson and Smyth, https://arxiv.org/abs/1603.05766).

    Args:
        totals (`np.ndarray` of shape `(prompts,)`): Sum of the differences of each prompt.
        num_flips (`int`, *optional*, defaults to `10000`): Largest number of combinations of signs.
        seed (`int`, *optional*, defaults to `0`): Seed of the signs.

    Returns:
        `float`: In (0, 1]; 1 if at most one prompt differs.
    """
    from scipy.stats import permutation_test

    totals = np.asarray(totals, dtype=np.float64)
    # Scores are numbers near 1, so what is smaller is their rounding.
    totals = totals[np.abs(totals) > _ROUNDING]
    if len(totals) < 2:
        # Both signs of a single difference are equally large.
        return 1.0
    result = permutation_test(
        (totals,),
        lambda values, axis: np.abs(values.sum(axis)),
        permutation_type="samples",
        vectorized=True,
        # The statistic is an absolute value, so one side covers both signs.
        alternative="greater",
        n_resamples=num_flips,
        batch=max(_BATCH_ELEMENTS // len(totals), 1),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_difference(prompts: Sequence[int], differences: Sequence[float]) -> PairedDifference:
    """
    Compare two policies on the same prompts and noise seeds.

    Args:
        prompts (`Sequence[int]`): The prompt of each pair of samples.
        differences (`Sequence[float]`): The second value of each pair minus the first.
    """
    difference = bootstrap_mean(prompts, differences)
    if not len(differences):
        return PairedDifference(difference, None)
    return PairedDifference(difference, sign_flip_p_value(totals_by_prompt(prompts, differences)[0]))
