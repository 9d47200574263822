# SPDX-License-Identifier: Apache-2.0

"""The forward process: a clean image with noise, at times that no sampler needs to visit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from alphagrpo_ext.trajectory import DenoisingWindow


def noised_latents(clean_latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """
    States `x_t = (1 - t) x_0 + t eps`.

    Args:
        clean_latents (`torch.Tensor` of shape `(..., tokens, channels)`):
            Clean latents x_0, broadcastable.
        noise (`torch.Tensor` of shape `(..., tokens, channels)`):
            Standard normal noise eps.
        t (`torch.Tensor` of shape `(...)`):
            Times in [0, 1].

    Returns:
        `torch.Tensor` of shape `(..., tokens, channels)`: fp32.
    """
    t = t.float()[..., None, None]
    return (1 - t) * clean_latents.float() + t * noise.float()


def draw_times(num_times: int, interval: tuple[float, float], shift: float, seed: int, step: int) -> torch.Tensor:
    """
    Draw times, one in each of `num_times` equal parts of an interval, and shift them as a schedule is:
    `t <- s t / (1 + (s - 1) t)`.

    The draw depends on `(seed, step)` alone: members of a group are compared at the same times, on every rank, and each
    training step has other times. Strata keep the average over times from depending on luck.

    Args:
        num_times (`int`):
            Number of times, at least 1.
        interval (`tuple[float, float]`):
            Bounds before the shift, `0 <= low < high <= 1`.
        shift (`float`):
            Positive shift s.
        seed (`int`):
            Seed of the run.
        step (`int`):
            Index of the rollout batch.

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
    if shift <= 0:
        raise ValueError(f"shift must be positive, but is {shift}")
    # A string seed is hashed with SHA-512: the same in every process, and unrelated for neighbouring steps.
    rng = random.Random(f"times-{seed}-{step}")
    # One less a number in [0, 1), so that no time is 0, where no noise is left to tell apart from the image.
    drawn = [low + (high - low) * (part + 1 - rng.random()) / num_times for part in range(num_times)]
    times = torch.tensor(sorted(drawn, reverse=True), dtype=torch.float32)
    return shift * times / (1 + (shift - 1) * times)


def forward_windows(clean_latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]) -> list[DenoisingWindow]:
    """
    Noised copies of painted images, for objectives that train on the forward process instead of the sampled path.

    Args:
        clean_latents (`torch.Tensor` of shape `(samples, tokens, channels)`): Clean latents of the painted images.
        noise (`torch.Tensor` of shape `(samples, K, tokens, channels)`): Standard normal noise of every copy.
        times (`Sequence[float]`): K falling times.

    Returns:
        `list[DenoisingWindow]`: For every sample the K copies, followed by the image at time 0. Their log-probabilities
        are 0, because no copy is an action.
    """
    t = torch.tensor([*times, 0.0])
    states = noised_latents(clean_latents[:, None], noise, t[:-1].to(noise.device))
    states = torch.cat([states, clean_latents[:, None].float()], dim=1).cpu()
    return [DenoisingWindow(latents=s, timesteps=t, start=0, log_probs=torch.zeros(len(times))) for s in states]
