# SPDX-License-Identifier: Apache-2.0

"""Divergences from the reference model, which any objective can add to its loss."""

from __future__ import annotations

import torch

from alphagrpo_ext.flow.transitions import TransitionOutput, gaussian_kl, transition, velocity_mse
from alphagrpo_ext.objectives.base import REGULARIZERS, ImageScores, ObjectiveConfig, ObjectiveOutput


@REGULARIZERS.register("mean")
def transition_mean(scores: ImageScores, ref_velocities: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """
    `||mean - mean_ref||^2 / (2 std^2)`, averaged over latent elements, `(images, K)`. This is the exact divergence of
    two transitions (Flow-GRPO, https://huggingface.co/papers/2505.05470), so it needs a window of transitions. Code
    derived from the authors' uses a `std` without `sqrt(dt)` under Flow-SDE: for the same penalty its coefficients are
    `1 / dt` times as large.
    """
    with torch.no_grad():
        reference = score_transitions(scores, ref_velocities, config)
    current = score_transitions(scores, scores.velocities, config)
    return gaussian_kl(current.mean, reference.mean, current.std, scores.mask)


@REGULARIZERS.register("velocity")
def velocity(scores: ImageScores, ref_velocities: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """
    `||v - v_ref||^2`, averaged over latent elements, `(images, K)`. It weighs all times equally, as in UniGRPO
    (https://huggingface.co/papers/2603.23500), DiffusionNFT and AWM.
    """
    return velocity_mse(scores.velocities, ref_velocities, scores.mask)


def penalized(
    output: ObjectiveOutput, scores: ImageScores, base_velocities: torch.Tensor, base_beta: float
) -> ObjectiveOutput:
    """
    Output of an objective, with the penalty `base_beta ||v - v_base||^2` added: [`velocity`] of the model before training,
    for a run whose reference model is another one.

    Args:
        output ([`ObjectiveOutput`]): Loss and metrics without the penalty. The metric `base_kl` is added.
        scores ([`ImageScores`]): The current policy on the batch.
        base_velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`): Velocities of the model before training.
        base_beta (`float`): Weight of the penalty, at least 0.
    """
    divergence = velocity_mse(scores.velocities, base_velocities, scores.mask)
    metrics = {**output.metrics, "base_kl": divergence.detach().mean()}
    return ObjectiveOutput(output.loss + base_beta * divergence.mean(dim=1), metrics)


def score_transitions(scores: ImageScores, velocities: torch.Tensor, config: ObjectiveConfig) -> TransitionOutput:
    """The steps of all windows as transitions under `velocities` `(images, K, tokens, channels)`."""
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
    Output of an objective, with the regulariser `beta D` added if there is a reference model.

    Args:
        loss (`torch.Tensor` of shape `(images, K)`): Loss of every trained step, without the regulariser.
        metrics (`dict[str, torch.Tensor]`): Scalars. `kl` is added.
        scores ([`ImageScores`]): The current policy on the batch.
        ref_velocities (`torch.Tensor` of shape `(images, K, tokens, channels)`, *optional*):
            Velocities of the reference model.
        config ([`ObjectiveConfig`]): Weight and kind of the regulariser.
    """
    if config.beta and ref_velocities is not None:
        divergence = REGULARIZERS.get(config.kl_type)(scores, ref_velocities, config)
        loss = loss + config.beta * divergence
        metrics = {**metrics, "kl": divergence.detach().mean()}
    return ObjectiveOutput(loss.mean(dim=1), metrics)
