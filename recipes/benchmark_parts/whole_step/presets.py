# SPDX-License-Identifier: Apache-2.0

"""Whole training steps under the presets of sampling."""

from __future__ import annotations

from collections.abc import Callable

from alphagrpo_ext.rollout.presets import PRESETS
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from benchmark_parts.sizes import Size
from benchmark_parts.whole_step.trainers import WholeStep, make_step_trainer


MIN_GROUP_SIZE = 4
"""Fewest samples of a group in which `fast` shares thoughts."""


def reflection_trainers(
    size: Size, reward: Callable[..., list[float]], output_dir: str, bf16: bool
) -> dict[str, AlphaGRPOTrainer]:
    """
    Trainers of self-reflection by preset, for one step on one group each: 40 points of which 5 steps are trained, and one initial
    image for every two samples, as in the paper.

    Args:
        size ([`Size`]): Model, lengths of texts, and number of samples.
        reward (`Callable`): Reward function.
        output_dir (`str`): Output directory of the trainers, in which they write nothing.
        bf16 (`bool`): Whether to train under autocast.
    """
    group_size = max(size.num_trajectories, MIN_GROUP_SIZE)
    step = WholeStep("self_reflection", group_size, group_size)
    return {preset: make_step_trainer(step, size, reward, output_dir, bf16, {"preset": preset}) for preset in PRESETS}


def evaluations_per_image(trainer: AlphaGRPOTrainer) -> int:
    """Evaluations of the network that a training rollout takes for an image, which branches share in part."""
    return len(trainer.args.train_rollout(0).denoising.path().timesteps) - 1
