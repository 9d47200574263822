# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from support.scalar_scores import NUM_IMAGES, NUM_STEPS, elements, make_scores, near, noised


def image_error(scores: ImageScores, velocities: torch.Tensor) -> torch.Tensor:
    """Mean squared error `(images, K)` of predicted images."""
    error = scores.latents - scores.t[..., None, None] * velocities - scores.clean_latents
    return error.square().mean(dim=(-2, -1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_and_metrics_equal_scalar_arithmetic(beta: float, masked: bool) -> None:
    config = ObjectiveConfig(nft_beta=beta, beta=0.3, kl_type="velocity", advantage_clip=1.5)
    scores = noised(make_scores(masked=masked))
    old, ref = near(scores.velocities, 0.3), near(scores.velocities, 0.5, seed=2)
    advantages = torch.tensor([4.0, -0.7, 0.0])
    output = OBJECTIVES.get("diffusion_nft")(config)(scores, advantages, old, ref)

    losses, divergences, optimalities = [], [], []
    for i in range(NUM_IMAGES):
        r = 0.5 + 0.5 * max(-1.0, min(1.0, advantages[i].item() / 1.5))
        optimalities.append(r)
        image_loss = 0.0
        for k in range(NUM_STEPS):
            t = scores.t[i, k].item()
            positive, negative, squares = [], [], []
            for at in elements(scores, i, k):
                _, _, token, channel = at
                x, v, v_old = (s[at].item() for s in (scores.latents, scores.velocities, old))
                x_0 = scores.clean_latents[i, 0, token, channel].item()
                v_plus = (1 - beta) * v_old + beta * v
                v_minus = (1 + beta) * v_old - beta * v
                positive.append(x - t * v_plus - x_0)
                negative.append(x - t * v_minus - x_0)
                squares.append((v - ref[at].item()) ** 2)
            parts = [sum(e**2 for e in errors) / sum(abs(e) for e in errors) for errors in (positive, negative)]
            divergence = sum(squares) / len(squares)
            image_loss += (r * parts[0] + (1 - r) * parts[1]) * 1.5 / beta + 0.3 * divergence
            divergences.append(divergence)
        losses.append(image_loss / NUM_STEPS)

    assert output.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert output.metrics["kl"].item() == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert output.metrics["optimality"].item() == pytest.approx(sum(optimalities) / len(optimalities))


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gradient_step_follows_the_advantage(sign: float, with_old: bool) -> None:
    scores = noised(make_scores())
    old = near(scores.velocities, 0.0) if with_old else None
    loss = OBJECTIVES.get("diffusion_nft")(ObjectiveConfig())(scores, sign * torch.ones(NUM_IMAGES), old).loss
    loss.sum().backward()
    before = image_error(scores, scores.velocities)
    after = image_error(scores, scores.velocities - 0.01 * scores.velocities.grad)
    assert (sign * (before - after) > 0).all()


def test_zero_advantage_has_no_gradient_on_policy() -> None:
    scores = noised(make_scores())
    OBJECTIVES.get("diffusion_nft")(ObjectiveConfig())(scores, torch.zeros(NUM_IMAGES)).loss.sum().backward()
    assert scores.velocities.grad.abs().max() < 1e-6


def test_on_policy_gradient_depends_on_neither_beta_nor_clip() -> None:
    gradients = []
    for beta, clip in ((1.0, 5.0), (0.1, 5.0), (1.0, 2.0)):
        scores = noised(make_scores())
        config = ObjectiveConfig(nft_beta=beta, advantage_clip=clip)
        OBJECTIVES.get("diffusion_nft")(config)(scores, torch.tensor([1.0, -0.5, 0.2])).loss.sum().backward()
        gradients.append(scores.velocities.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_beta_must_be_positive() -> None:
    with pytest.raises(ValueError, match="nft_beta must be positive, but is 0"):
        OBJECTIVES.get("diffusion_nft")(ObjectiveConfig(nft_beta=0.0))
