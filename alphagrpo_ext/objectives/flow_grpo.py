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

"""Flow-GRPO: a clipped policy gradient on stochastic denoising steps.

Source: https://huggingface.co/papers/2505.05470, equations 5 and 6; the velocity regulariser is UniGRPO's
(https://huggingface.co/papers/2603.23500).
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import gaussian_kl, transition, velocity_mse
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveConfig, ObjectiveOutput


KL_TYPES = ("mean", "velocity")


@OBJECTIVES.register("flow_grpo")
class FlowGRPO(ImageObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D`, where `r` is the ratio of the mean log-densities of a transition
    and `D` compares the transition's mean, or the velocity, with the reference model's.

    The clip range is tiny because the log-density is averaged over latent elements.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        if config.kl_type not in KL_TYPES:
            raise ValueError(f"unknown image_kl_type {config.kl_type!r}, available: {', '.join(KL_TYPES)}")

    def __call__(
        self,
        scores: ImageScores,
        advantages: torch.Tensor,
        old_velocities: torch.Tensor | None = None,
        ref_velocities: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        config = self.config
        current = self._transition(scores, scores.velocities)
        log_probs = current.log_prob
        if old_velocities is None:
            old_log_probs = log_probs.detach()
        else:
            with torch.no_grad():
                old_log_probs = self._transition(scores, old_velocities).log_prob
        ratio = torch.exp(log_probs - old_log_probs)
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)[:, None]
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        is_clipped = ((ratio < 1 - config.epsilon) & (advantages < 0)) | (
            (ratio > 1 + config.epsilon) & (advantages > 0)
        )
        metrics = {
            "ratio_mean": ratio.detach().mean(),
            "clip_ratio": is_clipped.float().mean(),
            "log_prob": log_probs.detach().mean(),
            "velocity_std": scores.velocities.detach().std(),
        }
        if config.beta and ref_velocities is not None:
            if config.kl_type == "velocity":
                divergence = velocity_mse(scores.velocities, ref_velocities, scores.mask)
            else:
                with torch.no_grad():
                    reference = self._transition(scores, ref_velocities)
                divergence = gaussian_kl(current.mean, reference.mean, current.std, scores.mask)
            loss = loss + config.beta * divergence
            metrics["kl"] = divergence.detach().mean()
        return ObjectiveOutput(loss.mean(dim=1), metrics)

    def _transition(self, scores: ImageScores, velocities: torch.Tensor):
        return transition(
            self.config.sde_type,
            scores.latents,
            velocities,
            scores.t,
            scores.t_next,
            self.config.noise_level,
            next_latents=scores.next_latents,
            mask=scores.mask,
        )
