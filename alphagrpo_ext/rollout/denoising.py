# SPDX-License-Identifier: Apache-2.0

"""The denoising path of a group of samples: deterministic steps, and a window of stochastic steps.

A solver's history is cleared at the window and where guidance is switched on or off, because the velocity is
discontinuous there. Each stretch of the path therefore begins with an Euler step.

Images that share a thought fork after the first evaluation of the window. The state there is shared, and so is its
velocity; only the noise differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.solvers import ODE_SOLVERS, VelocityEvaluation
from alphagrpo_ext.flow.timesteps import DenoisingPath, denoising_path, flow_timesteps
from alphagrpo_ext.flow.transitions import TRANSITIONS, check_densities, transition
from alphagrpo_ext.models.contract import Cache, Guidance, UnifiedModel
from alphagrpo_ext.ranges import (
    AtLeastTwo,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    check_ranges,
)
from alphagrpo_ext.trajectory import DenoisingWindow


@dataclass(frozen=True)
class DenoisingConfig:
    """
    How an image is painted.

    Args:
        num_timesteps (`int`, *optional*, defaults to `50`):
            Points of the schedule; without `ode_steps`, the network is evaluated `num_timesteps - 1` times.
        timestep_shift (`float`, *optional*, defaults to `3.0`):
            Shift of the schedule towards noise.
        guidance ([`GuidanceConfig`], *optional*):
            Classifier-free guidance.
        sde_type (`str`, *optional*, defaults to `"flow_sde"`):
            Stochastic transition inside the window, a name in `TRANSITIONS`.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Its noise level.
        window_start (`int`, *optional*):
            First stochastic step. `None` paints deterministically.
        window_size (`int`, *optional*, defaults to `0`):
            Number of stochastic steps.
        ode_solver (`str`, *optional*, defaults to `"euler"`):
            Rule of the deterministic steps, a name in `ODE_SOLVERS`. Its history is cleared at the stochastic window
            and where guidance is switched on or off.
        ode_steps (`int`, *optional*):
            Number of deterministic steps, which are those outside the window. They are divided between the stretches
            before and after it in proportion to the steps of the schedule, with at least one step each. The network is
            evaluated once for each of them and for each step of the window. `None` takes the steps of the schedule.
        forward_times (`tuple[float, ...]`, *optional*):
            Times of noised copies of a deterministically painted image. The objective trains on these copies.
    """

    num_timesteps: AtLeastTwo = 50
    timestep_shift: PositiveFloat = 3.0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    sde_type: str = "flow_sde"
    noise_level: PositiveFloat = 0.7
    window_start: NonNegativeInt | None = None
    window_size: NonNegativeInt = 0
    ode_solver: str = "euler"
    ode_steps: PositiveInt | None = None
    forward_times: tuple[PositiveUnitFloat, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.sde_type not in TRANSITIONS:
            raise ValueError(f"unknown sde_type '{self.sde_type}', available: {', '.join(TRANSITIONS)}")
        if self.window_start is not None and self.forward_times:
            raise ValueError(
                f"an image has either stochastic steps (window_start={self.window_start}) or noised copies "
                f"(forward_times={self.forward_times}), not both"
            )
        if self.window_start is not None and self.window_start + self.window_size > self.num_timesteps - 1:
            raise ValueError(
                f"a window of {self.window_size} steps from step {self.window_start} does not fit the "
                f"{self.num_timesteps - 1} steps of num_timesteps={self.num_timesteps}"
            )
        ODE_SOLVERS.get(self.ode_solver)
        try:
            path = self.path()
        except ValueError as error:
            raise ValueError(f"ode_steps={self.ode_steps}: {error}") from error
        if not torch.all(path.timesteps[1:] < path.timesteps[:-1]):
            raise ValueError(
                f"timestep_shift={self.timestep_shift} makes neighbouring times equal in fp32: take one nearer to 1"
            )
        if path.window:
            times = path.timesteps[path.window.start : path.window.stop + 1]
            check_densities(self.sde_type, times, self.noise_level)

    def path(self, device: torch.device | str | None = None) -> DenoisingPath:
        """The states of the path and the stochastic steps between them."""
        schedule = flow_timesteps(self.num_timesteps, self.timestep_shift, device=device)
        start = self.window_start
        window = range(0) if start is None else range(start, start + self.window_size)
        return denoising_path(schedule, window, self.ode_steps, self.timestep_shift)

    @property
    def num_trained_steps(self) -> int:
        """Steps of every image that an objective trains on: those of the window, or noised copies."""
        return len(self.forward_times) if self.window_start is None else self.window_size

    def without_window(self) -> DenoisingConfig:
        """A deterministic path with equally many evaluations of the network, for an image that is not trained on."""
        steps = None if self.ode_steps is None else self.ode_steps + self.window_size
        return replace(self, window_start=None, window_size=0, forward_times=(), ode_steps=steps)

    def branches(self, guidance: Guidance) -> tuple[str, ...]:
        """Guidance branches that at least one step needs, `"full"` first; a context is prefilled for no other."""
        times = flow_timesteps(self.num_timesteps, self.timestep_shift)[:-1]
        return max((guidance.branches_at(t) for t in times), key=len)


@torch.no_grad()
def denoise(
    model: UnifiedModel,
    cache: Cache,
    noise: torch.Tensor,
    grid: tuple[int, int],
    config: DenoisingConfig,
    transition_noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[DenoisingWindow | None]]:
    """
    Paint one image per sample.

    Guidance branches run as one batch. The cache holds the rows of each branch, in the guidance's order. Where a step
    needs fewer branches, only their rows are evaluated.

    Args:
        model ([`UnifiedModel`]): Predicts velocities.
        cache ([`Cache`]): The model's cache with `branches * samples` rows.
        noise (`torch.Tensor` of shape `(samples, tokens, channels)`): Initial states.
        grid (`tuple[int, int]`): Rows and columns of tokens.
        config ([`DenoisingConfig`]): Schedule, guidance, solver and window.
        transition_noise (`torch.Tensor` of shape `(samples * forks, window_size, tokens, channels)`, *optional*):
            Noise of the window's transitions; required with a window. Several `forks` of a sample, one after the
            other, share its context, its initial noise and every evaluation up to that of the first stochastic step.

    Returns:
        `tuple[torch.Tensor, list[DenoisingWindow | None]]`: Clean latents `(samples * forks, tokens, channels)`, fp32,
        and the window of each.
    """
    guidance = model.guidance(config.guidance)
    path = config.path(noise.device)
    timesteps, window = path.timesteps, path.window
    solver = ODE_SOLVERS.get(config.ode_solver)
    latents = noise.float()
    states, log_probs = [], []
    evaluations: list[VelocityEvaluation] = []
    last_branches: tuple[str, ...] = ()
    for step in range(len(timesteps) - 1):
        t, t_next = timesteps[step], timesteps[step + 1]
        branches = guidance.branches_at(t)
        rows = cache.head(len(branches) * len(noise))
        velocity = _guided_velocity(model, rows, latents, grid, t, guidance)
        if step not in window:
            if branches != last_branches:
                evaluations = []
            evaluations = [*evaluations, VelocityEvaluation(t, latents, velocity)][-solver.order :]
            latents, last_branches = solver.step(evaluations, t_next), branches
            continue
        if not states:
            forks = len(transition_noise) // len(noise)
            latents, velocity = (x.repeat_interleave(forks, dim=0) for x in (latents, velocity))
            states.append(latents)
        evaluations, step_noise = [], transition_noise[:, step - window.start].to(noise.device)
        output = transition(config.sde_type, latents, velocity, t, t_next, config.noise_level, noise=step_noise)
        latents = output.next_latents
        states.append(latents)
        log_probs.append(output.log_prob)
    if not states:
        return latents, [None] * len(noise)
    times = timesteps[window.start : window.stop + 1].cpu()
    return latents, _windows(states, log_probs, times, config.window_start)


def _guided_velocity(
    model: UnifiedModel,
    cache: Cache,
    latents: torch.Tensor,
    grid: tuple[int, int],
    t: torch.Tensor,
    guidance: Guidance,
) -> torch.Tensor:
    """Guided velocity of `latents` `(samples, tokens, channels)` at time `t`, of the same shape, fp32."""
    branches = guidance.branches_at(t)
    velocities = model.predict_velocity(cache, latents.repeat(len(branches), 1, 1), grid, t)
    if model.work is not None:
        num_images = cache.num_rows // len(branches)
        model.work.count_denoising(branches, num_images, model.denoising_tokens(cache, grid))
    chunks = velocities.float().chunk(len(branches))
    return guidance.combine(dict(zip(branches, chunks, strict=True)))


def _windows(
    states: Sequence[torch.Tensor], log_probs: Sequence[torch.Tensor], timesteps: torch.Tensor, start: int
) -> list[DenoisingWindow]:
    """
    The window of each sample.

    Args:
        states (`Sequence[torch.Tensor]`): K + 1 states `(samples, tokens, channels)`.
        log_probs (`Sequence[torch.Tensor]`): K log-probabilities `(samples,)` of the transitions between them.
        timesteps (`torch.Tensor` of shape `(K + 1,)`): Times of the states.
        start (`int`): Index of the first state in the schedule.
    """
    stacked, stacked_log_probs = torch.stack(list(states), dim=1).cpu(), torch.stack(list(log_probs), dim=1).cpu()
    return [
        DenoisingWindow(latents=latents, timesteps=timesteps, start=start, log_probs=values)
        for latents, values in zip(stacked, stacked_log_probs, strict=True)
    ]
