# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from alphagrpo_ext.rollout import TASKS
from alphagrpo_ext.trainer import AlphaGRPOConfig
from alphagrpo_ext.trainer.rewards import (
    complete_sum,
    group_advantages,
    joint_advantages,
    judge_step,
    missing_rewards,
    rectify_false_positives,
    select_initial,
    share_advantages,
)
from alphagrpo_ext.trainer.step import RolloutStep
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


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


def test_a_sum_without_a_part_is_unknown() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0], [1.0, NAN], [3.0, NAN], [NAN, NAN]])
    weights = torch.tensor([2.0, 1.0])
    # The second function judged a sample of the first group, so it failed for another; it does not apply to the second.
    expected = torch.tensor([NAN, NAN, 4.0, 2.0, 6.0, NAN], dtype=torch.float64)
    torch.testing.assert_close(complete_sum(rewards, weights, 3), expected, equal_nan=True)
    without = complete_sum(rewards, torch.tensor([2.0, 0.0]), 3)
    torch.testing.assert_close(without[:3], torch.tensor([2.0, NAN, 2.0], dtype=torch.float64), equal_nan=True)


def test_a_function_that_always_applies_owes_every_sample_a_reward() -> None:
    rewards = torch.tensor([[NAN, NAN, 1.0]] * 4)
    always = torch.tensor([True, False, False])
    assert missing_rewards(rewards, always, 4).tolist() == [[True, False, False]] * 4


REWARD = st.one_of(st.none(), st.floats(-2, 2, width=32), st.sampled_from([0.1, 0.3, 0.7]))
SETTINGS = st.sampled_from(
    [
        *({"scale_rewards": scale} for scale in ("batch", "group", "none")),
        {"multi_objective_aggregation": "normalize_then_sum"},
    ]
)


