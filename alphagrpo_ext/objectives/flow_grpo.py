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

Source: https://huggingface.co/papers/2505.05470: its clipped objective (equation 5) on the transitions of its update rule
(equation 9).
"""

from __future__ import annotations

import torch

from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores
from alphagrpo_ext.objectives.clipping import ClippedObjective, likelihood_ratio
from alphagrpo_ext.objectives.regularizers import score_transitions


@OBJECTIVES.register("flow_grpo")
class FlowGRPO(ClippedObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D`, where `r` is the ratio of the mean log-densities of a transition
    and `D` compares the transition's mean, or the velocity, with the reference model's.

    The clip range is tiny because the log-density is averaged over latent elements.
    """

    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        def log_prob(velocities: torch.Tensor) -> torch.Tensor:
            return score_transitions(scores, velocities, self.config).log_prob

        return likelihood_ratio(log_prob, scores.velocities, old_velocities)
