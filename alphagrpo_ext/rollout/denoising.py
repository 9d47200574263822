# SPDX-License-Identifier: Apache-2.0

"""The denoising path of a group of samples: deterministic steps, and a window of stochastic ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.solvers import ODE_SOLVERS, Evaluation
from alphagrpo_ext.flow.timesteps import DenoisingPath, denoising_path, flow_timesteps
from alphagrpo_ext.flow.transitions import TRANSITIONS, transition
from alphagrpo_ext.trajectory import DenoisingWindow


if TYPE_CHECKING:
    from alphagrpo_ext.models.contract import UnifiedModel


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
            Rule of the deterministic steps, a name in `ODE_SOLVERS`. Its memory ends at the stochastic window and where
            guidance is switched on or off.
        ode_steps (`int`, *optional*):
            Number of deterministic steps: those outside the window, shared out to the stretches before and after it in
            proportion to their steps of the schedule, at least one each. The network is evaluated once for each of them and
            for each of the window's. `None` takes the steps of the schedule.
        forward_times (`tuple[float, ...]`, *optional*):
            Times of the noised copies that are made of a deterministically painted image, to be trained on.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    sde_type: str = "flow_sde"
    noise_level: float = 0.7
    window_start: int | None = None
    window_size: int = 0
    ode_solver: str = "euler"
    ode_steps: int | None = None
    forward_times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, but is {self.num_timesteps}")
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
            self.path()
        except ValueError as error:
            raise ValueError(f"ode_steps={self.ode_steps}: {error}") from error

    def path(self, device: torch.device | str | None = None) -> DenoisingPath:
        """The states of the path and the stochastic steps between them."""
        schedule = flow_timesteps(self.num_timesteps, self.timestep_shift, device=device)
        start = self.window_start
        window = range(0) if start is None else range(start, start + self.window_size)
        return denoising_path(schedule, window, self.ode_steps, self.timestep_shift)

    def without_window(self) -> DenoisingConfig:
        """A deterministic path with as many evaluations of the network, of an image that is not trained on."""
        steps = None if self.ode_steps is None else self.ode_steps + self.window_size
        return replace(self, window_start=None, window_size=0, forward_times=(), ode_steps=steps)

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that at least one step needs, `"full"` first; a context is prefilled for no other."""
        times = flow_timesteps(self.num_timesteps, self.timestep_shift)[:-1]
        return max((self.guidance.at(t).branches for t in times), key=len)


@torch.no_grad()
def denoise(
    model: UnifiedModel,
    cache: Any,
    noise: torch.Tensor,
    grid: tuple[int, int],
    config: DenoisingConfig,
    transition_noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[DenoisingWindow | None]]:
    """
    Paint one image a sample.

    Guidance branches run as one batch: the cache holds the rows of the full branch first, then those of the other
    branches in the order of `BRANCHES`. Where a step needs fewer branches, only their rows are evaluated.

    Args:
        model ([`UnifiedModel`]): Predicts velocities.
        cache: The model's cache with `branches * samples` rows.
        noise (`torch.Tensor` of shape `(samples, tokens, channels)`): Initial states.
        grid (`tuple[int, int]`): Rows and columns of tokens.
        config ([`DenoisingConfig`]): Schedule, guidance, solver and window.
        transition_noise (`torch.Tensor` of shape `(samples * forks, window_size, tokens, channels)`, *optional*):
            Noise of the window's transitions; required with a window. With several `forks`, a sample's path forks in its
            first stochastic step: consecutive ones share its context, its initial noise and every evaluation up to that
            step's.

    Returns:
        `tuple[torch.Tensor, list[DenoisingWindow | None]]`: Clean latents `(samples * forks, tokens, channels)`, fp32,
        and the window of each.
    """
    num_samples = len(noise)
    path = config.path(noise.device)
    timesteps, window = path.timesteps, path.window
    solver = ODE_SOLVERS.get(config.ode_solver)
    latents = noise.float()
    states, log_probs = [], []
    evaluations: list[Evaluation] = []
    last_branches: tuple[str, ...] = ()
    for step in range(len(timesteps) - 1):
        t, t_next = timesteps[step], timesteps[step + 1]
        guidance = config.guidance.at(t)
        num_branches = len(guidance.branches)
        velocities = model.predict_velocity(
            cache.head(num_branches * num_samples), latents.repeat(num_branches, 1, 1), grid, t
        )
        if model.work is not None:
            model.work.count_denoising(guidance.branches, num_samples, model.image_slots(grid))
        velocity = guidance.guide(*velocities.float().chunk(num_branches))
        if step not in window:
            # Noise and a change of guidance make the velocity jump, across which nothing can be extrapolated.
            if guidance.branches != last_branches:
                evaluations = []
            evaluations = [*evaluations, Evaluation(t, latents, velocity)][-solver.order :]
            latents, last_branches = solver.step(evaluations, t_next), guidance.branches
            continue
        if not states:
            forks = len(transition_noise) // num_samples
            latents, velocity = (x.repeat_interleave(forks, dim=0) for x in (latents, velocity))
            states.append(latents)
        output = transition(
            config.sde_type,
            latents,
            velocity,
            t,
            t_next,
            config.noise_level,
            noise=transition_noise[:, step - window.start].to(noise.device),
        )
        evaluations = []
        latents = output.next_latents
        states.append(latents)
        log_probs.append(output.log_prob)
    if not states:
        return latents, [None] * num_samples
    stacked, stacked_log_probs = torch.stack(states, dim=1).cpu(), torch.stack(log_probs, dim=1).cpu()
    times = timesteps[window.start : window.stop + 1].cpu()
    windows = [
        DenoisingWindow(latents=stacked[i], timesteps=times, start=config.window_start, log_probs=stacked_log_probs[i])
        for i in range(len(stacked))
    ]
    return latents, windows
