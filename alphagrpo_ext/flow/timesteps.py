# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Schedules of the denoising path, and the window of it that is trained."""

import random

import torch


def flow_timesteps(num_timesteps: int, shift: float = 1.0, device: torch.device | str | None = None) -> torch.Tensor:
    """
    Times of the states of a denoising path: `linspace(1, 0, N)`, shifted by `t <- s t / (1 + (s - 1) t)`.

    As in BAGEL, `num_timesteps` counts points: a path of N points has N - 1 steps, and so N - 1 model evaluations.

    Args:
        num_timesteps (`int`):
            Number of points N, at least 2.
        shift (`float`, *optional*, defaults to `1.0`):
            Positive shift s. Above 1 it spends more of the steps near the noise.
        device (`torch.device` or `str`, *optional*):
            Where to put the result.

    Returns:
        `torch.Tensor` of shape `(num_timesteps,)`: fp32, strictly falling from exactly 1 to exactly 0.

    Raises:
        `ValueError`: If an argument is out of range.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, the two ends of the path, but is {num_timesteps}")
    if shift <= 0:
        raise ValueError(f"shift must be positive, but is {shift}")
    timesteps = torch.linspace(1, 0, num_timesteps, dtype=torch.float32)
    timesteps = shift * timesteps / (1 + (shift - 1) * timesteps)
    # Rounding leaves 1 - 2^-24 for some shifts, where 1 / (1 - t) would explode.
    timesteps[0] = 1
    return timesteps.to(device)


def draw_window(window_size: int, window_range: tuple[int, int], num_steps: int, seed: int, step: int) -> range:
    """
    Draw the consecutive denoising steps that are stochastic and trained; the others are deterministic.

    The draw is uniform over all windows that lie inside the range and the path. It depends on `(seed, step)` alone, so
    every rank and every member of a group gets the same window, and each training step another one.

    Args:
        window_size (`int`):
            Number K of steps, at least 1.
        window_range (`tuple[int, int]`):
            First step that may be in the window, and the step after the last one that may. May reach beyond the path.
        num_steps (`int`):
            Number of steps of the path, one less than its points.
        seed (`int`):
            Seed of the run.
        step (`int`):
            Index of the rollout batch.

    Returns:
        `range`: Indices of the K steps; step `k` leads from `timesteps[k]` to `timesteps[k + 1]`.

    Raises:
        `ValueError`: If no window of that size fits.
    """
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
    # A string seed is hashed with SHA-512: the same in every process, and unrelated for neighbouring steps.
    start = random.Random(f"{seed}-{step}").randint(low, min(high, num_steps) - window_size)
    return range(start, start + window_size)
