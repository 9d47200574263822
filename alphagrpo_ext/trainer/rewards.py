# SPDX-License-Identifier: Apache-2.0

"""
From rewards to advantages: what TRL's group advantages do not know of images, reflection and formats.

Rectification replaces rewards, not advantages, so that TRL's own normalisation follows. `rewards/<function>/mean` shows
rewards after it, `reflection/final_reward` before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import nanstd

from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.reward_functions import reward_attribute


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.config import AlphaGRPOConfig
    from alphagrpo_ext.trainer.step import RolloutStep


def judges_images(functions: Sequence[Callable]) -> torch.Tensor:
    """
    Which reward functions judge images, bool `(functions,)`: all but reward models, which read texts, and functions with a true
    attribute `text_only` (see [`reward_attribute`]).
    """
    is_text_only = [isinstance(f, torch.nn.Module) or bool(reward_attribute(f, "text_only")) for f in functions]
    return ~torch.tensor(is_text_only)


def select_initial(rewards: Sequence[float | None], selection: str, rng: random.Random) -> int:
    """
    Choose which of several images of one prompt is refined.

    Args:
        rewards (`Sequence[float | None]`):
            Reward of each image. `None` means that it could not be scored; such an image is chosen only if none was scored.
        selection (`str`): `"lowest"` takes the lowest reward, `"sampled"` draws with `softmax(1 - reward)`.
        rng (`random.Random`): Source of that draw.

    Returns:
        `int`: Index of the chosen image.
    """
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    if not scored:
        return 0
    if selection == "lowest":
        return min(scored, key=lambda i: rewards[i])
    weights = torch.softmax(torch.tensor([1 - rewards[i] for i in scored], dtype=torch.float64), dim=0)
    return rng.choices(scored, weights.tolist())[0]


def weighted_sum(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum `(samples, functions)` rewards to `(samples,)` as TRL does: NaN counts as 0, and the sum is NaN where all are NaN."""
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(torch.isnan(rewards).all(dim=1), torch.nan)


def rectify_false_positives(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    initial_rewards: torch.Tensor,
    num_generations: int,
    rectification: str = "minimum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    False-positive rectification (https://huggingface.co/papers/2605.12495): a refined image that is no better than the image
    it started from gets a reward that is not above its group's.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): Rewards of images; the samples of a group follow each other.
        weights (`torch.Tensor` of shape `(functions,)`): Weights of the functions.
        initial_rewards (`torch.Tensor` of shape `(samples,)`):
            Weighted reward of the image that each sample started from. NaN where there is none.
        num_generations (`int`): Samples per group.
        rectification (`str`, *optional*, defaults to `"minimum"`):
            `"minimum"` gives a false positive all rewards of the worst sample of its group, `"initial"` changes its own so
            that they sum to the initial image's, `"off"` leaves them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Rewards `(samples, functions)`, and which samples are false positives, bool
        `(samples,)`.
    """
    total = weighted_sum(rewards, weights)
    is_false = total <= initial_rewards
    if rectification == "off" or not is_false.any():
        return rewards, is_false
    if rectification == "initial":
        # Only the sum over functions matters, so the first one carries the difference.
        columns = torch.nan_to_num(rewards)
        share = torch.zeros_like(columns)
        first = int((weights != 0).nonzero()[0])
        share[:, first] = (initial_rewards - total) / weights[first]
        return torch.where(is_false[:, None], columns + share, rewards), is_false
    groups = total.view(-1, num_generations)
    worst = torch.where(torch.isnan(groups), torch.inf, groups).argmin(dim=1)
    worst = worst + torch.arange(len(groups), device=worst.device) * num_generations
    return torch.where(is_false[:, None], rewards[worst.repeat_interleave(num_generations)], rewards), is_false


def group_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    scale_rewards: str = "batch",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """
    Group-relative advantages from some of the reward functions, computed as [`~trl.GRPOTrainer`] does from all of them.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): NaN where a function gave none.
        weights (`torch.Tensor` of shape `(functions,)`): Weights of the functions.
        num_generations (`int`): Samples per group.
        scale_rewards, multi_objective_aggregation (`str`): As in [`~trl.GRPOConfig`].

    Returns:
        `torch.Tensor` of shape `(samples,)`: 0 where no function gave a reward.
    """
    if multi_objective_aggregation == "normalize_then_sum":
        grouped = rewards.view(-1, num_generations, rewards.shape[1])
        normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        total = weighted_sum(normalized.view_as(rewards), weights)
        advantages = (total - total.nanmean()) / (nanstd(total) + 1e-4)
        return torch.nan_to_num(advantages, nan=0.0)
    total = weighted_sum(rewards, weights)
    grouped = total.view(-1, num_generations)
    advantages = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(total) + 1e-4)
    return torch.nan_to_num(advantages.flatten(), nan=0.0)


def mean_by_name(rewards: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean of `(samples,)` rewards for each of the names that the samples bear, without NaN."""
    return {
        name: rewards[torch.tensor([other == name for other in names], device=rewards.device)].nanmean().item()
        for name in dict.fromkeys(names)
    }


