# SPDX-License-Identifier: Apache-2.0

"""
DiffusionNFT: flow matching towards images of high reward and away from images of low reward.

Source: https://huggingface.co/papers/2509.16117, theorem 3.2 (equation 5), with the optimality reward and the adaptive
loss weighting of section 3.3. There are two differences.

- By default the current policy samples, which is the paper's `eta = 0`. Section 3.3 finds this fast at first and prone
  to collapse. The paper's experiments sample with a copy that follows the policy, by `min(0.001 i, 0.5)` at update i;
  see `rollout_policy`.
- Noised copies are at times that are stratified over `forward_time_interval`; the authors' code takes the times of the
  sampler's steps.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import latent_mean
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import regularized


MIN_ERROR = 1e-5
"""Smallest mean absolute error that a loss is divided by."""


@OBJECTIVES.register("diffusion_nft")
class DiffusionNFT(ImageObjective):
    """
    `r ||v+ - v||^2 + (1 - r) ||v- - v||^2` for a noised copy of the sampled image, with `v = eps - x_0`,
    `v+ = (1 - beta) v_old + beta v_theta`, `v- = (1 + beta) v_old - beta v_theta`, and the optimality probability
    `r = (1 + clip(A, -c, c) / c) / 2` of an advantage A.

    As in section 3.3 of the paper, the squares are those of the predicted images `x_t - t v`, each divided by its own
    mean absolute error without gradient. This replaces a weight of times: gradients have a similar size in the
    predicted image, and so grow with `t` in the velocity. As in the authors' code, and unlike equation 5, the loss is
    multiplied by `c / beta`. Where the current policy samples, the size of the gradient then depends neither on c nor
    on beta, so that the learning rate needs no change with them.
    """

    trains_on = "forward_process"

    def __call__(
        self,
        scores: ImageScores,
        advantages: torch.Tensor,
        old_velocities: torch.Tensor | None = None,
        ref_velocities: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        beta, clip = self.config.nft_beta, self.config.advantage_clip
        velocities = scores.velocities
        old = velocities.detach() if old_velocities is None else old_velocities
        optimality = (1 + advantages.clamp(-clip, clip)[:, None] / clip) / 2
        positive = self._image_loss(scores, (1 - beta) * old + beta * velocities)
        negative = self._image_loss(scores, (1 + beta) * old - beta * velocities)
        loss = (optimality * positive + (1 - optimality) * negative) * clip / beta
        deviation = latent_mean((velocities.detach() - old).square(), scores.mask)
        metrics = {
            "optimality": optimality.mean(),
            "old_deviation": deviation.mean(),
            "velocity_std": velocities.detach().std(),
        }
        return regularized(loss, metrics, scores, ref_velocities, self.config)

    @staticmethod
    def _image_loss(scores: ImageScores, velocities: torch.Tensor) -> torch.Tensor:
        """
        Self-normalised error `(images, K)` of the images that velocities `(images, K, tokens, channels)` predict.
        """
        error = scores.latents - scores.t[..., None, None] * velocities - scores.clean_latents
        size = latent_mean(error.detach().abs(), scores.mask).clamp(min=MIN_ERROR)
        return latent_mean(error.square(), scores.mask) / size
