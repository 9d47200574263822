# SPDX-License-Identifier: Apache-2.0

"""The reward of one image from the answers about it: pure functions of P(yes) values."""

import math
from collections.abc import Sequence
from statistics import fmean

from alphagrpo_ext.registry import Registry


AGGREGATIONS = Registry("aggregation", "alphagrpo_ext.aggregations")


@AGGREGATIONS.register("geometric")
def geometric(semantic: Sequence[float], quality: Sequence[float]) -> float:
    """`sqrt(mean(semantic) * mean(quality))`, the reward of https://huggingface.co/papers/2605.12495."""
    return math.sqrt(fmean(semantic) * fmean(quality))


@AGGREGATIONS.register("mean")
def mean(semantic: Sequence[float], quality: Sequence[float]) -> float:
    """The mean of the two means. Both sides have the same weight, whatever their number of questions."""
    return (fmean(semantic) + fmean(quality)) / 2


@AGGREGATIONS.register("pooled")
def pooled(semantic: Sequence[float], quality: Sequence[float]) -> float:
    """The mean over all questions. Every question has the same weight."""
    return fmean([*semantic, *quality])


def aggregate(
    semantic: Sequence[float | None], quality: Sequence[float | None], aggregation: str = "geometric"
) -> float | None:
    """
    Compute the reward of one image.

    Args:
        semantic, quality (`Sequence[float | None]`):
            P(yes) of the semantic and of the quality questions, in [0, 1]; `None` for a question without an answer.
        aggregation (`str`, *optional*, defaults to `"geometric"`):
            Name in `AGGREGATIONS`: `"geometric"`, `"mean"` or `"pooled"`. If one of the two sequences is empty, the reward is
            the mean of the other.

    Returns:
        `float` or `None`: The reward in [0, 1], or `None` if any answer is missing.

    Raises:
        `ValueError`: If both sequences are empty, or if the aggregation is unknown.
    """
    combine = AGGREGATIONS.get(aggregation)
    if not _all_answered(semantic, quality):
        return None
    if not semantic or not quality:
        return fmean([*semantic, *quality])
    return combine(semantic, quality)


def all_yes(semantic: Sequence[float | None], quality: Sequence[float | None], threshold: float = 0.5) -> bool | None:
    """
    Whether the answer to every question is yes, i.e. `P(yes) >= threshold`; `None` if any answer is missing.

    Args:
        semantic, quality (`Sequence[float | None]`): As in [`aggregate`].
        threshold (`float`, *optional*, defaults to `0.5`): Smallest P(yes) of a yes.

    Raises:
        `ValueError`: If both sequences are empty.
    """
    if not _all_answered(semantic, quality):
        return None
    return all(answer >= threshold for answer in [*semantic, *quality])


def _all_answered(semantic: Sequence[float | None], quality: Sequence[float | None]) -> bool:
    if not semantic and not quality:
        raise ValueError("semantic and quality are both empty: an image without questions has no reward")
    return None not in semantic and None not in quality
