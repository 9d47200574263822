# SPDX-License-Identifier: Apache-2.0

"""Classifier-free guidance with two conditions, text and image, and its renormalisations.

As in BAGEL (https://huggingface.co/papers/2505.14683), but for one thing: norms are taken per sample, where the
original's global norm runs over the whole batch and so lets samples influence each other.
"""

from dataclasses import dataclass, replace

import torch


RENORM_TYPES = ("global", "channel", "text_channel")


def guidance_branches(text_scale: float, image_scale: float) -> tuple[str, ...]:
    """
    Names of the velocities that guidance needs, of `"full"`, `"text_dropped"` and `"image_dropped"`.

    A scale of at most 1 switches its branch off. Image guidance builds on text guidance and is off without it.

    Args:
        text_scale (`float`):
            Scale of the text condition.
        image_scale (`float`):
            Scale of the image condition.

    Returns:
        `tuple[str, ...]`: The names, `"full"` first.
    """
    if text_scale <= 1:
        return ("full",)
    if image_scale <= 1:
        return ("full", "text_dropped")
    return ("full", "text_dropped", "image_dropped")


def in_interval(t: float | torch.Tensor, interval: tuple[float, float]) -> torch.Tensor:
    """
    Whether the shifted time `t` lies in the half-open interval `(low, high]`.

    Args:
        t (`float` or `torch.Tensor`):
            Time or times.
        interval (`tuple[float, float]`):
            The bounds; only the upper one is included.

    Returns:
        `torch.Tensor` of the shape of `t`: Booleans; a single one can stand in an `if`.
    """
    low, high = interval
    # In fp32 on both sides, so that a time that equals a bound does so as a tensor and as a float.
    t = torch.as_tensor(t, dtype=torch.float32)
    return (t > low) & (t <= high)


