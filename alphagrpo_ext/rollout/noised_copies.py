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
