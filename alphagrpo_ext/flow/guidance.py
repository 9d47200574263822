# SPDX-License-Identifier: Apache-2.0

"""Classifier-free guidance: the user's settings, the pure pieces that families build on, and plain guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alphagrpo_ext.ranges import UnitFloat, check_ranges


RENORM_TYPES = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class GuidanceConfig:
    """
    Settings of guidance. A model family makes its guidance from them, and says which of them it supports.

    Args:
        text_scale (`float`, *optional*, defaults to `4.0`):
            Scale of the text condition; at most 1 switches all guidance off.
        image_scale (`float`, *optional*, defaults to `1.0`):
            Scale of the image condition; at most 1 switches it off.
        interval (`tuple[float, float]`, *optional*, defaults to `(0.4, 1.0)`):
            Half-open interval `(low, high]` of shifted times that are guided.
        renorm_type (`str`, *optional*, defaults to `"global"`):
            `"global"` compares norms over all tokens and channels of a sample, `"channel"` over the channels of each
            token. `"text_channel"` does the latter after text guidance and before image guidance.
        renorm_min (`float`, *optional*, defaults to `0.0`):
            Least factor in [0, 1] that renormalisation may scale by. 1 switches it off.

    Raises:
        `ValueError`: If `renorm_type` is unknown, or `renorm_min` or `interval` is out of range.
    """

    text_scale: float = 4.0
    image_scale: float = 1.0
    interval: tuple[UnitFloat, UnitFloat] = (0.4, 1.0)
    renorm_type: str = "global"
    renorm_min: UnitFloat = 0.0

    def __post_init__(self) -> None:
        if self.renorm_type not in RENORM_TYPES:
            raise ValueError(f"unknown renorm_type '{self.renorm_type}', available: {', '.join(RENORM_TYPES)}")
        check_ranges(self)
        if len(self.interval) != 2 or self.interval[0] > self.interval[1]:
            raise ValueError(f"interval must be (low, high) with low <= high, but is {self.interval}")

    @property
    def effective(self) -> GuidanceConfig:
        """Settings with the same effect, which are equal for all settings without any: those that switch guidance off."""
        return self if self.text_scale > 1 else GuidanceConfig(text_scale=1.0)


@dataclass(frozen=True)
class PlainGuidance:
    """
    Plain classifier-free guidance: away from the velocity of a negative prompt, or of an empty context. Families with
    no guidance of their own use it.

    Args:
        settings ([`GuidanceConfig`]):
            The settings, of which `image_scale` has no effect. `"text_channel"` is `"channel"`, because no image guidance
            follows that of the text.
    """

    settings: GuidanceConfig

    @property
    def branches(self) -> tuple[str, ...]:
        """`"full"`, and `"negative"` where the text scale has an effect."""
        return ("full", "negative") if self.settings.text_scale > 1 else ("full",)

    def branches_at(self, t: float | torch.Tensor) -> tuple[str, ...]:
        """The branches that are needed at time `t`."""
        return self.branches if in_interval(t, self.settings.interval) else ("full",)

    def combine(self, velocities: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Guided velocity, scaled back to at most the norm of `velocities["full"]`.

        Args:
            velocities (`Mapping[str, torch.Tensor]`): A velocity `(..., tokens, channels)` for every branch.
            mask (`torch.Tensor` of shape `(..., tokens)`, *optional*): False on padding.

        Returns:
            `torch.Tensor` of shape `(..., tokens, channels)`, fp32.
        """
        full = velocities["full"].float()
        if "negative" not in velocities:
            return full
        guided = extrapolate(velocities["negative"].float(), full, self.settings.text_scale)
        is_per_token = self.settings.renorm_type in ("channel", "text_channel")
        return renormalize(guided, full, self.settings.renorm_min, per_token=is_per_token, mask=mask)


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


def extrapolate(origin: torch.Tensor, target: torch.Tensor, scale: float) -> torch.Tensor:
    """The point at `scale` on the line from `origin` (0) to `target` (1), both of any one shape."""
    return origin + scale * (target - origin)


def renormalize(
    guided: torch.Tensor,
    full: torch.Tensor,
    renorm_min: float,
    per_token: bool,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Scale a guided velocity down to the norm of the unguided one, and never up.

    Args:
        guided, full (`torch.Tensor` of shape `(..., tokens, channels)`): Velocities with and without guidance.
        renorm_min (`float`): Least factor.
        per_token (`bool`): Whether norms are those of single tokens instead of whole samples.
        mask (`torch.Tensor` of shape `(..., tokens)`, *optional*): False on padding, which does not count in a norm.

    Returns:
        `torch.Tensor` of shape `(..., tokens, channels)`.
    """

    def norm(velocity: torch.Tensor) -> torch.Tensor:
        if per_token:
            return torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
        if mask is not None:
            velocity = velocity.masked_fill(~mask[..., None], 0)
        return torch.linalg.vector_norm(velocity, dim=(-2, -1), keepdim=True)

    return guided * (norm(full) / (norm(guided) + 1e-8)).clamp(renorm_min, 1)
