# SPDX-License-Identifier: Apache-2.0

"""Trajectories with fewer trained steps each, so that one packed forward holds fewer noised copies of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alphagrpo_ext.objectives.base import ImageScores
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory


def window_parts(trajectories: Sequence[Trajectory], steps_per_part: int | None) -> list[list[Trajectory]]:
    """
    Split the trained steps of all images over several batches of the same trajectories.

    The first part scores the sampled texts; in the others they are context. So the losses of the parts, weighted by
    their number of steps, sum to the loss of the whole.

    Args:
        trajectories (`Sequence[Trajectory]`): A batch, the windows of which have one number of steps.
        steps_per_part (`int`, *optional*): Most steps a part; `None` does not split.

    Returns:
        `list[list[Trajectory]]`: The parts, in the order of their steps. Tensors are views of the originals.
    """
    num_steps = {image.window.num_steps for t in trajectories for image in t.sampled_images if image.window}
    # Windows of several lengths are an error, which the scores of the whole batch raise.
    if steps_per_part is None or len(num_steps) != 1 or max(num_steps) <= steps_per_part:
        return [list(trajectories)]
    return [
        [_narrowed(trajectory, start, start + steps_per_part) for trajectory in trajectories]
        for start in range(0, num_steps.pop(), steps_per_part)
    ]


def join_parts(parts: Sequence[ImageScores | None]) -> ImageScores | None:
    """The scores of a whole batch from those of its [`window_parts`], in their order."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    by_step = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("velocities", "latents", "next_latents", "t", "t_next")
    }
    return replace(parts[0], **by_step)


def _narrowed(trajectory: Trajectory, start: int, stop: int) -> Trajectory:
    def narrow(segment: Segment) -> Segment:
        if isinstance(segment, ImageSegment):
            return replace(segment, window=_steps(segment.window, start, stop)) if segment.window else segment
        return TextSegment(segment.content_ids, role=segment.role) if segment.sampled and start else segment

    return Trajectory([narrow(segment) for segment in trajectory.segments])


def _steps(window: DenoisingWindow, start: int, stop: int) -> DenoisingWindow:
    return DenoisingWindow(
        latents=window.latents[start : stop + 1],
        timesteps=window.timesteps[start : stop + 1],
        start=window.start + start,
        log_probs=window.log_probs[start:stop],
    )
