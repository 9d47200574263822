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

Source: https://huggingface.co/papers/2505.05470, equations 5 and 6.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveConfig, ObjectiveOutput
from alphagrpo_ext.objectives.clipping import clipped_surrogate
from alphagrpo_ext.objectives.regularizers import REGULARIZERS, regularized, score_transitions


@OBJECTIVES.register("flow_grpo")
class FlowGRPO(ImageObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D`, where `r` is the ratio of the mean log-densities of a transition
    and `D` compares the transition's mean, or the velocity, with the reference model's.

    The clip range is tiny because the log-density is averaged over latent elements.
    """

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
        log_probs = score_transitions(scores, scores.velocities, config).log_prob
        if old_velocities is None:
            old_log_probs = log_probs.detach()
        else:
            with torch.no_grad():
                old_log_probs = score_transitions(scores, old_velocities, config).log_prob
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
