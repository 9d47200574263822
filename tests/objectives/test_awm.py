# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.objectives.awm import error_log_prob
from support.scalar_scores import NUM_IMAGES, NUM_STEPS, elements, make_scores, near, noised


UNIFORM = {"awm_power": 1.0, "awm_time_power": 0.0}
"""The likelihood is the negative error."""


def scalar_error(scores: ImageScores, velocities: torch.Tensor, i: int, k: int) -> float:
    """The flow-matching loss, whose target is the noise less the image."""
    t, squares = scores.t[i, k].item(), []
    for at in elements(scores, i, k):
        x_0 = scores.clean_latents[i, 0, at[2], at[3]].item()
        noise = (scores.latents[at].item() - (1 - t) * x_0) / t
        squares.append((velocities[at].item() - (noise - x_0)) ** 2)
    return sum(squares) / len(squares)


def scalar_likelihood(
    scores: ImageScores, velocities: torch.Tensor, i: int, k: int, power: float = 0.25, time_power: float = 1.0
) -> float:
    error, t = scalar_error(scores, velocities, i, k), scores.t[i, k].item()
    return -(t**time_power) * ((error + 1e-10) ** power - 1e-10**power) / power


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("powers", [(0.25, 1.0), (0.5, 2.0), (1.0, 0.0)])
def test_loss_and_metrics_equal_scalar_arithmetic(masked: bool, powers: tuple[float, float]) -> None:
    config = ObjectiveConfig(
        epsilon=0.02,
        beta=0.3,
        kl_type="velocity",
        advantage_clip=1.5,
        awm_power=powers[0],
        awm_time_power=powers[1],
    )
    scores = noised(make_scores(masked=masked))
    old, ref = near(scores.velocities, 0.1), near(scores.velocities, 0.5, seed=2)
    advantages = torch.tensor([4.0, -0.7, -3.0])
    output = OBJECTIVES.get("awm")(config)(scores, advantages, old, ref)

    losses, ratios, clipped = [], [], []
    for i in range(NUM_IMAGES):
        weight = max(-1.5, min(1.5, advantages[i].item())) / 1.5
        image_loss = 0.0
        for k in range(NUM_STEPS):
            now, before = (scalar_likelihood(scores, v, i, k, *powers) for v in (scores.velocities, old))
            ratio = math.exp(now - before)
            bounded = max(0.98, min(1.02, ratio))
            squares = [(scores.velocities[at].item() - ref[at].item()) ** 2 for at in elements(scores, i, k)]
            image_loss += -min(ratio * weight, bounded * weight) + 0.3 * sum(squares) / len(squares)
            ratios.append(ratio)
            clipped.append(bounded * weight < ratio * weight)
        losses.append(image_loss / NUM_STEPS)

    assert output.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert output.metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert 0 < sum(clipped) < len(clipped)
    assert output.metrics["clip_ratio"].item() == pytest.approx(sum(clipped) / len(clipped))


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_the_error_of_each_velocity_times_the_slope(masked: bool) -> None:
    """On-policy, `d loss / d v = A / c * s e^(p - 1) * 2 (v - (eps - x_0)) / n`, averaged over the steps."""
    scores = noised(make_scores(masked=masked))
    advantages = torch.tensor([7.0, -0.7, -3.0])
    OBJECTIVES.get("awm")(ObjectiveConfig(epsilon=1.0))(scores, advantages).loss.sum().backward()
    expected = torch.zeros_like(scores.velocities)
    for i, weight in enumerate((1.0, -0.7 / 5, -3.0 / 5)):
        for k in range(NUM_STEPS):
            t, places = scores.t[i, k].item(), list(elements(scores, i, k))
            slope = t * scalar_error(scores, scores.velocities, i, k) ** -0.75
            for at in places:
                x_0 = scores.clean_latents[i, 0, at[2], at[3]].item()
                noise = (scores.latents[at].item() - (1 - t) * x_0) / t
                difference = scores.velocities[at].item() - (noise - x_0)
                expected[at] = weight * slope * 2 * difference / len(places) / NUM_STEPS
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(scores.velocities.grad, expected, rtol=1e-4, atol=1e-6)


def test_perfect_prediction_has_a_finite_gradient() -> None:
    error = torch.zeros(1, requires_grad=True)
    log_prob = error_log_prob(error, torch.ones(1), 0.25, 1.0)
    log_prob.sum().backward()
    assert log_prob.item() == 0.0
    assert error.grad.item() == pytest.approx(-(1e-10**-0.75), rel=1e-5)


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


def test_low_powers_weigh_copies_that_are_predicted_well() -> None:
    """A copy with a quarter of the error has the same gradient of the likelihood in e, times `4^(1 - p)`."""
    error = torch.tensor([0.4, 0.1], requires_grad=True)
    for power, factor in ((1.0, 1.0), (0.5, 2.0), (0.25, 4**0.75)):
        (slope,) = torch.autograd.grad(error_log_prob(error, torch.ones(2), power, 1.0).sum(), error)
        assert (slope[1] / slope[0]).item() == pytest.approx(factor, rel=1e-5)


@pytest.mark.invariant
@pytest.mark.parametrize("settings", [{}, UNIFORM])
@pytest.mark.parametrize("is_given", [False, True])
def test_ratio_is_exactly_one_on_policy(settings: dict[str, float], is_given: bool) -> None:
    scores = noised(make_scores())
    old = scores.velocities.detach().clone() if is_given else None
    output = OBJECTIVES.get("awm")(ObjectiveConfig(**settings))(scores, torch.tensor([1.0, -2.0, 10.0]), old)
    assert output.metrics["ratio_mean"].item() == 1.0
    assert output.loss.tolist() == pytest.approx([-1 / 5, 2 / 5, -1.0], rel=1e-7)


@pytest.mark.parametrize("name", ["awm_power", "awm_time_power"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_powers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        ObjectiveConfig(**{name: value})


def test_power_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"awm_power must be in \(0, 1\], but is 1.5"):
        ObjectiveConfig(awm_power=1.5)
