# SPDX-License-Identifier: Apache-2.0

"""From rewards to advantages: what TRL's group advantages do not know of images, reflection and formats."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from trl.trainer.utils import nanstd


RECTIFICATIONS = ("minimum", "initial", "off")
SELECTIONS = ("lowest", "sampled")


def select_initial(rewards: Sequence[float | None], selection: str, rng: random.Random) -> int:
    """
    Which of several images of one prompt shall be refined.

    Args:
        rewards (`Sequence[float | None]`): Of each image; one that could not be scored is chosen only if all are.
        selection (`str`): `"lowest"` takes the lowest reward, `"sampled"` draws by `softmax(1 - reward)`.
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
    """`(samples, functions)` rewards to `(samples,)`, as TRL adds them: without NaN, and NaN where all are."""
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
    False-positive rectification (https://huggingface.co/papers/2605.12495): a refinement that is no better than the image
    it set out to fix must not be praised for being better than its group.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): Rewards of images, groups one after the other.
        weights (`torch.Tensor` of shape `(functions,)`): Their weights.
        initial_rewards (`torch.Tensor` of shape `(samples,)`):
            Weighted reward of the image that each sample set out to fix. NaN where there is none.
        num_generations (`int`): Size of a group.
        rectification (`str`, *optional*, defaults to `"minimum"`):
            `"minimum"` gives such a sample the rewards of the worst of its group, `"initial"` scales its own to the initial
            image's, `"off"` leaves them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Rewards, and which samples are false positives.
    """
    total = weighted_sum(rewards, weights)
    is_false = total <= initial_rewards
    if rectification == "off" or not is_false.any():
        return rewards, is_false
    if rectification == "initial":
        # The columns' shares of the total do not matter, so the first one carries the difference.
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
    Group-relative advantages of some of the reward functions, as [`~trl.GRPOTrainer`] computes them of all.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): NaN where a function gave none.
        weights (`torch.Tensor` of shape `(functions,)`): Weights of the functions.
        num_generations (`int`): Size of a group.
        scale_rewards, multi_objective_aggregation (`str`): As in [`~trl.GRPOConfig`].

    Returns:
        `torch.Tensor` of shape `(samples,)`: 0 where nothing was scored.
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
