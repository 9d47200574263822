# SPDX-License-Identifier: Apache-2.0

"""
ODE solvers for the deterministic part of a denoising path. Each evaluates the network once per step.

A solver of second order also looks at the evaluation before, and reaches the accuracy of many Euler steps with few.
Its history is cleared at the stochastic window and where guidance is switched on or off, because the velocity is
discontinuous there. Each such stretch of a path begins with an Euler step.

`"ab2"` is the recommended one: DPM-Solver++ integrates over `lambda`, which is infinite at both ends of a path, so
three of its steps there are Euler's. Diffusers' scheduler objects are not used, because they cannot start or end
inside a path: `DPMSolverMultistepScheduler.set_timesteps` takes integer timesteps only, and `UniPCMultistepScheduler`
follows the last sigma by 0 or by itself. A test holds `"dpmpp_2m"` to Diffusers' results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from alphagrpo_ext.flow.transitions import ode_step
from alphagrpo_ext.registry import Registry


ODE_SOLVERS: Registry = Registry("ODE solver", "alphagrpo_ext.ode_solvers")


@dataclass(frozen=True)
class VelocityEvaluation:
    """
    One evaluation of the network.

    Args:
        t (`torch.Tensor` of shape `()`): Time in (0, 1].
        latents (`torch.Tensor` of shape `(..., tokens, channels)`): State at that time, fp32.
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`): Predicted `v = eps - x_0`, guided, fp32.
    """

    t: torch.Tensor
    latents: torch.Tensor
    velocity: torch.Tensor

    @property
    def image(self) -> torch.Tensor:
        """The predicted image `x_0 = x - t v`."""
        return self.latents - self.t * self.velocity


class ODESolver(ABC):
    """A rule for one deterministic step. Register one with `@ODE_SOLVERS.register("name")`."""

    order: ClassVar[int]
    """Order of convergence, which is also the largest number of evaluations that a step uses."""

    @staticmethod
    @abstractmethod
    def step(evaluations: Sequence[VelocityEvaluation], t_next: torch.Tensor) -> torch.Tensor:
        """
        Args:
            evaluations (`Sequence[VelocityEvaluation]`): The last 1 to `order` evaluations, the newest at the end.
            t_next (`torch.Tensor` of shape `()`): Time after the step, in [0, t) for the newest `t`.

        Returns:
            `torch.Tensor` of shape `(..., tokens, channels)`: The state at `t_next`, fp32.
        """


@ODE_SOLVERS.register("euler")
class Euler(ODESolver):
    """Euler step `x' = x + v dt`, of first order."""

    order = 1

    @staticmethod
    def step(evaluations: Sequence[VelocityEvaluation], t_next: torch.Tensor) -> torch.Tensor:
        now = evaluations[-1]
        return ode_step(now.latents, now.velocity, now.t, t_next)


@ODE_SOLVERS.register("ab2")
class AdamsBashforth2(ODESolver):
    """
    Adams-Bashforth step of second order `x' = x + (v + dt' / (2 dt) (v - v_before)) dt'`, with steps of any length.

    It is the exact integral of the line through the last two velocities (Hairer, Norsett, Wanner, *Solving Ordinary
    Differential Equations I*, section III.5). Unlike [`DPMSolverPP2M`], it is of second order in the second step from
    pure noise and in the step to the image.
    """

    order = 2

    @staticmethod
    def step(evaluations: Sequence[VelocityEvaluation], t_next: torch.Tensor) -> torch.Tensor:
        if len(evaluations) == 1:
            return Euler.step(evaluations, t_next)
        before, now = evaluations
        ratio = (t_next - now.t) / (now.t - before.t)
        return ode_step(now.latents, now.velocity + ratio / 2 * (now.velocity - before.velocity), now.t, t_next)


@ODE_SOLVERS.register("dpmpp_2m")
class DPMSolverPP2M(ODESolver):
    """
    DPM-Solver++(2M) step `x' = t' / t x + (1 - t' / t) (x_0 + h' / (2 h) (x_0 - x_0_before))`, where h and h' are the
    last and the coming step of `lambda = log((1 - t) / t)`.

    It extrapolates the predicted image along lambda (https://huggingface.co/papers/2211.01095, algorithm 2). Lambda is
    infinite at both ends of a path, so the first two steps from `t = 1` and the step to `t = 0` are Euler's, as in
    Diffusers' `DPMSolverMultistepScheduler`.
    """

    order = 2

    @staticmethod
    def step(evaluations: Sequence[VelocityEvaluation], t_next: torch.Tensor) -> torch.Tensor:
        if len(evaluations) == 1 or evaluations[0].t >= 1 or t_next <= 0:
            return Euler.step(evaluations[-1:], t_next)
        before, now = evaluations
        ratio = (torch.logit(now.t) - torch.logit(t_next)) / (torch.logit(before.t) - torch.logit(now.t))
        image = now.image + ratio / 2 * (now.image - before.image)
        return t_next / now.t * now.latents + (1 - t_next / now.t) * image