def guide(
    velocity: torch.Tensor,
    velocity_text_dropped: torch.Tensor | None = None,
    velocity_image_dropped: torch.Tensor | None = None,
    *,
    text_scale: float,
    image_scale: float,
    renorm_type: str = "global",
    renorm_min: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Guided velocity: away from the branches that miss a condition, then scaled back to at most the norm of `velocity`.

    Args:
        velocity (`torch.Tensor` of shape `(..., tokens, channels)`):
            Velocity given all conditions.
        velocity_text_dropped (`torch.Tensor` of shape `(..., tokens, channels)`, *optional*):
            Velocity without the last text. Needed if `text_scale > 1`.
        velocity_image_dropped (`torch.Tensor` of shape `(..., tokens, channels)`, *optional*):
            Velocity without images. Needed if `text_scale > 1` and `image_scale > 1`.
        text_scale (`float`):
            Scale of the text condition. At most 1: `velocity` is returned, whatever `image_scale` is.
        image_scale (`float`):
            Scale of the image condition. At most 1: off.
        renorm_type (`str`, *optional*, defaults to `"global"`):
            `"global"` compares norms over all tokens and channels of a sample, `"channel"` over the channels of each
            token, and `"text_channel"` does the latter after text guidance but before image guidance.
        renorm_min (`float`, *optional*, defaults to `0.0`):
            Least factor in [0, 1] that renormalisation may scale by. 1 switches it off.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*):
            Booleans, `True` for tokens that exist, broadcastable. Padding does not count in the norm.

    Returns:
        `torch.Tensor` of shape `(..., tokens, channels)`: The guided velocity, fp32.

    Raises:
        `ValueError`: If `renorm_type` is unknown, `renorm_min` out of range, or a needed velocity missing.
    """
    _check_renorm(renorm_type, renorm_min)
    given = {"full": velocity, "text_dropped": velocity_text_dropped, "image_dropped": velocity_image_dropped}
    branches = {name: given[name] for name in guidance_branches(text_scale, image_scale)}
    missing = [f"velocity_{name}" for name, value in branches.items() if value is None]
    if missing:
        raise ValueError(f"text_scale {text_scale} and image_scale {image_scale} need {' and '.join(missing)}")
    branches = {name: value.float() for name, value in branches.items()}

    guided = full = branches["full"]
    if "text_dropped" in branches:
        guided = _extrapolate(branches["text_dropped"], guided, text_scale)
        if renorm_type == "text_channel":
            guided = _renormalize(guided, full, renorm_min, per_token=True, mask=mask)
    if "image_dropped" in branches:
        guided = _extrapolate(branches["image_dropped"], guided, image_scale)
    if "text_dropped" in branches and renorm_type != "text_channel":
        guided = _renormalize(guided, full, renorm_min, per_token=renorm_type == "channel", mask=mask)
    return guided


@dataclass(frozen=True)
class GuidanceConfig:
    """
    Settings of [`guide`], with the part of the path that they apply to.

    Args:
        text_scale (`float`, *optional*, defaults to `4.0`):
            Scale of the text condition; at most 1 switches all guidance off.
        image_scale (`float`, *optional*, defaults to `1.0`):
            Scale of the image condition; at most 1 switches it off.
        interval (`tuple[float, float]`, *optional*, defaults to `(0.4, 1.0)`):
            Half-open interval `(low, high]` of shifted times that are guided.
        renorm_type (`str`, *optional*, defaults to `"global"`):
            `"global"`, `"channel"` or `"text_channel"`.
        renorm_min (`float`, *optional*, defaults to `0.0`):
            Least factor in [0, 1] that renormalisation may scale by.

    Example:

    ```python
    guidance = GuidanceConfig(text_scale=4.0).at(t)
    velocities = [predict(branch) for branch in guidance.branches]
    velocity = guidance.guide(*velocities)
    ```
    """

    text_scale: float = 4.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm_type: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        _check_renorm(self.renorm_type, self.renorm_min)
        if len(self.interval) != 2 or self.interval[0] > self.interval[1]:
            raise ValueError(f"interval must be (low, high) with low <= high, but is {self.interval}")

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the velocities that [`~GuidanceConfig.guide`] takes, in its order."""
        return guidance_branches(self.text_scale, self.image_scale)

    def at(self, t: float | torch.Tensor) -> "GuidanceConfig":
        """The settings at one time: these inside the interval, and no guidance outside it."""
        return self if in_interval(t, self.interval) else replace(self, text_scale=1.0, image_scale=1.0)

    def guide(
        self,
        velocity: torch.Tensor,
        velocity_text_dropped: torch.Tensor | None = None,
        velocity_image_dropped: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[`guide`] with these settings. It does not look at the time: see [`~GuidanceConfig.at`]."""
        return guide(
            velocity,
            velocity_text_dropped,
            velocity_image_dropped,
            text_scale=self.text_scale,
            image_scale=self.image_scale,
            renorm_type=self.renorm_type,
            renorm_min=self.renorm_min,
            mask=mask,
        )


def _check_renorm(renorm_type: str, renorm_min: float) -> None:
    if renorm_type not in RENORM_TYPES:
        raise ValueError(f"unknown renorm_type '{renorm_type}', available: {', '.join(RENORM_TYPES)}")
    if not 0 <= renorm_min <= 1:
        raise ValueError(f"renorm_min must be in [0, 1], but is {renorm_min}")


def _extrapolate(origin: torch.Tensor, target: torch.Tensor, scale: float) -> torch.Tensor:
    return origin + scale * (target - origin)


def _renormalize(
    guided: torch.Tensor, full: torch.Tensor, renorm_min: float, per_token: bool, mask: torch.Tensor | None
) -> torch.Tensor:
    """Scale `guided` down to the norm of `full`, by no less than `renorm_min`, and never up."""

    def norm(velocity: torch.Tensor) -> torch.Tensor:
        if per_token:
            return torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
        if mask is not None:
            velocity = velocity.masked_fill(~mask[..., None], 0)
        return torch.linalg.vector_norm(velocity, dim=(-2, -1), keepdim=True)

    return guided * (norm(full) / (norm(guided) + 1e-8)).clamp(renorm_min, 1)