@st.composite
def reward_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rewards `(samples, functions)`, weights and group size."""
    size, groups, functions = draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = draw(
        st.lists(
            st.lists(REWARD, min_size=functions, max_size=functions), min_size=size * groups, max_size=size * groups
        )
    )
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.0]), min_size=functions, max_size=functions))
    matrix = torch.tensor([[NAN if value is None else value for value in row] for row in values])
    return matrix, torch.tensor(weights), size


@pytest.mark.invariant
@given(reward_matrices(), SETTINGS)
@settings(max_examples=200, deadline=None)
def test_a_sample_with_a_missing_reward_has_no_advantage_and_changes_none(drawn: tuple, options: dict) -> None:
    rewards, weights, size = drawn
    advantages = group_advantages(rewards, weights, size, **options)
    assert advantages.isfinite().all()
    incomplete = complete_sum(rewards, weights, size).isnan()
    assert (advantages[incomplete] == 0).all()
    # The other rewards of such a sample do not matter.
    changed = torch.where(incomplete[:, None] & ~rewards.isnan(), rewards + 5, rewards)
    torch.testing.assert_close(group_advantages(changed, weights, size, **options), advantages)


@pytest.mark.invariant
@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 16), SETTINGS)
@settings(max_examples=100, deadline=None)
def test_equal_rewards_have_no_advantage(value: float, size: int, options: dict) -> None:
    rewards = torch.full((2 * size, 1), value)
    rewards[size:] = 0.37
    assert group_advantages(rewards, torch.ones(1), size, **options).abs().max() < 1e-6


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    rewards = torch.tensor([[0.7], [0.7], [0.7], [0.7]])
    rewards[0] = torch.nextafter(rewards[0], torch.tensor(1.0))
    for scale in ("batch", "group", "none"):
        assert group_advantages(rewards, torch.ones(1), 4, scale).abs().max() == 0


def step_of(
    rewards: torch.Tensor,
    size: int,
    functions: Sequence[Callable],
    weights: torch.Tensor,
    initial: torch.Tensor | None = None,
    task: str = "reasoning_t2i",
    texts: Sequence[TextSegment] = (),
    **options: Any,
) -> tuple[RolloutStep, AlphaGRPOConfig]:
    """A rollout of one process with given rewards, judged."""
    args = AlphaGRPOConfig("unused", num_generations=size, per_device_train_batch_size=size, bf16=False, **options)
    image = ImageSegment(torch.zeros(1, 1), (1, 1), sampled=True)
    rows = [{"prompt": "x", "task": task}] * len(rewards)
    step = RolloutStep(
        rows, {task: args.train_rollout(0)}, 0, 0, 0, size, trajectories=[Trajectory([*texts, image])] * len(rows)
    )
    if initial is not None:
        step.initial_scores = initial
    judge_step(step, rewards, functions, weights, {task: TASKS.get(task)(think=True)}, args, Accelerator(cpu=True))
    return step, args


def judge(images: Any) -> None: ...


def form(completions: Any) -> None: ...


form.text_only = True


@pytest.mark.invariant
@given(reward_matrices(), st.data(), st.sampled_from(["minimum", "initial"]), SETTINGS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_false_positive_is_praised(
    drawn: tuple, data: st.DataObject, rectification: str, options: dict, separate: bool
) -> None:
    """Neither its image, by one of several rewards, nor its text, by its form."""
    rewards, weights, size = drawn
    num_groups = len(rewards) // size
    initial = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=32), min_size=num_groups, max_size=num_groups)))
    images = initial.repeat_interleave(size)[:, None].expand(len(rewards), rewards.shape[1])
    forms = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(rewards), max_size=len(rewards)))
    )
    functions = [*[judge] * rewards.shape[1], form]
    weights = torch.cat([weights, torch.tensor([0.5])])
    step, args = step_of(
        torch.cat([rewards, forms[:, None]], dim=1),
        *(size, functions, weights, images, "self_reflection"),
        rectification=rectification,
        separate_advantages=separate,
        **options,
    )
    trl = group_advantages(step.rewards, weights, size, args.scale_rewards, args.multi_objective_aggregation)
    output = joint_advantages(
        step, {"advantages": trl, "tool_mask": torch.ones(len(trl), 1)}, functions, weights, args
    )
    assert torch.equal(output["is_scored"], output["tool_mask"].flatten().bool())
    for advantages in (output["advantages"], output["image_advantages"]):
        assert advantages.isfinite().all()
        assert (advantages[step.is_false_positive] <= 0).all()
        assert (advantages[step.rewards.isnan().all(dim=1)] == 0).all()


def test_without_a_reward_of_its_image_a_text_is_not_praised_for_its_form() -> None:
    rewards = torch.tensor([[NAN, 1.0], [0.8, 1.0], [0.9, 0.0], [NAN, 0.0]])
    step, _ = step_of(rewards, 4, [judge, form], torch.ones(2))
    assert step.rewards.isnan().all(dim=1).tolist() == [True, False, False, True]
    # Nor if no image of the group could be judged.
    step, _ = step_of(torch.tensor([[NAN, 1.0], [NAN, 0.0]]), 2, [judge, form], torch.ones(2))
    assert step.rewards.isnan().all()
    # Where images are not judged at all, texts are trained alone.
    step, _ = step_of(torch.tensor([[1.0], [0.0]]), 2, [form], torch.ones(1))
    assert not step.rewards.isnan().any()


@pytest.mark.parametrize("rectification", ["minimum", "initial", "off"])
def test_where_no_reward_of_images_counts_no_image_is_a_false_positive(rectification: str) -> None:
    """A reward of weight 0 is a monitor, by which all images would be equally good."""
    rewards, weights = torch.tensor([[0.5, 1.0], [0.7, 0.0]]), torch.tensor([0.0, 1.0])
    initial = torch.tensor([[0.6], [0.6]])
    options = {"rectification": rectification, "scale_rewards": "none"}
    step, args = step_of(rewards, 2, [judge, form], weights, initial, "self_reflection", **options)
    assert not step.is_false_positive.any()
    assert step.initial_rewards.isnan().all()
    output = {"advantages": torch.tensor([0.5, -0.5]), "tool_mask": torch.ones(2, 3)}
    assert joint_advantages(step, output, [judge, form], weights, args)["advantages"].tolist() == [0.5, -0.5]


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_rewards_that_cancel_are_equal_up_to_their_own_rounding(scale_rewards: str) -> None:
    """Each term is rounded, by more than the size of their sum would tell."""
    large = torch.tensor([1000.1, 1000.2, 1000.3, 1000.7])
    rewards = torch.stack([large, 0.25 - large], dim=1)
    assert group_advantages(rewards, torch.ones(2), 4, scale_rewards).tolist() == [0.0] * 4


def test_a_function_of_texts_that_always_applies_owes_every_written_text_a_reward() -> None:
    def structure(completions: Any) -> None: ...

    structure.text_only = structure.always_applies = True
    rewards = torch.tensor([[0.2, NAN], [0.8, NAN]])
    step, _ = step_of(rewards, 2, [judge, structure], torch.ones(2), texts=[TextSegment([5], sampled=True)])
    assert step.rewards.isnan().all()
    # It has nothing to say of a task without texts, which is trained with the other rewards.
    step, _ = step_of(rewards, 2, [judge, structure], torch.ones(2))
    assert step.rewards[:, 0].tolist() == pytest.approx([0.2, 0.8])


def test_functions_for_some_prompts_each_train_theirs() -> None:
    rewards = torch.tensor([[0.1, NAN], [0.3, NAN], [NAN, 0.5], [NAN, 0.9]])
    step, _ = step_of(rewards, 2, [judge, judge], torch.ones(2))
    assert torch.equal(step.rewards.nan_to_num(), rewards.nan_to_num())
    assert group_advantages(step.rewards, torch.ones(2), 2, "none").tolist() == pytest.approx([-0.1, 0.1, -0.2, 0.2])


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_rewards_are_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=f"the reward function 'form' returned {value} for sample 1 of the rollout"):
        step_of(torch.tensor([[0.1, 1.0], [0.3, value]]), 2, [judge, form], torch.ones(2))


def test_texts_that_follow_a_shared_thought_have_their_own_advantage() -> None:
    step, _ = step_of(torch.tensor([[0.0], [1.0], [NAN], [0.5]]), 4, [judge], torch.ones(1), branches_per_thought=2)
    advantages = torch.tensor([-0.5, 0.25, 0.0, 0.5])
    one = [TextSegment([5, 6], sampled=True, role="assistant")]
    step.trajectories = [Trajectory(one)] * 4
    assert share_advantages(advantages, step, 2).tolist() == [-0.125, -0.125, 0.0, 0.5]
    step.trajectories = [Trajectory([*one, TextSegment([7] * (1 + i), sampled=True)]) for i in range(4)]
    # TRL pads the texts of four tokens after the thought further where it is told to.
    for padding in (0, 2):
        shared = share_advantages(advantages, step, 6 + padding)
        first, after = [-0.125, -0.125, 0.0, 0.5], advantages.tolist()
        assert shared.tolist() == [[a, a, *[b] * (4 + padding)] for a, b in zip(first, after, strict=True)]
