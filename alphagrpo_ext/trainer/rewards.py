# SPDX-License-Identifier: Apache-2.0

"""
From rewards to advantages: what TRL's group advantages do not know of images, reflection and formats.

Rectification replaces rewards, not advantages, so that TRL's own normalisation follows. `rewards/<function>/mean` shows
rewards after it, `reflection/final_reward` before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import nanstd

from alphagrpo_ext.report.answers import strict_passes
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.reward_functions import reward_attribute, reward_name


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


def missing_rewards(rewards: torch.Tensor, always: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Rewards that a function owes. A function that gave none to a whole group does not apply to its prompt, as in TRL, unless it
    says that it applies always. One that gave some of a group a reward failed for the others.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): NaN where a function gave none.
        always (`torch.Tensor` of shape `(functions,)` or `(samples, functions)`):
            Functions that apply to every sample, or to which samples they do, bool.
        num_generations (`int`): Samples per group.

    Returns:
        `torch.Tensor` of shape `(samples, functions)`: True where a reward is missing.
    """
    given = ~rewards.isnan()
    groups = given.unflatten(0, (-1, num_generations))
    applies = groups.any(dim=1, keepdim=True).expand_as(groups).reshape_as(given) | always
    return applies & ~given


def complete_sum(rewards: torch.Tensor, weights: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Weighted sum `(samples,)` in fp64 of `(samples, functions)` rewards. It is NaN where a reward is missing, see
    [`missing_rewards`], since a part of a sum cannot be compared with a whole one. Functions with a weight of 0 do not count.
    """
    counted = weights != 0
    missing = missing_rewards(rewards, torch.zeros_like(counted), num_generations) & counted
    total = (rewards.double() * weights.double()).nansum(dim=1)
    return total.masked_fill(missing.any(dim=1) | rewards.isnan().all(dim=1), torch.nan)


def rectify_false_positives(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    initial_rewards: torch.Tensor,
    num_generations: int,
    rectification: str = "minimum",
    is_kept: torch.Tensor | None = None,
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
        is_kept (`torch.Tensor` of shape `(samples,)`, *optional*):
            Samples that ended without painting, bool. They claim no improvement and are never false positives.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Rewards `(samples, functions)`, and which samples are false positives, bool
        `(samples,)`. A sample with a missing reward is none.
    """
    # In the precision of the initial rewards, so that equal rewards are equal.
    total = complete_sum(rewards, weights, num_generations).to(initial_rewards.dtype)
    is_false = total <= initial_rewards
    if is_kept is not None:
        is_false = is_false & ~is_kept
    if rectification == "off" or not is_false.any() or not weights.any():
        return rewards, is_false
    if rectification == "initial":
        # Only the sum over functions matters, so the first one that counts carries the difference.
        counted = ~rewards.isnan() & (weights != 0)
        first = torch.nn.functional.one_hot(counted.int().argmax(dim=1), len(weights)).bool() & counted
        share = ((initial_rewards - total)[:, None] / weights).to(rewards.dtype)
        return torch.where(is_false[:, None] & first, rewards + share, rewards), is_false
    groups = total.view(-1, num_generations)
    worst = torch.where(torch.isnan(groups), torch.inf, groups).argmin(dim=1)
    worst = worst + torch.arange(len(groups), device=worst.device) * num_generations
    return torch.where(is_false[:, None], rewards[worst.repeat_interleave(num_generations)], rewards), is_false


def _deviations(grouped: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """
    Deviations from the mean of each group, dimension 1, without NaN. Those that are no larger than the rounding of rewards in fp32
    are 0. `sizes` has the same shape, and for a sum the sum of the sizes of its terms, since terms can cancel and their rounding
    does not.
    """
    deviations = grouped - grouped.nanmean(dim=1, keepdim=True)
    rounding = 4 * torch.finfo(torch.float32).eps * sizes.nan_to_num().amax(dim=1, keepdim=True)
    return torch.where(deviations.abs() <= rounding, 0.0, deviations)


def group_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    scale_rewards: str = "batch",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """
    Group-relative advantages from some of the reward functions, computed as [`~trl.GRPOTrainer`] does from all of them, but in
    fp64: the mean of equal rewards is then that reward, and no rounding is divided by a standard deviation near 0.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): NaN where a function gave none.
        weights (`torch.Tensor` of shape `(functions,)`): Weights of the functions.
        num_generations (`int`): Samples per group.
        scale_rewards, multi_objective_aggregation (`str`): As in [`~trl.GRPOConfig`].

    Returns:
        `torch.Tensor` of shape `(samples,)`: In the type of the rewards, 0 where a reward is missing.
    """
    total = complete_sum(rewards, weights, num_generations)
    if multi_objective_aggregation == "normalize_then_sum":
        columns = rewards.double().masked_fill(total.isnan()[:, None], torch.nan)
        grouped = columns.view(-1, num_generations, columns.shape[1])
        normalized = _deviations(grouped, grouped.abs()) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        total = (normalized.view_as(columns) * weights.double()).nansum(dim=1).masked_fill(total.isnan(), torch.nan)
        advantages = (total - total.nanmean()) / (nanstd(total) + 1e-4)
        return torch.nan_to_num(advantages, nan=0.0).to(rewards.dtype)
    grouped = total.view(-1, num_generations)
    sizes = (rewards.double() * weights.double()).abs().nansum(dim=1).view_as(grouped)
    advantages = _deviations(grouped, sizes)
    if scale_rewards == "group":
        advantages = advantages / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(total) + 1e-4)
    return torch.nan_to_num(advantages.flatten(), nan=0.0).to(rewards.dtype)


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


def strict_pass_metrics(
    step: RolloutStep, columns: Mapping[str, Sequence[Any]], tasks: Mapping[str, Task], accelerator: Accelerator
) -> dict[str, float]:
    """
    What [`stop_metrics`] makes of a rollout, if a task refines images.

    Args:
        step ([`RolloutStep`]): Its trajectories are sampled.
        columns (`Mapping[str, Sequence[Any]]`): TRL's columns of all processes, which end with those of this rollout.
        tasks (`Mapping[str, Task]`): The tasks of the rows by name.
        accelerator ([`~accelerate.Accelerator`]): Gathers what is known of this process alone.
    """
    if not any(task.paints_initial_image for task in tasks.values()):
        return {}
    device, names = accelerator.device, [row["task"] for row in step.rows]
    refines = torch.tensor([tasks[name].paints_initial_image for name in names], device=device)
    painted = torch.tensor([bool(t.sampled_images) for t in step.trajectories], device=device)
    own = torch.stack([refines.float(), painted.float(), step.initial_passes.to(device)], dim=1)
    refines, painted, initial = accelerator.gather(own).T
    final = torch.tensor(strict_passes(columns, len(initial)), device=device)
    chosen = refines.bool()
    metrics = stop_metrics(~painted.bool()[chosen], initial[chosen], final[chosen])
    if not any(task.allow_stop for task in tasks.values()):
        metrics.pop("reflection/stop_frac", None)
    return metrics


def stop_metrics(is_kept: torch.Tensor, initial_passes: torch.Tensor, final_passes: torch.Tensor) -> dict[str, float]:
    """
    What is logged about turns that end without painting, and about images that repaints fix and break.

    Args:
        is_kept (`torch.Tensor` of shape `(samples,)`): Samples that ended without painting, bool.
        initial_passes, final_passes (`torch.Tensor` of shape `(samples,)`):
            Whether the image that a sample started from, and its last one, pass strictly: 0, 1, or NaN if that is not known.

    Returns:
        `dict[str, float]`: The share of samples that keep their image; of those, the share whose image passes; of the samples
        whose first image failed, the share whose last one passes; and of those whose first image passed, the share whose last
        one fails. A share of no samples is left out.
    """
    final_passes = torch.where(is_kept & ~initial_passes.isnan(), initial_passes, final_passes)
    known = ~initial_passes.isnan() & ~final_passes.isnan()
    values = {
        "stop_frac": (is_kept, torch.ones_like(is_kept)),
        "stop_right_frac": (final_passes, is_kept & ~final_passes.isnan()),
        "fixed_frac": (final_passes, known & (initial_passes == 0)),
        "broken_frac": (1 - final_passes, known & (initial_passes == 1)),
    }
    return {
        f"reflection/{name}": value[counted].float().mean().item()
        for name, (value, counted) in values.items()
        if counted.any()
    }


def refuse_infinite(rewards: torch.Tensor, names: Sequence[str]) -> None:
    """
    Raise `ValueError` if a reward is infinite.

    Args:
        rewards (`torch.Tensor` of shape `(samples, functions)`): What the functions gave; NaN is no reward.
        names (`Sequence[str]`): Names of the functions.
    """
    if rewards.isinf().any():
        sample, function = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"the reward function '{names[function]}' returned {rewards[sample, function].item()} for sample {sample} of the "
            f"rollout: a reward must be a finite number, or None where there is none"
        )


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
    Set `image_rewards`, `is_false_positive` and, after rectification, `rewards` of a rollout.

    A sample with a missing reward is not trained on, neither its text nor its image: all its rewards become NaN, before
    anything is summed. A sample with an image needs the reward of at least one function that judges images. Such functions owe
    nothing to a sample without one, as that of a task that paints nothing, and those of texts nothing to a sample that wrote none.

    Args:
        step ([`RolloutStep`]): Its trajectories are sampled.
        rewards (`torch.Tensor` of shape `(samples of all processes, functions)`): What the functions gave.
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`):
            All functions and their weights. A function with a true attribute `always_applies` owes a reward to every sample with
            an image, if it judges images, and else to every one with a text; others owe none to a group of which they judged no
            sample.
        tasks (`Mapping[str, Task]`): The tasks of the rows by name.
        args ([`AlphaGRPOConfig`]): `rectification`, one of [`RECTIFICATIONS`].
        accelerator ([`~accelerate.Accelerator`]): Gathers what is known of this process alone.

    Returns:
        `dict[str, float]`: Metrics: the share of samples that are not trained on, the mean reward of every task if there are
        several, and those of [`reflection_metrics`].

    Raises:
        `ValueError`: If a reward is infinite.
    """
    refuse_infinite(rewards, [reward_name(function) for function in functions])
    device = rewards.device
    weights, is_image = weights.to(device), judges_images(functions).to(device)
    always = torch.tensor(
        [bool(reward_attribute(function, "always_applies", False)) for function in functions], device=device
    )
    painted = accelerator.gather(torch.tensor([bool(t.sampled_images) for t in step.trajectories], device=device))
    refines = any(task.paints_initial_image for task in tasks.values())
    if refines:
        initial = accelerator.gather(step.initial_scores.to(device))
        # The image that a sample keeps was judged with the initial images.
        is_judged = ~painted[:, None] & ~initial.isnan()
        rewards = rewards.clone()
        rewards[:, is_image] = torch.where(is_judged, initial, rewards[:, is_image])
    made = [[t.result is not None, bool(t.sampled_texts)] for t in step.trajectories]
    has_image, has_text = accelerator.gather(torch.tensor(made, device=device)).T
    owed = always & torch.where(is_image, has_image[:, None], has_text[:, None])
    is_missing = missing_rewards(rewards, owed, step.group_size) & (weights != 0)
    needed = is_image & (weights != 0)
    is_unjudged = has_image & needed.any() & rewards[:, needed].isnan().all(dim=1)
    is_left_out = is_missing.any(dim=1) | is_unjudged
    metrics = {"rewards/missing_frac": is_left_out.float().mean().item()}
    step.rewards = rewards.masked_fill(is_left_out[:, None], torch.nan)
    images, image_weights = step.rewards[:, is_image], weights[is_image]
    totals = complete_sum(step.rewards, weights, step.group_size)
    image_totals = complete_sum(images, image_weights, step.group_size)
    step.image_rewards = torch.where(has_image, image_totals, totals).to(rewards.dtype)
    step.is_false_positive = torch.zeros(len(rewards), dtype=torch.bool, device=device)
    step.initial_rewards = torch.full_like(step.image_rewards, torch.nan)
    if len(tasks) > 1:
        names = gather_object([row["task"] for row in step.rows])
        metrics |= {f"rewards/{task}": value for task, value in mean_by_name(step.image_rewards, names).items()}
    if refines:
        # What a function does not judge in the refined images, it does not count for in the initial one.
        is_uncounted = (rewards[:, is_image].isnan() & ~is_missing[:, is_image]) | (image_weights == 0)
        initial = (initial.double() * image_weights.double()).masked_fill(is_uncounted, 0.0).sum(dim=1)
        # Where no reward of images counts, there is nothing by which an image could be better than another.
        step.initial_rewards = initial.masked_fill(~has_image | ~needed.any(), torch.nan).to(rewards.dtype)
        rectified, is_false = rectify_false_positives(
            images, image_weights, step.initial_rewards, step.group_size, args.rectification, ~painted
        )
        step.is_false_positive = is_false if args.rectification != "off" else torch.zeros_like(is_false)
        metrics |= reflection_metrics(step.initial_rewards, step.image_rewards, step.is_false_positive)
        step.rewards = step.rewards.clone()
        step.rewards[:, is_image] = rectified
    return metrics


def joint_advantages(
    step: RolloutStep,
    output: Mapping[str, torch.Tensor],
    functions: Sequence[Callable],
    weights: torch.Tensor,
    args: AlphaGRPOConfig,
) -> dict[str, torch.Tensor]:
    """
    Advantages of texts, which are TRL's but for rounding, and of images, which leave rewards of text alone out. Set
    `image_advantages` of the step.

    A false positive that is rectified has no positive advantage, neither its text for a good format nor its image for one of
    several rewards. The thought that several images share is one action: its advantage is the mean of theirs.

    Args:
        step ([`RolloutStep`]): Its rewards are rectified.
        output (`Mapping[str, torch.Tensor]`):
            What the loss is computed from: TRL's `advantages` `(samples of this process,)`, which count all rewards, and
            `tool_mask` `(samples of this process, tokens)`, 0 for tokens that are not trained on.
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`): All functions and their weights.
        args ([`AlphaGRPOConfig`]): `separate_advantages`, `mask_broken_format`, and TRL's settings of advantages.

    Returns:
        `dict[str, torch.Tensor]`: What replaces or joins `output`: `advantages` of texts, `(samples,)`, or `(samples, tokens)` if
        thoughts are shared and more texts follow them; `image_advantages` `(samples,)`; `is_scored` `(samples,)`, bool; and
        `tool_mask`, 0 in samples that are not scored, so that not even a KL moves the policy by them.
    """
    advantages = output["advantages"]
    is_image, weights = judges_images(functions).to(advantages.device), weights.to(advantages.device)
    settings = (step.group_size, args.scale_rewards, args.multi_objective_aggregation)
    exact = group_advantages(step.rewards, weights, *settings)[step.local]
    # TRL divides the rounding of equal rewards, in fp32, by a standard deviation of 1e-4.
    is_close = torch.isclose(advantages, exact, rtol=1e-3, atol=1e-5) & (exact != 0)
    text = image = torch.where(is_close, advantages, exact)
    if args.separate_advantages and not is_image.all():
        image = group_advantages(step.rewards[:, is_image], weights[is_image], *settings)[step.local]
    if args.mask_broken_format:
        is_broken = (step.rewards[step.local][:, ~is_image] < 0.5).any(dim=1)
        image = image.masked_fill(is_broken, 0.0)
    is_false = step.is_false_positive[step.local]
    text, image = (torch.where(is_false, values.clamp(max=0.0), values) for values in (text, image))
    step.image_advantages, is_scored = image, step.is_scored
    return {
        "advantages": share_advantages(text, step, output["tool_mask"].shape[1]),
        "image_advantages": image,
        "is_scored": is_scored,
        "tool_mask": output["tool_mask"] * is_scored[:, None],
    }


def share_advantages(advantages: torch.Tensor, step: RolloutStep, num_tokens: int) -> torch.Tensor:
    """
    Give the texts of samples that share a thought the mean advantage of these samples, as far as they share it.

    Args:
        advantages (`torch.Tensor` of shape `(samples of this process,)`): One per sample.
        step ([`RolloutStep`]): `branches_per_thought` consecutive samples share their first text.
        num_tokens (`int`): Length that TRL padded the texts of a sample to.

    Returns:
        `torch.Tensor`: `(samples,)`, or `(samples, tokens)` if a sample has more than one text. Samples without a reward keep 0
        and do not count.
    """
    # A setting of the run, the same for every task.
    num_branches = next(iter(step.configs.values())).branches_per_thought
    if num_branches == 1:
        return advantages
    has_reward = step.is_scored
    branches = advantages.masked_fill(~has_reward, torch.nan).view(-1, num_branches)
    shared = branches.nanmean(dim=1, keepdim=True).expand_as(branches).flatten()
    shared = torch.where(has_reward, shared, 0.0)
    if all(len(trajectory.sampled_texts) <= 1 for trajectory in step.trajectories):
        return shared
    lengths = [[len(text.token_ids) for text in trajectory.sampled_texts] for trajectory in step.trajectories]
    tokens = torch.arange(num_tokens, device=advantages.device)
    is_first = tokens < torch.tensor([sum(row[:1]) for row in lengths], device=advantages.device)[:, None]
    return torch.where(is_first, shared[:, None], advantages[:, None])
