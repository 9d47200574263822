# SPDX-License-Identifier: Apache-2.0

"""
Schedules of the denoising path, and the window of steps that is stochastic and trained.

The number of solver steps outside the window can differ from the schedule's. It is shared out to the stretches before
and after the window in proportion to their lengths, so the number of network evaluations does not depend on where the
window lies. The window's own times are always those of the schedule.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphagrpo_ext.ranges import check_number


def flow_timesteps(num_timesteps: int, shift: float = 1.0, device: torch.device | str | None = None) -> torch.Tensor:
    """
    Times of the states of a denoising path: `linspace(1, 0, N)`, shifted by `t <- s t / (1 + (s - 1) t)`.

    As in BAGEL, `num_timesteps` counts points: a path of N points has N - 1 steps, with one model evaluation each.

    Args:
        num_timesteps (`int`): Number of points N, at least 2.
        shift (`float`, *optional*, defaults to `1.0`): Positive shift s. Above 1, more steps are near the noise.
        device (`torch.device` or `str`, *optional*): Where to put the result.

    Returns:
        `torch.Tensor` of shape `(num_timesteps,)`: fp32, strictly falling from exactly 1 to exactly 0.

    Raises:
        `ValueError`: If an argument is out of range.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, the two ends of the path, but is {num_timesteps}")
    check_number("shift", shift, "(0, inf)")
    timesteps = torch.linspace(1, 0, num_timesteps, dtype=torch.float32)
    timesteps = shift * timesteps / (1 + (shift - 1) * timesteps)
    # For some shifts, rounding gives 1 - 2^-24, and 1 / (1 - t) would be huge.
    timesteps[0] = 1
    return timesteps.to(device)


def first_step(timesteps: torch.Tensor, strength: float) -> int:
    """
    Index of the first time that is not above `strength`, up to rounding. A path that starts from a partly noised image begins
    there.

    Args:
        timesteps (`torch.Tensor` of shape `(num_timesteps,)`): From [`flow_timesteps`].
        strength (`float`): In (0, 1].

    Raises:
        `ValueError`: If that time is the last one, 0, so that no step is left.
    """
    first = int((timesteps > strength + 1e-6).sum())
    if first >= len(timesteps) - 1:
        raise ValueError(
            f"{strength} is below {timesteps[-2].item():.3g}, the time of the last of {len(timesteps) - 1} steps, so nothing "
            f"would be painted"
        )
    return first


def share_steps(num_steps: int, lengths: Sequence[int]) -> list[int]:
    """
    Share out solver steps to the deterministic stretches of a path in proportion to their lengths, with at least one
    step for each stretch that is not empty.

    Args:
        num_steps (`int`): Steps in total.
        lengths (`Sequence[int]`):
            Steps of the schedule before and after the stochastic window. Without a window, the second is 0.

    Returns:
        `list[int]`: Solver steps of the two stretches, which add up to `num_steps`.

    Raises:
        `ValueError`: If there are fewer steps than stretches, or no stretch.
    """
    before, after = lengths
    least = (before > 0) + (after > 0)
    if num_steps < max(least, 1):
        raise ValueError(f"{num_steps} steps are too few for the {least} stretches outside the window, one for each")
    if not least:
        raise ValueError(f"{num_steps} steps outside the window have no place: the window is the whole path")
    if least == 1:
        return [num_steps, 0] if before else [0, num_steps]
    steps_before = min(max(round(num_steps * before / (before + after)), 1), num_steps - 1)
    return [steps_before, num_steps - steps_before]


def stretch_timesteps(first: torch.Tensor, last: torch.Tensor, num_steps: int, shift: float = 1.0) -> torch.Tensor:
    """
    Times of a stretch of a path, evenly spaced before the shift as in [`flow_timesteps`].

    Args:
        first, last (`torch.Tensor` of shape `()`): First and last time, `1 >= first > last >= 0`.
        num_steps (`int`): Number of steps, at least 1.
        shift (`float`, *optional*, defaults to `1.0`): Positive shift s of the whole path.

    Returns:
        `torch.Tensor` of shape `(num_steps + 1,)`: fp32, strictly falling, from exactly `first` to exactly `last`.
    """
    unshifted = [t / (shift - (shift - 1) * t) for t in (first.item(), last.item())]
    timesteps = torch.linspace(*unshifted, num_steps + 1, dtype=torch.float32, device=first.device)
    timesteps = shift * timesteps / (1 + (shift - 1) * timesteps)
    # Rounding must not move the ends.
    timesteps[0], timesteps[-1] = first, last
    return timesteps


