# SPDX-License-Identifier: Apache-2.0

"""
Flow-GRPO: a clipped policy gradient on stochastic denoising steps.

Source: https://huggingface.co/papers/2505.05470, the clipped objective (equation 5) on transitions of the update rule
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
    `-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D`, where `log r` is the difference of the mean log-densities of a
    transition, and `D` compares the transition's mean, or the velocity, with that of the reference model.

    The log-density is averaged over latent elements, so ratios are near 1 and the clip range is tiny.
    """

    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        def log_prob(velocities: torch.Tensor) -> torch.Tensor:
            return score_transitions(scores, velocities, self.config).log_prob

        return likelihood_ratio(log_prob, scores.velocities, old_velocities)
