# SPDX-License-Identifier: Apache-2.0


import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from alphagrpo_ext.flow.solvers import ODE_SOLVERS, VelocityEvaluation
from alphagrpo_ext.flow.timesteps import flow_timesteps


Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MEAN, STD = 0.7, 0.25


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Exact velocity for images from a normal distribution, whose states have the deviation s_t of the path below."""
    variance = ((1 - t) * STD) ** 2 + t**2
    return -MEAN + (x - (1 - t) * MEAN) * (t - (1 - t) * STD**2) / variance


def gaussian_state(noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Exact solution of that velocity's ODE from `noise` at t = 1."""
    return (1 - t) * MEAN + torch.sqrt(((1 - t) * STD) ** 2 + t**2) * noise


def solve(name: str, timesteps: torch.Tensor, x: torch.Tensor, velocity: Velocity) -> torch.Tensor:
    solver = ODE_SOLVERS.get(name)
    evaluations: list[VelocityEvaluation] = []
    for t, t_next in zip(timesteps[:-1], timesteps[1:], strict=True):
        evaluations = [*evaluations, VelocityEvaluation(t, x, velocity(x, t))][-solver.order :]
        x = solver.step(evaluations, t_next)
    return x


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def measured_order(name: str, noise: torch.Tensor, first: float, last: float, shift: float) -> float:
    """Mean power of two that a halving of the steps divides the error by, over four halvings."""

    def error(num_steps: int) -> float:
        timesteps = last + (first - last) * flow_timesteps(num_steps + 1, shift)
        actual = solve(name, timesteps, gaussian_state(noise, timesteps[0]), gaussian_velocity)
        return (actual - gaussian_state(noise, timesteps[-1])).square().mean().sqrt().item()

    return math.log2(error(10) / error(160)) / 4


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("first", "last"), [(1.0, 0.0), (0.9, 0.15)])
@pytest.mark.parametrize("name", ["euler", "ab2"])
def test_order_of_convergence(noise: torch.Tensor, name: str, first: float, last: float, shift: float) -> None:
    order = measured_order(name, noise, first, last, shift)
    assert order == pytest.approx(ODE_SOLVERS.get(name).order, abs=0.3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence_of_dpmpp_2m(noise: torch.Tensor, shift: float) -> None:
    """The order is at least two where lambda is finite. With the ends, where steps are Euler's, it is above Euler's."""
    assert measured_order("dpmpp_2m", noise, 0.9, 0.15, shift) > 2
    assert measured_order("dpmpp_2m", noise, 1.0, 0.0, shift) > 1.3


@pytest.mark.parametrize("name", sorted({*ODE_SOLVERS.names()} - {"euler"}))
def test_second_order_needs_fewer_steps(noise: torch.Tensor, name: str) -> None:
    exact = gaussian_state(noise, torch.tensor(0.0))
    euler, other = (
        (solve(solver, flow_timesteps(steps + 1), noise, gaussian_velocity) - exact).square().mean()
        for solver, steps in (("euler", 20), (name, 10))
    )
    assert other < euler


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_dpmpp_2m_equals_diffusers(noise: torch.Tensor, num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(num_steps)
    expected = noise
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = gaussian_velocity(expected, scheduler.sigmas[index])
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    actual = solve("dpmpp_2m", scheduler.sigmas, noise, gaussian_velocity)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_ab2_equals_its_textbook_form(noise: torch.Tensor) -> None:
    """For steps of one length, `x + h (3/2 f_n - 1/2 f_(n-1))`."""
    times = torch.tensor([0.8, 0.6, 0.4])
    velocities = [gaussian_velocity(noise, t) for t in times[:2]]
    evaluations = [VelocityEvaluation(t, noise, v) for t, v in zip(times[:2], velocities, strict=True)]
    expected = noise - 0.2 * (1.5 * velocities[1] - 0.5 * velocities[0])
    torch.testing.assert_close(ODE_SOLVERS.get("ab2").step(evaluations, times[2]), expected)


@pytest.mark.parametrize("name", ODE_SOLVERS.names())
def test_steps_are_finite_fp32_at_both_ends(noise: torch.Tensor, name: str) -> None:
    for num_steps in (1, 2, 3):
        latents = solve(name, flow_timesteps(num_steps + 1), noise, gaussian_velocity)
        assert latents.dtype == torch.float32
        assert latents.isfinite().all()
