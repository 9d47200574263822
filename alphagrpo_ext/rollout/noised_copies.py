# SPDX-License-Identifier: Apache-2.0

"""Noised copies of a painted image, for objectives that train on the forward process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alphagrpo_ext.flow.forward_process import noised_latents
from alphagrpo_ext.trajectory import DenoisingWindow


def forward_windows(clean_latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]) -> list[DenoisingWindow]:
    """
    In place of a part of the sampled path, the image with fresh noise at given times.

    Args:
        clean_latents (`torch.Tensor` of shape `(samples, tokens, channels)`): What the samples' paths ended in.
        noise (`torch.Tensor` of shape `(samples, K, tokens, channels)`): Standard normal noise of every copy.
        times (`Sequence[float]`): K falling times.

    Returns:
        `list[DenoisingWindow]`: For every sample the K copies, followed by the image at time 0. Their log-probabilities
        are 0, as no copy is an action.
    """
    t = torch.tensor([*times, 0.0])
    states = noised_latents(clean_latents[:, None], noise, t[:-1].to(noise.device))
    states = torch.cat([states, clean_latents[:, None].float()], dim=1).cpu()
    return [DenoisingWindow(latents=s, timesteps=t, start=0, log_probs=torch.zeros(len(times))) for s in states]
