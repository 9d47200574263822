# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter

import pytest
import torch

from alphagrpo_ext.trainer.rewards import group_advantages, rectify_false_positives, select_initial, weighted_sum


NAN = float("nan")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_lowest_reward_is_selected() -> None:
    assert select_initial([0.5, 0.2, 0.9], "lowest", random.Random(0)) == 1
    assert select_initial([None, 0.7, 0.9], "lowest", random.Random(0)) == 1
    assert select_initial([None, None], "lowest", random.Random(0)) == 0


def test_sampled_selection_follows_the_softmax() -> None:
    rng = random.Random(0)
    counts = Counter(select_initial([0.0, 1.0, None], "sampled", rng) for _ in range(4000))
    # softmax((1, 0)) = (0.731, 0.269); the standard error is 0.007.
    assert counts[0] / 4000 == pytest.approx(0.731, abs=0.03)
    assert counts[2] == 0


@pytest.mark.parametrize("rectification", ["minimum", "initial", "off"])
def test_rectification(rectification: str) -> None:
    rewards = column(0.2, 0.5, 0.9, 0.4)
    result, is_false = rectify_false_positives(
        rewards, torch.ones(1), torch.full((4,), 0.5), num_generations=4, rectification=rectification
    )
    # Equal to the initial reward is no improvement.
    assert is_false.tolist() == [True, True, False, True]
    expected = {
        "minimum": [0.2, 0.2, 0.9, 0.2],
        "initial": [0.5, 0.5, 0.9, 0.5],
        "off": [0.2, 0.5, 0.9, 0.4],
    }[rectification]
    assert result.flatten().tolist() == pytest.approx(expected)


@pytest.mark.invariant
def test_a_false_positive_never_has_a_positive_advantage() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 0.5])
    for _ in range(100):
        rewards = torch.rand(12, 2, generator=generator)
        initial = torch.rand(3, generator=generator).repeat_interleave(4) * 1.5
        rectified, is_false = rectify_false_positives(rewards, weights, initial, 4)
        for scale in ("batch", "group", "none"):
            advantages = group_advantages(rectified, weights, 4, scale)
            assert (advantages[is_false] <= 1e-6).all()
            hopeless = is_false.view(3, 4).all(dim=1).repeat_interleave(4)
            assert (advantages[hopeless].abs() < 1e-6).all()


def test_rectification_of_several_functions_takes_the_rewards_of_the_worst_sample() -> None:
    rewards = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.9]])
    result, _ = rectify_false_positives(rewards, torch.tensor([1.0, 1.0]), torch.full((3,), 1.2), 3)
    torch.testing.assert_close(result, torch.tensor([[0.2, 0.3], [0.2, 0.3], [0.8, 0.9]]))


def test_groups_are_rectified_apart_and_what_was_not_scored_stays() -> None:
    rewards = column(0.3, 0.6, NAN, 0.1)
    initial = torch.tensor([0.4, 0.4, 0.4, 0.4])
    result, is_false = rectify_false_positives(rewards, torch.ones(1), initial, 2)
    assert is_false.tolist() == [True, False, False, True]
    torch.testing.assert_close(result, column(0.3, 0.6, NAN, 0.1), equal_nan=True)


def test_without_an_initial_reward_nothing_is_rectified() -> None:
    rewards = column(0.1, 0.9)
    result, is_false = rectify_false_positives(rewards, torch.ones(1), torch.full((2,), NAN), 2)
    assert not is_false.any()
    assert torch.equal(result, rewards)


def test_weighted_sum_skips_what_is_missing() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0]])
    expected = torch.tensor([2.0, NAN, 4.0])
    torch.testing.assert_close(weighted_sum(rewards, torch.tensor([2.0, 1.0])), expected, equal_nan=True)
