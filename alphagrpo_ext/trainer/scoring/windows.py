# SPDX-License-Identifier: Apache-2.0

"""Windows of a batch of trajectories: how many there are, parts of their steps, and a stand-in where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.objectives.base import ImageScores
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory


def num_windows(trajectory: Trajectory) -> int:
    """Number of sampled images that are trained on."""
    return sum(image.window is not None for image in trajectory.sampled_images)


def num_window_steps(trajectories: Sequence[Trajectory]) -> int:
    """Steps of the windows of a batch, or of the stand-in of one without images."""
    windows = [image.window for t in trajectories for image in t.sampled_images if image.window is not None]
    return windows[0].num_steps if windows else trajectories[0].num_trained_steps


def with_stand_in(trajectories: Sequence[Trajectory], model: UnifiedModel) -> list[Trajectory]:
    """
    A batch with a stand-in for an image where no trajectory painted one, although images of the task are trained on. It is sampled after the
    first trajectory, has a single token, and needs no context of its own. Its velocities have no meaning.

    Args:
        trajectories (`Sequence[Trajectory]`): The batch.
        model ([`UnifiedModel`]): The policy or the reference, unwrapped.
    """
    first, *others = trajectories
    num_steps = first.num_trained_steps
    if not num_steps or any(map(num_windows, trajectories)):
        return list(trajectories)
    states = torch.zeros(num_steps + 1, 1, model.latent_channels)
    times = torch.linspace(0.75, 0.25, num_steps + 1)
    image = ImageSegment(
        states[0],
        (1, 1),
        sampled=True,
        window=DenoisingWindow(states, times, start=0, log_probs=torch.zeros(num_steps)),
        guidance_contexts={name: [] for name in model.branches[1:]},
    )
    return [replace(first, segments=[*first.segments, image]), *others]


def split_window_steps(trajectories: Sequence[Trajectory], steps_per_part: int | None) -> list[list[Trajectory]]:
    """
    Split the trained steps of all images over several batches of the same trajectories.

    The first part scores the sampled texts; in the others they are context. So the losses of the parts, weighted by
    their number of steps, sum to the loss of the whole.

    Args:
        trajectories (`Sequence[Trajectory]`): A batch whose windows all have the same number of steps.
        steps_per_part (`int`, *optional*): Largest number of steps per part; `None` does not split.

    Returns:
        `list[list[Trajectory]]`: The parts in the order of their steps. Tensors are views of the originals.
    """
    num_steps = {image.window.num_steps for t in trajectories for image in t.sampled_images if image.window}
    # Windows of several lengths are an error, which the scores of the whole batch raise.
    if steps_per_part is None or len(num_steps) != 1 or max(num_steps) <= steps_per_part:
        return [list(trajectories)]
    return [
        [_with_window_steps(trajectory, start, start + steps_per_part) for trajectory in trajectories]
        for start in range(0, num_steps.pop(), steps_per_part)
    ]


def join_window_steps(parts: Sequence[ImageScores | None]) -> ImageScores | None:
    """The scores of a whole batch from those of the parts that [`split_window_steps`] made, in their order."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    by_step = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("velocities", "latents", "next_latents", "t", "t_next")
    }
    return replace(parts[0], **by_step)


def _with_window_steps(trajectory: Trajectory, start: int, stop: int) -> Trajectory:
    def narrow(segment: Segment) -> Segment:
        if isinstance(segment, ImageSegment):
            window = segment.window and _narrowed_window(segment.window, start, stop)
            return replace(segment, window=window) if window else segment
        return TextSegment(segment.content_ids, role=segment.role) if segment.sampled and start else segment

    return replace(trajectory, segments=[narrow(segment) for segment in trajectory.segments])


def _narrowed_window(window: DenoisingWindow, start: int, stop: int) -> DenoisingWindow:
    return DenoisingWindow(
        latents=window.latents[start : stop + 1],
        timesteps=window.timesteps[start : stop + 1],
        start=window.start + start,
        log_probs=window.log_probs[start:stop],
    )
