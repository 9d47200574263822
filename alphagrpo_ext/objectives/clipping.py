# SPDX-License-Identifier: Apache-2.0

"""PPO's clipped surrogate, and the base class of objectives with a likelihood ratio."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from alphagrpo_ext.objectives.base import ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import regularized


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A)` (https://huggingface.co/papers/1707.06347, equation 7).

    Args:
        ratio (`torch.Tensor` of shape `(images, K)`): Ratios r of new to old likelihood.
        advantages (`torch.Tensor` of shape `(images,)`): Advantages A.
        epsilon (`float`): Clip range, at least 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss, and whether clipping set the gradient to 0, both `(images, K)`.
    """
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    return loss, is_clipped


def likelihood_ratio(
    log_prob: Callable[[torch.Tensor], torch.Tensor], velocities: torch.Tensor, old_velocities: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Likelihood ratio `exp(log p - log p_old)`, which is exactly 1 where the policies are the same.

    Args:
        log_prob (`Callable[[torch.Tensor], torch.Tensor]`): Maps velocities to log-likelihoods `(images, K)`.
        velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`): Velocities of the current policy.
        old_velocities (`torch.Tensor` of the same shape, *optional*):
            Velocities of the policy that sampled. `None` means that it is the current one.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Ratios without gradient through `p_old`, and `log p`, both `(images, K)`.
    """
    log_probs = log_prob(velocities)
    old_log_probs = log_probs.detach()
    if old_velocities is not None:
        with torch.no_grad():
            old_log_probs = log_prob(old_velocities)
    return torch.exp(log_probs - old_log_probs), log_probs


class ClippedObjective(ImageObjective):
    """An objective with the clipped surrogate and the regulariser. Subclasses define the ratio."""

    @abstractmethod
    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ratios and log-likelihoods, both `(images, K)`. See [`ImageObjective.__call__`] for the arguments."""

    def step_weights(self, scores: ImageScores) -> torch.Tensor | float:
        """Factors `(images, K)` that the surrogate is multiplied by."""
        return 1.0

    def __call__(
        self,
        scores: ImageScores,
        advantages: torch.Tensor,
        old_velocities: torch.Tensor | None = None,
        ref_velocities: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        config = self.config
        ratio, log_probs = self.ratio(scores, old_velocities)
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        loss, is_clipped = clipped_surrogate(ratio, advantages, config.epsilon)
        metrics = {
            "ratio_mean": ratio.detach().mean(),
            "clip_ratio": is_clipped.float().mean(),
            "log_prob": log_probs.detach().mean(),
            "velocity_std": scores.velocities.detach().std(),
        }
        return regularized(self.step_weights(scores) * loss, metrics, scores, ref_velocities, config)
