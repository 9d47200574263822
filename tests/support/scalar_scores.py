# SPDX-License-Identifier: Apache-2.0

"""A small batch of scores, and Flow-SDE for single elements in Python floats."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.objectives import ImageScores


NUM_IMAGES, NUM_STEPS, NUM_TOKENS, NUM_CHANNELS = 3, 2, 4, 5
SHAPE = (NUM_IMAGES, NUM_STEPS, NUM_TOKENS, NUM_CHANNELS)


def make_scores(seed: int = 0, masked: bool = False) -> ImageScores:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator)

    times = flow_timesteps(6)[1:4].expand(NUM_IMAGES, -1)
    latents = normal()
    mask = torch.ones(NUM_IMAGES, 1, NUM_TOKENS, dtype=torch.bool)
    if masked:
        mask[1, 0, 2:] = False
    return ImageScores(
        velocities=normal().requires_grad_(),
        latents=latents,
        next_latents=latents + 0.3 * normal(),
        t=times[:, :-1],
        t_next=times[:, 1:],
        mask=mask,
        trajectory=torch.arange(NUM_IMAGES),
        clean_latents=normal()[:, :1],
    )


def near(velocities: torch.Tensor, scale: float, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(velocities.shape, generator=torch.Generator().manual_seed(seed))
    return velocities.detach() + scale * noise


def scalar_transition(x: float, v: float, t: float, t_next: float, noise_level: float) -> tuple[float, float]:
    """Mean and deviation of one latent element under Flow-SDE, from the paper's formula."""
    dt = t_next - t
    sigma = noise_level * math.sqrt(t / (1 - t))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * math.sqrt(-dt)


def scalar_log_prob(scores: ImageScores, velocities: torch.Tensor, noise_level: float, i: int, k: int) -> float:
    t, t_next = scores.t[i, k].item(), scores.t_next[i, k].item()
    values = []
    for token in range(NUM_TOKENS):
        if not scores.mask[i, 0, token]:
            continue
        for channel in range(NUM_CHANNELS):
            at = (i, k, token, channel)
            x, v, x_next = (s[at].item() for s in (scores.latents, velocities, scores.next_latents))
            mean, std = scalar_transition(x, v, t, t_next, noise_level)
            values.append(-((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi))
    return sum(values) / len(values)


def scalar_divergence(
    scores: ImageScores, ref: torch.Tensor, noise_level: float, kl_type: str, i: int, k: int
) -> float:
    t, t_next = scores.t[i, k].item(), scores.t_next[i, k].item()
    values = []
    for token in range(NUM_TOKENS):
        if not scores.mask[i, 0, token]:
            continue
        for channel in range(NUM_CHANNELS):
            at = (i, k, token, channel)
            x, v, v_ref = (s[at].item() for s in (scores.latents, scores.velocities, ref))
            if kl_type == "velocity":
                values.append((v - v_ref) ** 2)
                continue
            mean, std = scalar_transition(x, v, t, t_next, noise_level)
            mean_ref, _ = scalar_transition(x, v_ref, t, t_next, noise_level)
            values.append((mean - mean_ref) ** 2 / (2 * std**2))
    return sum(values) / len(values)


def elements(scores: ImageScores, i: int, k: int) -> Iterator[tuple[int, int, int, int]]:
    """Places of the latent elements of a step that are not padding."""
    for token in range(NUM_TOKENS):
        if scores.mask[i, 0, token]:
            yield from ((i, k, token, channel) for channel in range(NUM_CHANNELS))


def noised(scores: ImageScores, seed: int = 3) -> ImageScores:
    """The same with states of the forward process."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    t = scores.t[..., None, None]
    return replace(scores, latents=(1 - t) * scores.clean_latents + t * noise)
