# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from alphagrpo_ext.objectives import OBJECTIVES, ObjectiveConfig
from alphagrpo_ext.objectives.regularizers import score_transitions
from support.scalar_scores import (
    NUM_IMAGES,
    NUM_STEPS,
    elements,
    make_scores,
    near,
    scalar_divergence,
    scalar_log_prob,
    scalar_transition,
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kl_type", ["mean", "velocity"])
def test_loss_and_metrics_equal_scalar_arithmetic(kl_type: str, masked: bool) -> None:
    """The ratio in the paper's form: the log-ratio plus the squared distance of means, times the deviation."""
    config = ObjectiveConfig(noise_level=0.6, epsilon=0.005, beta=0.3, kl_type=kl_type, advantage_clip=1.5)
    scores = make_scores(masked=masked)
    old, ref = near(scores.velocities, 0.1), near(scores.velocities, 0.5, seed=2)
    advantages = torch.tensor([4.0, -0.7, -3.0])
    output = OBJECTIVES.get("grpo_guard")(config)(scores, advantages, old, ref)

    losses, ratios, clipped = [], [], []
    for i in range(NUM_IMAGES):
        advantage = max(-1.5, min(1.5, advantages[i].item()))
        image_loss = 0.0
        for k in range(NUM_STEPS):
            t, t_next = scores.t[i, k].item(), scores.t_next[i, k].item()
            squares = []
            for at in elements(scores, i, k):
                x = scores.latents[at].item()
                mean, std = scalar_transition(x, scores.velocities[at].item(), t, t_next, 0.6)
                old_mean, _ = scalar_transition(x, old[at].item(), t, t_next, 0.6)
                squares.append((mean - old_mean) ** 2)
            bias = sum(squares) / len(squares) / (2 * std**2)
            log_ratio = scalar_log_prob(scores, scores.velocities, 0.6, i, k) - scalar_log_prob(scores, old, 0.6, i, k)
            ratio = math.exp((log_ratio + bias) * std)
            bounded = max(0.995, min(1.005, ratio))
            image_loss += -min(ratio * advantage, bounded * advantage) / (t - t_next)
            image_loss += 0.3 * scalar_divergence(scores, ref, 0.6, kl_type, i, k)
            ratios.append(ratio)
            clipped.append(bounded * advantage < ratio * advantage)
        losses.append(image_loss / NUM_STEPS)

    assert output.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert output.metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert 0 < sum(clipped) < len(clipped)
    assert output.metrics["clip_ratio"].item() == pytest.approx(sum(clipped) / len(clipped))


@pytest.mark.invariant
@pytest.mark.parametrize("sde_type", ["flow_sde", "flow_cps"])
def test_ratio_is_exactly_one_without_old_velocities(sde_type: str) -> None:
    scores = make_scores()
    output = OBJECTIVES.get("grpo_guard")(ObjectiveConfig(sde_type=sde_type))(scores, torch.tensor([1.0, -2.0, 0.5]))
    assert output.metrics["ratio_mean"].item() == 1.0
    length = (scores.t - scores.t_next).reciprocal().mean().item()
    assert output.loss.tolist() == pytest.approx([-length, 2 * length, -0.5 * length])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("sde_type", ["flow_sde", "flow_cps"])
def test_a_gradient_step_follows_the_advantage(sde_type: str, sign: float) -> None:
    scores = make_scores()
    config = ObjectiveConfig(sde_type=sde_type)
    OBJECTIVES.get("grpo_guard")(config)(scores, sign * torch.ones(NUM_IMAGES)).loss.sum().backward()
    before = score_transitions(scores, scores.velocities, config).log_prob
    after = score_transitions(scores, scores.velocities - 0.01 * scores.velocities.grad, config).log_prob
    assert (sign * (after - before) > 0).all()


def test_ratios_of_a_policy_that_moved_are_centred() -> None:
    """The log-ratios of Flow-GRPO have a mean below 0, which is lower the less noise a step has."""
    generator = torch.Generator().manual_seed(0)
    scores = make_scores()
    config = ObjectiveConfig(noise_level=0.5)
    old = near(scores.velocities, 0.5)
    transitions = score_transitions(scores, old, config)
    log_ratios = {"flow_grpo": [], "grpo_guard": []}
    for _ in range(200):
        noise = torch.randn(scores.latents.shape, generator=generator)
        scores.next_latents = transitions.mean + transitions.std * noise
        for name, values in log_ratios.items():
            output = OBJECTIVES.get(name)(config)(scores, torch.ones(NUM_IMAGES), old)
            values.append(output.metrics["ratio_mean"].log().item())
    means = {name: torch.tensor(values) for name, values in log_ratios.items()}
    assert means["flow_grpo"].mean() < -5 * means["flow_grpo"].std() / 200**0.5
    assert abs(means["grpo_guard"].mean()) < 5 * means["grpo_guard"].std() / 200**0.5
