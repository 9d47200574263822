# SPDX-License-Identifier: Apache-2.0

import torch
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext.openrlhf.group_rewards import exact_in_a_group


@given(st.floats(0, 1), st.integers(2, 256))
def test_equal_rewards_of_a_group_have_no_advantage(reward: float, size: int) -> None:
    """OpenRLHF's formula (`experience_maker.py`, `group_norm`), in its fp32."""
    rewards = torch.full((1, size), exact_in_a_group(reward), dtype=torch.float32)
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
    assert advantages.tolist() == [[0.0] * size]


@given(st.floats(0, 1))
def test_a_reward_stays_what_it_is(reward: float) -> None:
    assert abs(exact_in_a_group(reward) - reward) <= 2.0**-17


def test_rounding_would_be_an_advantage_otherwise() -> None:
    """What the rounding is for; if this fails, OpenRLHF's formula no longer needs it."""
    rewards = torch.full((14,), 0.7134, dtype=torch.float32)
    worst = max(
        ((r - r.mean()) / (r.std() + 1e-9)).abs().max().item()
        for r in (rewards * (1 + step / 1000) for step in range(100))
    )
    assert worst > 0.1
