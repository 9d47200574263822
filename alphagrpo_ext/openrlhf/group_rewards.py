# SPDX-License-Identifier: Apache-2.0

"""Rewards in the precision in which OpenRLHF compares those of a group."""

from __future__ import annotations


_STEP = 2.0**-16


def exact_in_a_group(reward: float) -> float:
    """
    Round a reward to a multiple of 2^-16.

    `group_norm` of OpenRLHF divides deviations from the mean of a group, in fp32, by their standard deviation plus 1e-9. If all
    rewards of a group are equal, both can be the rounding of that mean, and its advantages are then as large as any. The mean of
    equal multiples of 2^-16 is exact for groups of up to 256 rewards in [0, 1].

    Args:
        reward (`float`): A reward in [0, 1].
    """
    return round(reward / _STEP) * _STEP
