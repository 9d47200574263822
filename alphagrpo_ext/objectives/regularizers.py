# SPDX-License-Identifier: Apache-2.0

"""What holds the policy near the reference model: divergences that any objective can add to its loss."""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import TransitionOutput, gaussian_kl, transition, velocity_mse
from alphagrpo_ext.objectives.base import REGULARIZERS, ImageScores, ObjectiveConfig, ObjectiveOutput


@REGULARIZERS.register("mean")
def transition_mean(scores: ImageScores, ref_velocities: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """
    `||mean - mean_ref||^2 / (2 std^2)`, averaged over latent elements: the exact divergence of two transitions
    (Flow-GRPO, https://huggingface.co/papers/2505.05470). It needs a window of transitions. Code derived from the authors' has
    a `std` without `sqrt(dt)` here under Flow-SDE, so its coefficients are `1 / dt` times as large for the same penalty.
    """
    with torch.no_grad():
        reference = score_transitions(scores, ref_velocities, config)
    current = score_transitions(scores, scores.velocities, config)
    return gaussian_kl(current.mean, reference.mean, current.std, scores.mask)


@REGULARIZERS.register("velocity")
def velocity(scores: ImageScores, ref_velocities: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """
    `||v - v_ref||^2`, averaged over latent elements: weighs all times alike (UniGRPO,
    https://huggingface.co/papers/2603.23500; also DiffusionNFT's and AWM's).
    """
    return velocity_mse(scores.velocities, ref_velocities, scores.mask)


def score_transitions(scores: ImageScores, velocities: torch.Tensor, config: ObjectiveConfig) -> TransitionOutput:
    """The window's steps under given velocities of the shape of `scores.velocities`."""
    return transition(
        config.sde_type,
        scores.latents,
        velocities,
        scores.t,
        scores.t_next,
        config.noise_level,
        next_latents=scores.next_latents,
        mask=scores.mask,
    )


def regularized(
    loss: torch.Tensor,
    metrics: dict[str, torch.Tensor],
    scores: ImageScores,
    ref_velocities: torch.Tensor | None,
    config: ObjectiveConfig,
) -> ObjectiveOutput:
    """
    An objective's output, with the regulariser where there is a reference.

    Args:
        loss (`torch.Tensor` of shape `(images, K)`): Loss of every trained step.
        metrics (`dict[str, torch.Tensor]`): Scalars; `kl` is added.
        scores ([`ImageScores`]): The current policy on the batch.
        ref_velocities (`torch.Tensor`, *optional*): Velocities of the reference model.
        config ([`ObjectiveConfig`]): Weight and kind of the regulariser.
    """
    if config.beta and ref_velocities is not None:
        divergence = REGULARIZERS.get(config.kl_type)(scores, ref_velocities, config)
        loss = loss + config.beta * divergence
        metrics = {**metrics, "kl": divergence.detach().mean()}
    return ObjectiveOutput(loss.mean(dim=1), metrics)