def reflection_metrics(
    initial_rewards: torch.Tensor, final_rewards: torch.Tensor, is_rectified: torch.Tensor
) -> dict[str, float]:
    """
    What is logged about refined images, averaged over the samples that have both rewards.

    Args:
        initial_rewards, final_rewards (`torch.Tensor` of shape `(samples,)`):
            Weighted rewards of the image that a sample started from, and of its own before rectification.
        is_rectified (`torch.Tensor` of shape `(samples,)`): Whether its rewards were replaced, bool.

    Returns:
        `dict[str, float]`: Empty if no sample has both rewards.
    """
    compared = ~(initial_rewards.isnan() | final_rewards.isnan())
    if not compared.any():
        return {}
    values = {
        "initial_reward": initial_rewards,
        "final_reward": final_rewards,
        "improved_frac": (final_rewards > initial_rewards).float(),
        "rectified_frac": is_rectified.float(),
    }
    return {f"reflection/{name}": value[compared].mean().item() for name, value in values.items()}


def judge_step(
    step: RolloutStep,
    rewards: torch.Tensor,
    functions: Sequence[Callable],
    weights: torch.Tensor,
    tasks: Mapping[str, Task],
    args: AlphaGRPOConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Set `image_rewards` and, after rectification, `rewards` of a rollout.

    Args:
        step ([`RolloutStep`]): Its trajectories are sampled.
        rewards (`torch.Tensor` of shape `(samples of all processes, functions)`): What the functions gave.
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`): All functions and their weights.
        tasks (`Mapping[str, Task]`): The tasks of the rows by name.
        args ([`AlphaGRPOConfig`]): `rectification`, one of [`RECTIFICATIONS`].
        accelerator ([`~accelerate.Accelerator`]): Gathers what is known of this process alone.

    Returns:
        `dict[str, float]`: Metrics: the mean reward of every task if there are several, and those of [`reflection_metrics`].
    """
    metrics = {}
    is_image = judges_images(functions).to(rewards.device)
    weights = weights.to(rewards.device)[is_image]
    step.rewards, step.image_rewards = rewards, weighted_sum(rewards[:, is_image], weights)
    if len(tasks) > 1:
        names = gather_object([row["task"] for row in step.rows])
        metrics = {f"rewards/{task}": value for task, value in mean_by_name(step.image_rewards, names).items()}
    if any(task.paints_initial_image for task in tasks.values()):
        initial_rewards = accelerator.gather(torch.tensor(step.initial_rewards, device=rewards.device))
        rectified, is_false = rectify_false_positives(
            rewards[:, is_image], weights, initial_rewards, step.group_size, args.rectification
        )
        is_rectified = is_false if args.rectification != "off" else torch.zeros_like(is_false)
        metrics |= reflection_metrics(initial_rewards, step.image_rewards, is_rectified)
        step.rewards = rewards.clone()
        step.rewards[:, is_image] = rectified
    return metrics


def image_advantages(
    step: RolloutStep,
    advantages: torch.Tensor,
    functions: Sequence[Callable],
    weights: torch.Tensor,
    args: AlphaGRPOConfig,
) -> torch.Tensor:
    """
    Advantages of images: TRL's, unless some rewards are about text alone.

    Args:
        step ([`RolloutStep`]): Its rewards are rectified.
        advantages (`torch.Tensor` of shape `(samples of this process,)`): TRL's, which count all rewards.
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`): All functions and their weights.
        args ([`AlphaGRPOConfig`]): `separate_advantages`, `mask_broken_format`, and TRL's settings of advantages.

    Returns:
        `torch.Tensor` of shape `(samples of this process,)`: A new tensor.
    """
    is_image = judges_images(functions).to(advantages.device)
    if is_image.all():
        return advantages.clone()
    if args.separate_advantages:
        advantages = group_advantages(
            step.rewards[:, is_image],
            weights.to(advantages.device)[is_image],
            step.group_size,
            args.scale_rewards,
            args.multi_objective_aggregation,
        )[step.local]
    if args.mask_broken_format:
        is_broken = (step.rewards[step.local][:, ~is_image] < 0.5).any(dim=1)
        advantages = advantages.masked_fill(is_broken, 0.0)
    return advantages.clone()
