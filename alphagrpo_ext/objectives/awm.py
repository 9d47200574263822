# SPDX-License-Identifier: Apache-2.0

"""
Advantage weighted matching (AWM): a policy gradient in which the flow-matching loss replaces the log-likelihood.

Source: https://huggingface.co/papers/2509.25050, in the form of its authors' published runs: the weighting `ghuber` and
the loss `exp_first` of `train_sd3_awm.py`, with the settings of `dgx_awm.py`, in
https://github.com/scxue/advantage_weighted_matching. The formulas below are those of these two files. There are three
differences.

- Times are stratified over `forward_time_interval`; theirs are points of the sampler's schedule, drawn from its first
  nine tenths.
- Their `advantage_max`, which is 1, is not here: `image_loss_weight` and the weights of the penalties do the same.
- Their two penalties are not part of this objective, because `image_beta` and `image_base_beta` add them to any. They
  are off by default, since each needs another policy. The README of `trainer/` has the flags of a published run.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import velocity_mse
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores
from alphagrpo_ext.objectives.clipping import ClippedObjective, likelihood_ratio


ERROR_OFFSET = 1e-10
"""Added to an error before its power is taken, whose slope at 0 would be infinite."""


def error_log_prob(error: torch.Tensor, t: torch.Tensor, power: float, time_power: float) -> torch.Tensor:
    """
    Log-likelihood `-t^q ((e + c)^p - c^p) / p` of an image by its flow-matching error e, with `c = 1e-10`. It is a
    generalised Huber form of the error.

    Its slope in e is `-t^q (e + c)^(p - 1)`: a power p below 1 gives the copies that are predicted well more weight.
    A power of 1 and a power of time of 0 make it `-e`, the weighting `Uniform`.

    Args:
        error (`torch.Tensor` of shape `(...)`): Mean squared error of the velocity, at least 0.
        t (`torch.Tensor` of the same shape): Times in (0, 1].
        power (`float`): Power p of the error, in (0, 1].
        time_power (`float`): Power q of the time, at least 0.

    Returns:
        `torch.Tensor` of the same shape: At most 0.
    """
    return -(t**time_power) * ((error + ERROR_OFFSET) ** power - ERROR_OFFSET**power) / power


@OBJECTIVES.register("awm")
class AWM(ClippedObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A) / c` with `r = exp(log p - log p_old)` and [`error_log_prob`] of
    `e = mean (v_theta - (eps - x_0))^2`, with one ratio for each noised copy of the sampled image. All policies are
    compared at the same noise `eps`. Advantages A are clipped to [-c, c], so that a copy weighs at most 1.

    The mean is over latent elements, before the power is taken. The defaults are the published ones: a power of the
    error of 0.25, a power of the time of 1, a clip range of 1, and the times of the first 35 of 40 points of a schedule.
    """

    trains_on = "forward_process"
    default_epsilon = 1.0
    default_time_interval = (0.128, 1.0)

    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        target = (scores.latents - scores.clean_latents) / scores.t[..., None, None]
        power, time_power = self.config.awm_power, self.config.awm_time_power

        def log_prob(velocities: torch.Tensor) -> torch.Tensor:
            return error_log_prob(velocity_mse(velocities, target, scores.mask), scores.t, power, time_power)

        return likelihood_ratio(log_prob, scores.velocities, old_velocities)

    def step_weights(self, scores: ImageScores) -> float:
        return 1 / self.config.advantage_clip
