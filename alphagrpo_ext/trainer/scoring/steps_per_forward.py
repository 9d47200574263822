# SPDX-License-Identifier: Apache-2.0

"""How many trained steps go into one forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.models.work import balanced_steps, min_forward_tokens
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.config import AlphaGRPOConfig


def resolve_steps_per_forward(
    args: AlphaGRPOConfig, model: UnifiedModel, tasks: Mapping[str, Task], can_split: bool
) -> int | None:
    """
    The number of trained steps per forward that `image_steps_per_forward` stands for. `"auto"` goes by [`balanced_steps`] for the
    task that paints the most tokens. It depends on the configuration alone, so that all processes run as many forwards.

    Args:
        args ([`AlphaGRPOConfig`]): Settings of every task, and the trajectories of a micro-batch.
        model ([`UnifiedModel`]): The policy, unwrapped, with whole parameters.
        tasks (`Mapping[str, Task]`): The tasks that are trained, by name.
        can_split (`bool`): Whether several forwards have the right gradient and share contexts. If not, `"auto"` takes all steps.

    Returns:
        `int` or `None`: `None` does not split.
    """
    given = args.image_steps_per_forward
    if isinstance(given, int):
        return given
    # A family without parts of its own runs contexts with every forward.
    if given == "all" or not can_split or type(model).pack_parts is UnifiedModel.pack_parts:
        return None
    tokens_per_trajectory = [0]
    for name, task in tasks.items():
        # The size of images that are never painted need not be one that the model can paint.
        if task.can_paint:
            settings = args.for_task(name)
            rows, columns = model.latent_grid(settings.image_height, settings.image_width)
            num_branches = len(model.guidance(settings.objective_guidance.effective).branches)
            tokens_per_trajectory.append(task.num_turns * num_branches * rows * columns)
    tokens_per_step = args.per_device_train_batch_size * max(tokens_per_trajectory)
    min_tokens = min_forward_tokens(computes_in_fp32(model, args), trains_adapters(model))
    steps = balanced_steps(args.sde_window_size, tokens_per_step, model.num_generation_weights, min_tokens)
    return steps if steps < args.sde_window_size else None


def computes_in_fp32(model: UnifiedModel, args: AlphaGRPOConfig) -> bool:
    """Whether a run computes in fp32: its weights are in fp32, and there is no autocast."""
    return model.dtype == torch.float32 and not args.bf16 and not args.fp16


def trains_adapters(model: UnifiedModel) -> bool:
    """Whether few weights are trained: less than half as many as every noised token is multiplied with."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 2 * num_trained < model.num_generation_weights
