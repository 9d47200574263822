# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from support.scalar_scores import NUM_IMAGES, NUM_STEPS, elements, make_scores, near, noised


def scalar_likelihood(scores: ImageScores, velocities: torch.Tensor, i: int, k: int) -> float:
    """The negative flow-matching loss, whose target is the noise less the image."""
    t, squares = scores.t[i, k].item(), []
    for at in elements(scores, i, k):
        x_0 = scores.clean_latents[i, 0, at[2], at[3]].item()
        noise = (scores.latents[at].item() - (1 - t) * x_0) / t
        squares.append((velocities[at].item() - (noise - x_0)) ** 2)
    return -sum(squares) / len(squares)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_metrics_equal_scalar_arithmetic(masked: bool) -> None:
    config = ObjectiveConfig(epsilon=0.05, beta=0.3, kl_type="velocity", advantage_clip=1.5)
    scores = noised(make_scores(masked=masked))
    old, ref = near(scores.velocities, 0.1), near(scores.velocities, 0.5, seed=2)
    advantages = torch.tensor([4.0, -0.7, -3.0])
    output = OBJECTIVES.get("awm")(config)(scores, advantages, old, ref)

    losses, ratios, clipped = [], [], []
    for i in range(NUM_IMAGES):
        advantage = max(-1.5, min(1.5, advantages[i].item()))
        image_loss = 0.0
        for k in range(NUM_STEPS):
            ratio = math.exp(scalar_likelihood(scores, scores.velocities, i, k) - scalar_likelihood(scores, old, i, k))
            bounded = max(0.95, min(1.05, ratio))
            squares = [(scores.velocities[at].item() - ref[at].item()) ** 2 for at in elements(scores, i, k)]
            image_loss += -min(ratio * advantage, bounded * advantage) + 0.3 * sum(squares) / len(squares)
            ratios.append(ratio)
            clipped.append(bounded * advantage < ratio * advantage)
        losses.append(image_loss / NUM_STEPS)

    assert output.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert output.metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert 0 < sum(clipped) < len(clipped)
    assert output.metrics["clip_ratio"].item() == pytest.approx(sum(clipped) / len(clipped))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gradient_step_follows_the_advantage(sign: float) -> None:
    scores = noised(make_scores())
    objective = OBJECTIVES.get("awm")(ObjectiveConfig())
    objective(scores, sign * torch.ones(NUM_IMAGES)).loss.sum().backward()
    moved = scores.velocities - 0.1 * scores.velocities.grad
    for i in range(NUM_IMAGES):
        for k in range(NUM_STEPS):
            gain = scalar_likelihood(scores, moved, i, k) - scalar_likelihood(scores, scores.velocities, i, k)
            assert sign * gain > 0


@pytest.mark.invariant
def test_ratio_is_exactly_one_without_old_velocities() -> None:
    output = OBJECTIVES.get("awm")(ObjectiveConfig())(noised(make_scores()), torch.tensor([1.0, -2.0, 0.5]))
    assert output.metrics["ratio_mean"].item() == 1.0
    assert output.loss.tolist() == [-1.0, 2.0, -0.5]
