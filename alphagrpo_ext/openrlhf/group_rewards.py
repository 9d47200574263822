# SPDX-License-Identifier: Apache-2.0

"""Rewards that are rounded so that equal ones stay equal in OpenRLHF's arithmetic."""

from __future__ import annotations


_STEP = 2.0**-16


def exact_in_a_group(reward: float) -> float:
    """
    Round a reward to a multiple of 2^-16.

    `group_norm` of OpenRLHF divides deviations from the mean of a group, in fp32, by their standard deviation plus 1e-9. If all
    rewards of a group are equal, both can be mere rounding errors of the mean, so that equal rewards get advantages of full size. The
    mean of equal multiples of 2^-16 is exact for groups of up to 256 rewards in [0, 1].

    Args:
        reward (`float`): A reward in [0, 1].
    """
    return round(reward / _STEP) * _STEP
