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

"""AWM: a policy gradient with the flow-matching loss of pretraining in place of the log-likelihood.

Source: https://huggingface.co/papers/2509.25050 (advantage weighted matching), with the ratio and clipping of its algorithm.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import velocity_mse
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveConfig, ObjectiveOutput
from alphagrpo_ext.objectives.clipping import clipped_surrogate
from alphagrpo_ext.objectives.regularizers import REGULARIZERS, regularized


@OBJECTIVES.register("awm")
class AWM(ImageObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A)` with `r = exp(log p - log p_old)` and `log p = -w ||v_theta - (eps - x_0)||^2`
    for a noised copy of the painted image, one ratio a copy.

    The likelihood is averaged over latent elements, as that of a transition is, and its weight of times is `w = 1`.
    """

    trains_on = "forward_process"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        REGULARIZERS.get(config.kl_type)

    def __call__(
        self,
        scores: ImageScores,
        advantages: torch.Tensor,
        old_velocities: torch.Tensor | None = None,
        ref_velocities: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        config = self.config
        target = (scores.latents - scores.clean_latents) / scores.t[..., None, None]
        log_probs = -velocity_mse(scores.velocities, target, scores.mask)
        old_log_probs = log_probs.detach()
        if old_velocities is not None:
            old_log_probs = -velocity_mse(old_velocities, target, scores.mask)
        ratio = torch.exp(log_probs - old_log_probs)
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        loss, is_clipped = clipped_surrogate(ratio, advantages, config.epsilon)
        metrics = {
            "ratio_mean": ratio.detach().mean(),
            "clip_ratio": is_clipped.float().mean(),
            "log_prob": log_probs.detach().mean(),
            "velocity_std": scores.velocities.detach().std(),
        }
        return regularized(loss, metrics, scores, ref_velocities, config)
