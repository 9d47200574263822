# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from alphagrpo_ext.registry import UnknownNameError
from reward_models.aggregation import AGGREGATIONS, aggregate, all_yes


NAMES = ["geometric", "mean", "pooled"]


def random_answers(rng, low=1):
    return [rng.random() for _ in range(rng.randint(low, 6))]


def test_definitions_against_a_worked_example():
    semantic, quality = [1.0, 0.0, 0.5, 0.5], [0.5]
    assert aggregate(semantic, quality) == aggregate(semantic, quality, "geometric") == pytest.approx(0.5)
    assert aggregate([1.0, 0.5], [0.25, 0.0], "geometric") ** 2 == pytest.approx(0.75 * 0.125)
    assert aggregate([1.0, 0.5], [0.25], "mean") == pytest.approx((0.75 + 0.25) / 2)
    assert aggregate([1.0, 0.5], [0.25], "pooled") == pytest.approx(1.75 / 3)


def test_registry_has_the_three_aggregations():
    assert set(NAMES) <= set(AGGREGATIONS.names())
    with pytest.raises(UnknownNameError, match="Did you mean 'geometric'"):
        aggregate([1.0], [1.0], "geomtric")


@pytest.mark.parametrize("name", NAMES)
def test_bounded_monotone_and_blind_to_order(name):
    rng = random.Random(0)
    for _ in range(200):
        semantic, quality = random_answers(rng), random_answers(rng)
        reward = aggregate(semantic, quality, name)
        assert min(semantic + quality) - 1e-12 <= reward <= max(semantic + quality) + 1e-12
        assert aggregate(semantic[::-1], quality[::-1], name) == pytest.approx(reward)
        better = [semantic[0] + (1 - semantic[0]) / 2, *semantic[1:]]
        assert aggregate(better, quality, name) > reward


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_side_leaves_the_mean_of_the_other(name):
    rng = random.Random(1)
    for _ in range(20):
        answers = random_answers(rng)
        mean = sum(answers) / len(answers)
        assert aggregate(answers, [], name) == pytest.approx(mean)
        assert aggregate([], answers, name) == pytest.approx(mean)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_answer_is_none_wherever_it_is(name):
    for semantic, quality in [([None, 1.0], [1.0]), ([1.0], [0.0, None]), ([None], []), ([], [None])]:
        assert aggregate(semantic, quality, name) is None
        assert all_yes(semantic, quality) is None


def test_a_zero_is_an_answer():
    assert aggregate([0.0], [1.0], "geometric") == 0.0
    assert all_yes([0.0], [1.0]) is False


def test_no_questions_is_an_error():
    with pytest.raises(ValueError, match="both empty"):
        aggregate([], [])
    with pytest.raises(ValueError, match="both empty"):
        all_yes([], [])


def test_all_yes_needs_every_answer_to_reach_the_threshold():
    assert all_yes([0.6, 0.9], [0.5]) is True
    assert all_yes([0.6, 0.9], [0.49]) is False
    assert all_yes([0.6, 0.4], []) is False
    assert all_yes([0.6, 0.9], [0.7], threshold=0.65) is False
    assert all_yes([0.66, 0.9], [0.7], threshold=0.65) is True
