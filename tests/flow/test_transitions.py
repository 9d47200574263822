# SPDX-License-Identifier: Apache-2.0

import math
from itertools import pairwise

import pytest
import torch

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.flow.transitions import TRANSITIONS, gaussian_kl, ode_step, transition, velocity_mse


KINDS = tuple(TRANSITIONS)
NOISE_LEVEL = 0.7


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def step(generator):
    """Latents, velocity and noise of a batch of 2 x 4 transitions with 6 tokens of 5 channels, and their times."""
    latents, velocity, noise = torch.randn(3, 2, 4, 6, 5, generator=generator)
    timesteps = flow_timesteps(7, shift=3.0)
    return latents, velocity, noise, timesteps[:4], timesteps[1:5]


@pytest.mark.parametrize("kind", KINDS)
class TestTransition:
    @pytest.mark.invariant
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scored_equals_sampled_exactly(self, step, kind, dtype):
        latents, velocity, noise, t, t_next = step
        velocity = velocity.to(dtype)
        sampled = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        scored = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, next_latents=sampled.next_latents)
        assert sampled.log_prob.dtype == sampled.next_latents.dtype == torch.float32
        assert torch.equal(sampled.log_prob, scored.log_prob)
        assert torch.equal(sampled.next_latents, scored.next_latents)

    def test_gradient_of_the_log_prob_is_that_of_the_density_but_for_a_weight_a_step(self, step, kind):
        latents, velocity, noise, t, t_next = step
        velocity.requires_grad_()
        output = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        density = torch.distributions.Normal(output.mean, output.std).log_prob(output.next_latents)
        (expected,) = torch.autograd.grad(density.mean(dim=(-2, -1)).sum(), velocity, retain_graph=True)
        (actual,) = torch.autograd.grad(output.log_prob.sum(), velocity)
        weight = 2 * output.std**2 if kind == "flow_cps" else torch.ones(())
        torch.testing.assert_close(actual, weight.detach() * expected)

    def test_many_steps_equal_one_at_a_time(self, step, kind):
        latents, velocity, noise, t, t_next = step
        together = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        assert together.log_prob.shape == latents.shape[:-2]
        for i in range(latents.shape[0]):
            for k in range(latents.shape[1]):
                alone = transition(
                    kind,
                    latents[i, k],
                    velocity[i, k],
                    t[k].item(),
                    t_next[k].item(),
                    NOISE_LEVEL,
                    noise=noise[i, k],
                )
                assert torch.equal(alone.next_latents, together.next_latents[i, k])
                torch.testing.assert_close(alone.log_prob, together.log_prob[i, k], rtol=0, atol=1e-6)

    def test_padding_changes_nothing(self, step, kind):
        latents, velocity, noise, t, t_next = step
        lengths = (3, 5)
        mask = torch.arange(6) < torch.tensor(lengths)[:, None, None]
        velocity_padded = velocity.masked_fill(~mask[..., None], 1e3).requires_grad_()
        padded = transition(kind, latents, velocity_padded, t, t_next, NOISE_LEVEL, noise=noise, mask=mask)
        for i, length in enumerate(lengths):
            inputs = (x[i, :, :length] for x in (latents, velocity))
            alone = transition(kind, *inputs, t, t_next, NOISE_LEVEL, noise=noise[i, :, :length])
            torch.testing.assert_close(padded.log_prob[i], alone.log_prob)
        padded.log_prob.sum().backward()
        gradient_size = velocity_padded.grad.abs().sum(dim=-1)
        assert torch.equal(gradient_size > 0, mask.expand_as(gradient_size))

    def test_gradient_is_the_same_sampled_and_scored(self, step, kind):
        latents, velocity, noise, t, t_next = step
        velocity.requires_grad_()
        sampled = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        scored = transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, next_latents=sampled.next_latents)
        (expected,) = torch.autograd.grad(scored.log_prob.sum(), velocity)
        (actual,) = torch.autograd.grad(sampled.log_prob.sum(), velocity)
        assert torch.equal(actual, expected)
        assert expected.abs().min() > 0

    def test_without_noise_the_mean_is_the_ode_step(self, step, kind):
        latents, velocity, _, t, t_next = step
        expected = ode_step(latents, velocity, t, t_next)
        for noise_level, tolerance in ((1e-2, 1e-2), (1e-4, 1e-5), (0.0, 1e-6)):
            mean, _ = TRANSITIONS[kind](latents, velocity, t[:, None, None], t_next[:, None, None], noise_level)
            torch.testing.assert_close(mean, expected, rtol=0, atol=tolerance)

    def test_rejects_steps_without_density(self, step, kind):
        latents, velocity, noise, _, _ = step
        with pytest.raises(ValueError, match="noise_level 0.0"):
            transition(kind, latents, velocity, 0.5, 0.4, 0.0, noise=noise)
        with pytest.raises(ValueError, match="t_next < t"):
            transition(kind, latents, velocity, 0.4, 0.5, NOISE_LEVEL, noise=noise)
        with pytest.raises(ValueError, match="t_next < t"):
            transition(kind, latents, velocity, 0.5, 0.4, math.nan if kind == "flow_sde" else 0.0, noise=noise)

    def test_rejects_neither_or_both_of_noise_and_next_latents(self, step, kind):
        latents, velocity, noise, t, t_next = step
        for given in ({}, {"noise": noise, "next_latents": noise}):
            with pytest.raises(ValueError, match="either noise.* or next_latents"):
                transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, **given)

    def test_rejects_shapes_that_do_not_fit(self, step, kind):
        latents, velocity, noise, t, t_next = step
        with pytest.raises(ValueError, match="noise must have the shape"):
            transition(kind, latents, velocity, t, t_next, NOISE_LEVEL, noise=noise[0])
        with pytest.raises(ValueError, match="velocity must have the shape"):
            transition(kind, latents, velocity[:, :1], t, t_next, NOISE_LEVEL, noise=noise)
        for times in (t[:3], t[:, None], t[None, None]):
            with pytest.raises(ValueError, match="time of shape"):
                transition(kind, latents, velocity, times, 0.0, NOISE_LEVEL, noise=noise)