@dataclass(frozen=True)
class DenoisingPath:
    """
    The states that a sample passes through.

    Args:
        timesteps (`torch.Tensor` of shape `(states,)`): Their times, fp32, falling from 1 to 0. A path from a partly noised image begins below 1.
        window (`range`):
            Indices of the stochastic steps; step `k` leads from `timesteps[k]` to `timesteps[k + 1]`. Empty for a
            deterministic path.
    """

    timesteps: torch.Tensor
    window: range


def denoising_path(
    schedule: torch.Tensor, window: range = range(0), ode_steps: int | None = None, shift: float = 1.0
) -> DenoisingPath:
    """
    The path along a schedule, with another number of steps outside the stochastic window if asked for.

    Args:
        schedule (`torch.Tensor` of shape `(num_timesteps,)`): From [`flow_timesteps`].
        window (`range`, *optional*): Steps of the schedule that are stochastic.
        ode_steps (`int`, *optional*):
            Steps outside the window, shared out by [`share_steps`]. `None` keeps the schedule.
        shift (`float`, *optional*, defaults to `1.0`): Shift of the schedule.

    Raises:
        `ValueError`: If `ode_steps` are too few.
    """
    if ode_steps is None:
        return DenoisingPath(schedule, window)
    start, stop = (window.start, window.stop) if window else (len(schedule) - 1,) * 2
    before, after = share_steps(ode_steps, (start, len(schedule) - 1 - stop))
    parts = [schedule[start : stop + 1]]
    if before:
        parts.insert(0, stretch_timesteps(schedule[0], schedule[start], before, shift)[:-1])
    if after:
        parts.append(stretch_timesteps(schedule[stop], schedule[-1], after, shift)[1:])
    return DenoisingPath(torch.cat(parts), range(before, before + len(window)))


def draw_window(window_size: int, window_range: tuple[int, int], num_steps: int, seed: int, step: int) -> range:
    """
    Draw the consecutive denoising steps that are stochastic and trained. The others are deterministic.

    The draw is uniform over all windows inside the range and the path. It depends on `(seed, step)` alone, so all
    ranks and all members of a group have the same window, and it changes between training steps.

    Args:
        window_size (`int`): Number K of steps, at least 1.
        window_range (`tuple[int, int]`):
            First step that may be in the window, and the step after the last one that may. May reach beyond the path.
        num_steps (`int`): Number of steps of the path, one less than its points.
        seed (`int`): Seed of the run.
        step (`int`): Index of the rollout batch.

    Returns:
        `range`: Indices of the K steps; step `k` leads from `timesteps[k]` to `timesteps[k + 1]`.

    Raises:
        `ValueError`: If no window of that size fits.
    """
    starts = window_starts(window_size, window_range, num_steps)
    # A string seed is hashed with SHA-512: the same in every process, and unrelated for neighbouring steps.
    start = random.Random(f"{seed}-{step}").randint(starts[0], starts[-1])
    return range(start, start + window_size)


def window_starts(window_size: int, window_range: tuple[int, int], num_steps: int) -> range:
    """All first steps that [`draw_window`] can draw. See there for the arguments and errors."""
    low, high = window_range
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, but is {window_size}")
    if low < 0:
        raise ValueError(f"window_range must not start below 0, but is {window_range}")
    if window_size > high - low:
        raise ValueError(f"window_size {window_size} is larger than window_range {window_range}")
    if low + window_size > num_steps:
        raise ValueError(
            f"window_size {window_size} within window_range {window_range} does not fit into num_steps {num_steps}"
        )
    return range(low, min(high, num_steps) - window_size + 1)
