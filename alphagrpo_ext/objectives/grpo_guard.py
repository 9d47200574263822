# SPDX-License-Identifier: Apache-2.0

"""
GRPO-Guard: Flow-GRPO with a ratio that has the same distribution at every step.

Source: https://huggingface.co/papers/2510.22319, RatioNorm and gradient reweighting with `delta = 1 / dt`, as in
`scripts/train_sd3_GRPO_Guard.py` of https://github.com/yifan123/flow_grpo.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import latent_mean
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores
from alphagrpo_ext.objectives.clipping import ClippedObjective
from alphagrpo_ext.objectives.regularizers import score_transitions


@OBJECTIVES.register("grpo_guard")
class GRPOGuard(ClippedObjective):
    """
    Flow-GRPO's clipped surrogate with `log r = d . eps`, divided by the length of the step, `-dt`.

    The log-ratio of two Gaussians of mean `mu` and `mu_old` is `d . eps / std - ||d||^2 / (2 std^2)`, with
    `d = mu - mu_old` and the noise `eps = (x' - mu_old) / std` of the sampled step. The second term is never positive,
    so ratios lie below 1 and positive advantages are hardly clipped. Its scale differs between steps. RatioNorm adds
    the second term back and multiplies by `std`, which leaves `d . eps`. It is computed in this form, without the
    cancellation of two large numbers.

    Under Flow-SDE the derivative of `mu` by the velocity is `(1 + a^2 / 2) dt`, so the division by `-dt` gives all
    steps gradients of the same size. Under Flow-CPS, which the paper does not treat, it does so only roughly.
    """

    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        current = score_transitions(scores, scores.velocities, self.config)
        with torch.no_grad():
            old_mean = current.mean.detach()
            if old_velocities is not None:
                old_mean = score_transitions(scores, old_velocities, self.config).mean
            noise = (scores.next_latents - old_mean) / current.std
        return torch.exp(latent_mean((current.mean - old_mean) * noise, scores.mask)), current.log_prob

    def step_weights(self, scores: ImageScores) -> torch.Tensor:
        return 1 / (scores.t - scores.t_next)
