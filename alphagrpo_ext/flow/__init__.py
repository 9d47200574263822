# SPDX-License-Identifier: Apache-2.0

"""The mathematics of the image side: pure functions of tensors, without a model or a trainer.

Time `t` runs from 1 (noise) to 0 (image), `x_t = (1 - t) x_0 + t eps`, and a model predicts `v = eps - x_0`. A state
is a tensor of shape `(..., tokens, channels)`.
"""

from .forward_process import draw_times, forward_windows, noised_latents
from .guidance import RENORM_TYPES, GuidanceConfig, PlainGuidance, extrapolate, in_interval, renormalize
from .solvers import ODE_SOLVERS, Evaluation, ODESolver
from .timesteps import DenoisingPath, denoising_path, draw_window, flow_timesteps
from .transitions import (
    TRANSITIONS,
    TransitionOutput,
    flow_cps,
    flow_sde,
    gaussian_kl,
    latent_mean,
    ode_step,
    transition,
    velocity_mse,
)


__all__ = [
    "ODE_SOLVERS",
    "RENORM_TYPES",
    "TRANSITIONS",
    "DenoisingPath",
    "Evaluation",
    "GuidanceConfig",
    "ODESolver",
    "PlainGuidance",
    "TransitionOutput",
    "denoising_path",
    "draw_times",
    "draw_window",
    "extrapolate",
    "flow_cps",
    "flow_sde",
    "flow_timesteps",
    "forward_windows",
    "gaussian_kl",
    "in_interval",
    "latent_mean",
    "noised_latents",
    "ode_step",
    "renormalize",
    "transition",
    "velocity_mse",
]
