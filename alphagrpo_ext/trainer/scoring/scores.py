# SPDX-License-Identifier: Apache-2.0

"""Scores of a batch, and of a whole rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.objectives.base import ImageScores


@dataclass
class PackedScores:
    """
    What one policy makes of a batch of trajectories.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(trajectories, longest text)`):
            Scores of sampled tokens; 0 on padding.
        images ([`ImageScores`], *optional*): Scores of the sampled images. `None` if no image has a window.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    images: ImageScores | None


@dataclass
class RolloutScores:
    """
    What a policy that is not trained makes of all trajectories of a rollout. Images are kept as velocities and not as
    log-probabilities, so that every objective finds what it needs.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(trajectories, longest text)`):
            Scores of sampled tokens; 0 on padding.
        velocities (`list[torch.Tensor]`, *optional*):
            Guided velocities `(images of the trajectory, steps, tokens, channels)` of each trajectory, as a list, so that
            TRL shuffles and splits it. `None` if no image has a window, or would have one.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    velocities: list[torch.Tensor] | None


def pad_columns(scores: torch.Tensor, length: int) -> torch.Tensor:
    """`(trajectories, tokens)` to `(trajectories, length)`, with zeros on the right."""
    return torch.nn.functional.pad(scores, (0, length - scores.shape[1]))


def velocities_by_trajectory(
    batches: Sequence[ImageScores], num_images: Sequence[int], batch_size: int
) -> list[torch.Tensor]:
    """
    Velocities `(images of the trajectory, steps, tokens, channels)` of each trajectory.

    Args:
        batches (`Sequence[ImageScores]`): Scores of batches of trajectories. Those of a batch without images are a stand-in's.
        num_images (`Sequence[int]`): Images with a window of every trajectory.
        batch_size (`int`): Trajectories per batch.
    """
    result: list[torch.Tensor] = []
    for index, scores in enumerate(batches):
        counts = num_images[index * batch_size : (index + 1) * batch_size]
        result += scores.velocities[: sum(counts)].split(list(counts))
    return result
