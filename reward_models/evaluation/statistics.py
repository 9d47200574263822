# SPDX-License-Identifier: Apache-2.0

"""
How far a mean can be trusted: intervals and paired tests over prompts.

Samples of one prompt depend on each other (same request, same difficulty), so what is drawn anew, and what changes its sign,
are whole prompts and never single samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


NUM_RESAMPLES = 10_000
# Numbers that a chunk of resamples holds, so that a large benchmark fits into memory.
_CHUNK_ELEMENTS = 2**22
_MAX_EXACT_PROMPTS = 14


@dataclass(frozen=True)
class Estimate:
    """
    A mean and how far it can be trusted.

    Args:
        value (`float`, *optional*): Mean over all samples; `None` if there are none.
        low, high (`float`, *optional*): Interval of the mean; `None` if there are no samples.
        num_prompts (`int`): Prompts with at least one sample.
        num_samples (`int`): Samples.
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
        difference ([`Estimate`]): Of the mean difference.
        p_value (`float`, *optional*):
            How probable a difference this large, of either sign, is if there is none; see [`sign_flip_p_value`]. `None`
            without pairs.
    """

    difference: Estimate
    p_value: float | None


def totals_by_prompt(prompts: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """
    Sum values by prompt.

    Args:
        prompts (`Sequence[int]`): The prompt of each value.
        values (`Sequence[float]`): The values.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Sum and number of values of each prompt that has any, of shape `(prompts,)`, in
        ascending order of prompts.
    """
    _, places = np.unique(np.asarray(prompts, dtype=np.int64), return_inverse=True)
    return np.bincount(places, weights=np.asarray(values, dtype=np.float64)), np.bincount(places)


def bootstrap_mean(
    prompts: Sequence[int],
    values: Sequence[float],
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """
    A mean with the percentile interval of the cluster bootstrap (Davison and Hinkley, *Bootstrap Methods and their
    Application*, 1997, sections 3.8 and 5.3): prompts are drawn anew, with all their samples.

    Args:
        prompts (`Sequence[int]`): The prompt of each value.
        values (`Sequence[float]`): The values.
        confidence (`float`, *optional*, defaults to `0.95`): Share of resamples inside of the interval, in (0, 1).
        num_resamples (`int`, *optional*, defaults to `10000`): How often prompts are drawn anew.
        seed (`int`, *optional*, defaults to `0`): Of the draws: equal values give an equal interval.

    Raises:
        `ValueError`: If `confidence` or `num_resamples` is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, but is {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, but is {num_resamples}")
    if not len(values):
        return Estimate(None, None, None, 0, 0)
    sums, counts = totals_by_prompt(prompts, values)
    num_prompts = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    chunk = max(_CHUNK_ELEMENTS // num_prompts, 1)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn = rng.integers(num_prompts, size=(size, num_prompts))
        means[start : start + size] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), num_prompts, int(counts.sum()))


def sign_flip_p_value(totals: np.ndarray, num_flips: int = NUM_RESAMPLES, seed: int = 0) -> float:
    """
    Two-sided p-value of Fisher's randomisation test of paired differences (*The Design of Experiments*, 1935, section 21):
    without a difference between two policies, each prompt's difference could as well have the other sign.

    All signs are tried for up to 14 prompts that differ. For more, random ones are, and the observed signs count as one of
    them, so that the p-value is valid and never 0 (Phipson and Smyth, https://arxiv.org/abs/1603.05766).

    Args:
        totals (`np.ndarray` of shape `(prompts,)`): Sum of the differences of each prompt.
        num_flips (`int`, *optional*, defaults to `10000`): How many random signs are tried.
        seed (`int`, *optional*, defaults to `0`): Of the signs.

    Returns:
        `float`: In (0, 1]; 1 if no prompt differs.
    """
    totals = np.asarray(totals, dtype=np.float64)
    totals = totals[totals != 0]
    if not len(totals):
        return 1.0
    # Sums in another order differ in their last bits.
    observed = abs(totals.sum()) * (1 - 1e-9)
    if len(totals) <= _MAX_EXACT_PROMPTS:
        bits = (np.arange(2 ** len(totals))[:, None] >> np.arange(len(totals))) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ totals) >= observed))
    rng = np.random.default_rng(seed)
    chunk = max(_CHUNK_ELEMENTS // len(totals), 1)
    num_extreme = 0
    for start in range(0, num_flips, chunk):
        signs = 2 * rng.integers(2, size=(min(chunk, num_flips - start), len(totals)), dtype=np.int8) - 1
        num_extreme += int((np.abs(signs @ totals) >= observed).sum())
    return (num_extreme + 1) / (num_flips + 1)


def paired_difference(
    prompts: Sequence[int], differences: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """
    Compare two policies on the same prompts and noise seeds.

    Args:
        prompts (`Sequence[int]`): The prompt of each pair of samples.
        differences (`Sequence[float]`): By how much the second of the pair is better.
        confidence (`float`, *optional*, defaults to `0.95`): Of the interval, see [`bootstrap_mean`].
        seed (`int`, *optional*, defaults to `0`): Of all draws.
    """
    difference = bootstrap_mean(prompts, differences, confidence, seed=seed)
    if not len(differences):
        return PairedDifference(difference, None)
    return PairedDifference(difference, sign_flip_p_value(totals_by_prompt(prompts, differences)[0], seed=seed))
