# SPDX-License-Identifier: Apache-2.0

"""
Advantage weighted matching (AWM): a policy gradient in which the flow-matching loss replaces the log-likelihood.

Source: https://huggingface.co/papers/2509.25050. The ratio of every noised copy, the clipping and the weighting
`Uniform` are those of `train_sd3_awm.py` in https://github.com/scxue/advantage_weighted_matching. Two settings of its
published runs are not here: a generalised Huber form of the error, and a second KL towards a moving average of the
policy. With `sync_ref_model`, the one reference model is such an average.
"""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import velocity_mse
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores
from alphagrpo_ext.objectives.clipping import ClippedObjective, likelihood_ratio


@OBJECTIVES.register("awm")
class AWM(ClippedObjective):
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A)` with `r = exp(log p - log p_old)` and
    `log p = -w ||v_theta - (eps - x_0)||^2`, with one ratio for each noised copy of the sampled image.

    The likelihood is averaged over latent elements, as that of a transition is. All times have the weight `w = 1`, as
    the paper recommends. The published configurations have a clip range of 1, noised copies at times above 0.2, and
    advantages divided by their clip range. `--image_epsilon 1 --forward_time_interval 0.2 1` comes near; at an equal
    `image_beta` their penalty is stronger.
    """

    trains_on = "forward_process"

    def ratio(self, scores: ImageScores, old_velocities: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        target = (scores.latents - scores.clean_latents) / scores.t[..., None, None]

        def log_prob(velocities: torch.Tensor) -> torch.Tensor:
            return -velocity_mse(velocities, target, scores.mask)

        return likelihood_ratio(log_prob, scores.velocities, old_velocities)
