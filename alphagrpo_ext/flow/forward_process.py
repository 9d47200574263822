# SPDX-License-Identifier: Apache-2.0

"""
The forward process: clean images with noise added, for objectives that train on it instead of the sampled path.

Times are drawn from the seed and the step of the run and shared by all images of a rollout batch. Advantages compare
the members of a group, and losses at different times would differ for reasons that have nothing to do with the reward.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.trajectory import DenoisingWindow


def noised_latents(clean_latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """
    Noised images `x_t = (1 - t) x_0 + t eps`.

    Args:
        clean_latents (`torch.Tensor` of shape `(..., tokens, channels)`): Clean latents x_0, broadcastable.
        noise (`torch.Tensor` of shape `(..., tokens, channels)`): Standard normal noise eps.
        t (`torch.Tensor` of shape `(...)`): Times in [0, 1].

    Returns:
        `torch.Tensor` of shape `(..., tokens, channels)`: fp32.
    """
    t = t.float()[..., None, None]
    return (1 - t) * clean_latents.float() + t * noise.float()


def draw_times(num_times: int, interval: tuple[float, float], shift: float, seed: int, step: int) -> torch.Tensor:
    """
    Draw one time in each of `num_times` equal parts of an interval, shifted by `t <- s t / (1 + (s - 1) t)`.

    The draw depends on `(seed, step)` alone, so it is equal on every rank and differs between training steps. Drawing
    from equal parts lowers the variance of the average over times.

    Args:
        num_times (`int`): Number of times, at least 1.
        interval (`tuple[float, float]`): Bounds before the shift, `0 <= low < high <= 1`.
        shift (`float`): Positive shift s.
        seed (`int`): Seed of the run.
        step (`int`): Index of the rollout batch.

    Returns:
        `torch.Tensor` of shape `(num_times,)`: fp32 in (0, 1], falling.

    Raises:
        `ValueError`: If an argument is out of range.
    """
    low, high = interval
    if num_times < 1:
        raise ValueError(f"num_times must be at least 1, but is {num_times}")
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval must be (low, high) with 0 <= low < high <= 1, but is {interval}")
    check_number("shift", shift, "(0, inf)")
    # A string seed is hashed with SHA-512: the same in every process, and unrelated for neighbouring steps.
    rng = random.Random(f"times-{seed}-{step}")
    # `1 - random()` is in (0, 1], so that no time is 0, where there is no noise to predict.
    drawn = [low + (high - low) * (part + 1 - rng.random()) / num_times for part in range(num_times)]
    times = torch.tensor(sorted(drawn, reverse=True), dtype=torch.float32)
    return shift * times / (1 + (shift - 1) * times)


def forward_windows(clean_latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]) -> list[DenoisingWindow]:
    """
    Noised copies of sampled images, as windows.

    Args:
        clean_latents (`torch.Tensor` of shape `(samples, tokens, channels)`): Clean latents of the images.
        noise (`torch.Tensor` of shape `(samples, K, tokens, channels)`): Standard normal noise of every copy.
        times (`Sequence[float]`): K falling times in (0, 1].

    Returns:
        `list[DenoisingWindow]`: For every sample the K copies, followed by the image at time 0. Log-probabilities are
        0, because no copy is an action.
    """
    t = torch.tensor([*times, 0.0])
    states = noised_latents(clean_latents[:, None], noise, t[:-1].to(noise.device))
    states = torch.cat([states, clean_latents[:, None].float()], dim=1).cpu()
    return [DenoisingWindow(latents=s, timesteps=t, start=0, log_probs=torch.zeros(len(times))) for s in states]