def test_rejects_unknown_kind_and_lists_the_known(step):
    latents, velocity, noise, t, t_next = step
    with pytest.raises(ValueError, match="'flow_ode'.*flow_sde, flow_cps"):
        transition("flow_ode", latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)


def test_log_prob_of_flow_sde_is_the_mean_log_density(step):
    latents, velocity, noise, t, t_next = step
    output = transition("flow_sde", latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
    density = torch.distributions.Normal(output.mean, output.std)
    torch.testing.assert_close(output.log_prob, density.log_prob(output.next_latents).mean(dim=(-2, -1)))


def test_flow_sde_follows_its_formula(step):
    latents, velocity, noise, t, t_next = (x.double() for x in step)
    output = transition("flow_sde", *(x.float() for x in (latents, velocity, t, t_next)), 0.7, noise=noise.float())
    assert t[0] == 1
    one_minus_t = torch.cat([1 - t_next[:1], 1 - t[1:]])
    t, t_next, one_minus_t = (x[:, None, None] for x in (t, t_next, one_minus_t))
    sigma, dt = 0.7 * torch.sqrt(t / one_minus_t), t_next - t
    # The drift of the ODE, less half the squared diffusion times the score.
    score = -(latents + (1 - t) * velocity) / t
    mean = latents + (velocity - sigma**2 / 2 * score) * dt
    torch.testing.assert_close(output.mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.std.double(), sigma * torch.sqrt(-dt), rtol=1e-5, atol=0)


class TestFlowCPS:
    def test_keeps_the_coefficients(self, step):
        latents, velocity, noise, t, t_next = step
        output = transition("flow_cps", latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        t, t_next = t[:, None, None], t_next[:, None, None]
        image, predicted_noise = latents - t * velocity, latents + (1 - t) * velocity
        weight = (output.mean - (1 - t_next) * image) / predicted_noise
        torch.testing.assert_close(weight**2 + output.std**2, (t_next**2).expand_as(weight), rtol=1e-3, atol=1e-4)

    def test_log_prob_is_the_negative_mean_square(self, step):
        latents, velocity, noise, t, t_next = step
        output = transition("flow_cps", latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        expected = -(output.next_latents - output.mean).square().mean(dim=(-2, -1))
        torch.testing.assert_close(output.log_prob, expected)

    def test_rejects_the_step_to_the_image(self, step):
        latents, velocity, noise, _, _ = step
        with pytest.raises(ValueError, match=r"t_next = \[0.0\].*positive standard deviation"):
            transition("flow_cps", latents, velocity, 0.1, 0.0, NOISE_LEVEL, noise=noise)

    @pytest.mark.parametrize("noise_level", [-0.1, 1.1, math.nan])
    def test_rejects_noise_level_out_of_range(self, step, noise_level):
        latents, velocity, noise, t, t_next = step
        with pytest.raises(ValueError, match=f"noise_level .* {noise_level}"):
            transition("flow_cps", latents, velocity, t, t_next, noise_level, noise=noise)


class TestMarginals:
    """
    Sampling with the exact velocity of Gaussian data must end in the data's distribution.

    For x_0 ~ N(mean, std^2), the velocity E[eps - x_0 | x_t] is linear in x_t.
    """

    data_mean, data_std = 0.8, 0.5
    shape = (256, 16, 8)

    def velocity(self, latents, t, data_std):
        variance = (1 - t) ** 2 * data_std**2 + t**2
        slope = (t - (1 - t) * data_std**2) / variance
        return slope * (latents - (1 - t) * self.data_mean) - self.data_mean

    def check_moments(self, latents, mean, std, bias):
        num_elements = latents.numel()
        assert abs(latents.mean().item() - mean) < bias + 5 * std / num_elements**0.5
        assert abs(latents.std().item() - std) < bias + 5 * std / (2 * num_elements) ** 0.5

    # The noise of Flow-CPS is per step: it has a limit in continuous time if its level falls with the step's root.
    @pytest.mark.parametrize("kind, level", [("flow_sde", 0.7), ("flow_cps", 0.7 * 200**-0.5)])
    def test_many_steps_end_in_the_data(self, generator, kind, level):
        timesteps = flow_timesteps(201).tolist()
        latents = torch.randn(self.shape, generator=generator)
        for t, t_next in pairwise(timesteps[:-1]):
            velocity = self.velocity(latents, t, self.data_std)
            noise = torch.randn(self.shape, generator=generator)
            latents = transition(kind, latents, velocity, t, t_next, level, noise=noise).next_latents
        velocity = self.velocity(latents, timesteps[-2], self.data_std)
        latents = ode_step(latents, velocity, timesteps[-2], timesteps[-1])
        self.check_moments(latents, self.data_mean, self.data_std, bias=0.02)

    @pytest.mark.parametrize("level", [0.2, 0.7, 1.0])
    def test_cps_is_exact_for_a_single_image_in_few_steps(self, generator, level):
        timesteps = flow_timesteps(5, shift=3.0).tolist()
        latents = torch.randn(self.shape, generator=generator)
        for t, t_next in pairwise(timesteps[:-1]):
            velocity = self.velocity(latents, t, data_std=0.0)
            noise = torch.randn(self.shape, generator=generator)
            latents = transition("flow_cps", latents, velocity, t, t_next, level, noise=noise).next_latents
            self.check_moments(latents, (1 - t_next) * self.data_mean, t_next, bias=1e-5)


class TestDivergences:
    def test_gaussian_kl_is_the_mean_divergence(self, step):
        latents, velocity, noise, t, t_next = step
        policy = transition("flow_sde", latents, velocity, t, t_next, NOISE_LEVEL, noise=noise)
        reference = transition("flow_sde", latents, -velocity, t, t_next, NOISE_LEVEL, noise=noise)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(policy.mean, policy.std),
            torch.distributions.Normal(reference.mean, reference.std),
        )
        actual = gaussian_kl(policy.mean, reference.mean, policy.std)
        torch.testing.assert_close(actual, expected.mean(dim=(-2, -1)))

    def test_velocity_mse_is_the_mean_squared_error(self, step):
        _, velocity, noise, _, _ = step
        errors = torch.nn.functional.mse_loss(velocity, noise, reduction="none")
        torch.testing.assert_close(velocity_mse(velocity, noise), errors.mean(dim=(-2, -1)))

    def test_padding_changes_nothing(self, step):
        latents, velocity, noise, _, _ = step
        std = torch.tensor([0.3, 0.5])[:, None, None, None]
        mask = (torch.arange(6) < 4).expand(1, 1, 6)
        kl = gaussian_kl(latents, velocity, std)
        masked_kl = gaussian_kl(latents, velocity, std, mask)
        assert not torch.allclose(kl, masked_kl)
        torch.testing.assert_close(masked_kl, gaussian_kl(latents[..., :4, :], velocity[..., :4, :], std))
        torch.testing.assert_close(
            velocity_mse(velocity, noise, mask), velocity_mse(velocity[..., :4, :], noise[..., :4, :])
        )
