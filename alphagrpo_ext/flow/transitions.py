# SPDX-License-Identifier: Apache-2.0

"""
One step of the denoising path: deterministic, or stochastic with a log-probability.

The same [`transition`] samples a step at rollout and scores it in training, so the two cannot differ. States, means
and log-probabilities are fp32 in every precision of the model: a bf16 state would change the ratio of new to old
probability by more than its clip range.

A log-probability is averaged over latent elements, so the ratio for a given change of the mean depends on the
resolution, and so does the clip range that is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TransitionOutput:
    """
    A stochastic step, sampled or scored.

    Args:
        next_latents (`torch.Tensor` of shape `(..., tokens, channels)`):
            The state after the step, fp32 and detached: an action is data.
        log_prob (`torch.Tensor` of shape `(...)`):
            Log-density of `next_latents` in nats per element. For `"flow_cps"`, see [`negative_square`].
        mean (`torch.Tensor` of shape `(..., tokens, channels)`): Mean of the step's Gaussian.
        std (`torch.Tensor` of shape `(..., 1, 1)`): Standard deviation, the same for all elements of a state.
    """

    next_latents: torch.Tensor
    log_prob: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def ode_step(
    latents: torch.Tensor, velocity: torch.Tensor, t: float | torch.Tensor, t_next: float | torch.Tensor
) -> torch.Tensor:
    """
    Deterministic Euler step `x + v dt` with `dt = t_next - t`. It has no log-probability.

    Args:
        latents (`torch.Tensor` of shape `(..., tokens, channels)`): State x at time `t`.
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`): Predicted `v = eps - x_0`.
        t (`float` or `torch.Tensor`): Time in (0, 1], broadcastable to the leading dimensions of `latents`.
        t_next (`float` or `torch.Tensor`): Time after the step, in [0, t).

    Returns:
        `torch.Tensor` of shape `(..., tokens, channels)`: The state at `t_next`, fp32.
    """
    t, t_next = _time(t, latents), _time(t_next, latents)
    return latents.float() + velocity.float() * (t_next - t)


def flow_sde(
    latents: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Flow-SDE step: `mean = x (1 + sigma^2 dt / (2 t)) + v (1 + sigma^2 (1 - t) / (2 t)) dt`, `std = sigma sqrt(-dt)`,
    with `sigma = a sqrt(t / (1 - t))` and `dt = t_next - t`.

    This is the Euler-Maruyama step of the SDE with the same marginals as the ODE, the update rule of Flow-GRPO
    (https://huggingface.co/papers/2505.05470). In the first step of a path, where `t = 1`, sigma is computed with
    `1 - t_next`.

    Args:
        latents (`torch.Tensor` of shape `(..., tokens, channels)`): State at time `t`, fp32.
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`): Predicted velocity, fp32.
        t (`torch.Tensor` of shape `(..., 1, 1)`): Time in (0, 1].
        t_next (`torch.Tensor` of shape `(..., 1, 1)`): Time after the step, in [0, t).
        noise_level (`float`): The level a, at least 0. At 0 the mean is the ODE's next state.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Mean of shape `(..., tokens, channels)` and standard deviation of shape
        `(..., 1, 1)` of the next state.
    """
    dt = t_next - t
    variance_rate = noise_level**2 * t / (1 - torch.where(t < 1, t, t_next))
    drift = variance_rate / (2 * t)
    mean = latents * (1 + drift * dt) + velocity * (1 + drift * (1 - t)) * dt
    return mean, torch.sqrt(-variance_rate * dt)


def flow_cps(
    latents: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Flow-CPS step: `std = t' sin(a pi / 2)`, `mean = (1 - t') x_0 + sqrt(t'^2 - std^2) x_1`, with the predicted image
    `x_0 = x - t v` and the predicted noise `x_1 = x + (1 - t) v`.

    Image and total noise keep the weights `1 - t'` and `t'` of the schedule, and fresh noise replaces a part of the
    predicted noise ("coefficients-preserving", https://huggingface.co/papers/2509.05952). Unlike [`flow_sde`], it adds
    noise per step and not per unit of time. With more steps at one level the path gets noisier, and it does not
    converge to the marginals of the ODE. A step to `t' = 0` has no noise.

    Arguments and return values are those of [`flow_sde`], with `noise_level` in [0, 1].

    Raises:
        `ValueError`: If `noise_level` is out of range.
    """
    if not 0 <= noise_level <= 1:
        raise ValueError(f"noise_level of flow_cps must be in [0, 1], but is {noise_level}")
    angle = noise_level * math.pi / 2
    image = latents - t * velocity
    noise = latents + (1 - t) * velocity
    # sqrt(t_next^2 - std^2), without the cancellation.
    mean = (1 - t_next) * image + t_next * math.cos(angle) * noise
    return mean, t_next * math.sin(angle)


TRANSITIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "flow_sde": flow_sde,
    "flow_cps": flow_cps,
}


def log_density(mean_square: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Gaussian log-density per element, from mean squared distances to the mean and standard deviations, all `(...)`.
    """
    return -mean_square / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2


def negative_square(mean_square: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Log-probability `-||x' - mean||^2` of Flow-CPS as in its authors' code (https://github.com/IamCreateAI/FlowCPS),
    from mean squared distances and standard deviations, both `(...)`.

    The density has the factor `1 / (2 std^2)`, which grows towards the image. Without it, the gradient of each step is
    the density's times `2 std^2`. The ratio of GRPO-Guard does not depend on this.
    """
    return -mean_square


LOG_PROBS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "flow_sde": log_density,
    "flow_cps": negative_square,
}


def transition(
    kind: str,
    latents: torch.Tensor,
    velocity: torch.Tensor,
    t: float | torch.Tensor,
    t_next: float | torch.Tensor,
    noise_level: float,
    *,
    noise: torch.Tensor | None = None,
    next_latents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> TransitionOutput:
    """
    Sample one stochastic step from `noise`, or score the step to `next_latents`.

    Steps along the leading dimensions are independent of each other, each at its own time.

    Args:
        kind (`str`): A name in `TRANSITIONS`: `"flow_sde"` or `"flow_cps"`.
        latents (`torch.Tensor` of shape `(..., tokens, channels)`): State at time `t`.
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`):
            Predicted velocity. The gradient flows through it.
        t (`float` or `torch.Tensor`): Time in (0, 1], broadcastable to the leading dimensions.
        t_next (`float` or `torch.Tensor`):
            The following point of the schedule, in [0, t), broadcastable to the leading dimensions.
        noise_level (`float`): How much noise a step adds; positive, for `"flow_cps"` at most 1.
        noise (`torch.Tensor` of shape `(..., tokens, channels)`, *optional*):
            Standard normal noise to sample with. Drawn by the caller, so that a sample need not depend on its batch.
        next_latents (`torch.Tensor` of shape `(..., tokens, channels)`, *optional*):
            State at time `t_next` to score. Exactly one of it and `noise` must be given.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
            Booleans, `True` for tokens that exist, broadcastable. Padding does not count in the log-probability.

    Returns:
        [`TransitionOutput`]

    Raises:
        `ValueError`: If an argument is out of range or has a wrong shape, or if a step has no noise and thus no
            density, as the last one of `"flow_cps"`.
    """
    _check_transition(kind, latents, velocity, noise, next_latents)
    t, t_next = _time(t, latents), _time(t_next, latents)
    mean, std = TRANSITIONS[kind](latents.float(), velocity.float(), t, t_next, noise_level)
    if not torch.all((std > 0) & (t_next < t)):
        raise ValueError(
            f"a step of '{kind}' with noise_level {noise_level} from t = {t.flatten().tolist()} to t_next = "
            f"{t_next.flatten().tolist()} has no density: it needs t_next < t and a positive standard deviation"
        )
    if next_latents is None:
        next_latents = mean + std * noise
    # The action is data. Otherwise the gradient of a step that is sampled here would cancel.
    next_latents = next_latents.detach().float()
    # All elements have the same deviation, so only the square is averaged.
    log_prob = LOG_PROBS[kind](_mean_square(next_latents - mean, mask), std[..., 0, 0])
    return TransitionOutput(next_latents, log_prob, mean, std)


def check_densities(kind: str, timesteps: torch.Tensor, noise_level: float) -> None:
    """
    Check that all steps between consecutive times have a density, before anything is sampled.

    Args:
        kind (`str`): A name in `TRANSITIONS`.
        timesteps (`torch.Tensor` of shape `(steps + 1,)`): Times of the states, falling.
        noise_level (`float`): Noise level of the steps.

    Raises:
        `ValueError`: At the first step without a density; the message says what to change.
    """
    blank = torch.zeros(1, 1)
    for t, t_next in zip(timesteps[:-1], timesteps[1:], strict=True):
        _, std = TRANSITIONS[kind](blank, blank, t, t_next, noise_level)
        # The density divides by the variance, which can be 0 in fp32 where the deviation is not.
        if not (t_next < t and 0 < std.square() < torch.inf):
            advice = (
                "end the window before the last step of the schedule, or take sde_type='flow_sde'"
                if kind == "flow_cps" and t_next == 0
                else "take a noise_level and a timestep_shift nearer to 1"
            )
            raise ValueError(
                f"a step of '{kind}' from t = {t:.4g} to t_next = {t_next:.4g} with noise_level {noise_level} has no density, "
                f"because its standard deviation is {std.item():.3g}: {advice}"
            )


def _check_transition(
    kind: str,
    latents: torch.Tensor,
    velocity: torch.Tensor,
    noise: torch.Tensor | None,
    next_latents: torch.Tensor | None,
) -> None:
    if kind not in TRANSITIONS:
        raise ValueError(f"unknown kind of transition '{kind}', available: {', '.join(TRANSITIONS)}")
    if (noise is None) == (next_latents is None):
        raise ValueError("give either noise, to sample, or next_latents, to score")
    for name, tensor in (("velocity", velocity), ("noise", noise), ("next_latents", next_latents)):
        if tensor is not None and tensor.shape != latents.shape:
            raise ValueError(
                f"{name} must have the shape of latents, {tuple(latents.shape)}, but has {tuple(tensor.shape)}"
            )


def gaussian_kl(
    mean: torch.Tensor, mean_ref: torch.Tensor, std: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    KL divergence `(mean - mean_ref)^2 / (2 std^2)` of two steps with the same deviation, averaged over latent elements
    as the log-probability is.

    Args:
        mean (`torch.Tensor` of shape `(..., tokens, channels)`): Mean of the policy's step.
        mean_ref (`torch.Tensor` of shape `(..., tokens, channels)`): Mean of the reference's step from the same state.
        std (`torch.Tensor` of shape `(..., 1, 1)`): Positive standard deviation of both.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
            Booleans, `True` for tokens that exist, broadcastable.

    Returns:
        `torch.Tensor` of shape `(...)`: In nats per element, fp32.
    """
    return _mean_square(mean.float() - mean_ref.float(), mask) / (2 * std[..., 0, 0].float() ** 2)


def velocity_mse(velocity: torch.Tensor, velocity_ref: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean squared difference of two velocities: a divergence that weighs all times equally, as in UniGRPO
    (https://huggingface.co/papers/2603.23500).

    Args:
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`): The policy's velocity.
        velocity_ref (`torch.Tensor` of shape `(..., tokens, channels)`): The reference's velocity at the same state.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
            Booleans, `True` for tokens that exist, broadcastable.

    Returns:
        `torch.Tensor` of shape `(...)`: fp32.
    """
    return _mean_square(velocity.float() - velocity_ref.float(), mask)


def _time(t: float | torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """`t` in fp32, with two dimensions appended so that it broadcasts over tokens and channels."""
    t = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    leading = latents.shape[:-2]
    if t.dim() > len(leading) or any(n not in (1, m) for n, m in zip(t.shape[::-1], leading[::-1], strict=False)):
        raise ValueError(f"a time of shape {tuple(t.shape)} does not fit latents of shape {tuple(latents.shape)}")
    return t[..., None, None]


def _mean_square(difference: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[`latent_mean`] of the square."""
    if mask is not None:
        # Before the square, so that padding has no gradient, however large its values are.
        difference = difference.masked_fill(~mask[..., None], 0)
    return latent_mean(difference.square(), mask)


def latent_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean over channels, and over the tokens that exist.

    Args:
        values (`torch.Tensor` of shape `(..., tokens, channels)`): What to average.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
            Booleans, `True` for tokens that exist, broadcastable.

    Returns:
        `torch.Tensor` of shape `(...)`
    """
    if mask is None:
        return values.mean(dim=(-2, -1))
    per_token = values.masked_fill(~mask[..., None], 0).mean(dim=-1)
    return per_token.sum(dim=-1) / mask.sum(dim=-1)
