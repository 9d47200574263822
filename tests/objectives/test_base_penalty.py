# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from alphagrpo_ext.objectives import ObjectiveConfig, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import penalized
from support.scalar_scores import NUM_IMAGES, NUM_STEPS, elements, make_scores, near


@pytest.mark.parametrize("masked", [False, True])
def test_penalty_equals_scalar_arithmetic(masked: bool) -> None:
    scores = make_scores(masked=masked)
    base = near(scores.velocities, 0.5)
    given = torch.tensor([1.0, -2.0, 0.5])
    output = penalized(ObjectiveOutput(given, {"log_prob": torch.tensor(3.0)}), scores, base, 0.003)
    output.loss.sum().backward()
    means, gradient = torch.zeros(NUM_IMAGES, NUM_STEPS), torch.zeros_like(base)
    for i in range(NUM_IMAGES):
        for k in range(NUM_STEPS):
            places = list(elements(scores, i, k))
            for at in places:
                difference = scores.velocities[at].item() - base[at].item()
                means[i, k] += difference**2 / len(places)
                gradient[at] = 0.003 * 2 * difference / len(places) / NUM_STEPS
    assert output.loss.tolist() == pytest.approx((given + 0.003 * means.mean(dim=1)).tolist(), rel=1e-6)
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {"log_prob": 3.0, "base_kl": means.mean().item()}, rel=1e-5
    )
    torch.testing.assert_close(scores.velocities.grad, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), -0.1])
def test_weight_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"base_beta must not be negative, but is {value}"):
        ObjectiveConfig(base_beta=value)
