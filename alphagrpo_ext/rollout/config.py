# SPDX-License-Identifier: Apache-2.0

"""Settings of the rollout generator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveUnitFloat, check_ranges
from alphagrpo_ext.rollout.denoising import DenoisingConfig


@dataclass(frozen=True)
class RolloutConfig:
    """
    How trajectories are sampled.

    Args:
        height, width (`int`):
            Size of painted images, in pixels.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest thought, in tokens.
        temperature, top_k, top_p (`float`, `int`, `float`, *optional*, defaults to `1.0`, `0`, `1.0`):
            Sampling of thoughts; a temperature of 0 takes the likeliest token.
        denoising ([`DenoisingConfig`], *optional*):
            Schedule, guidance and stochastic window of images.
        batch_size (`int`, *optional*):
            Number of samples that are generated at once, rounded to whole groups. `None` takes all.
        branches_per_thought (`int`, *optional*, defaults to `1`):
            Number of consecutive samples of a group that share, in their first turn, the thought, the initial noise
            and the path up to the stochastic window. Thought and initial noise are those of the first of them. The
            noise of the window tells them apart.
    """

    height: PositiveInt
    width: PositiveInt
    max_new_tokens: NonNegativeInt | None = 512
    temperature: NonNegativeFloat = 1.0
    top_k: Annotated[int, "[-1, inf)"] = 0
    top_p: PositiveUnitFloat = 1.0
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    batch_size: PositiveInt | None = None
    branches_per_thought: PositiveInt = 1

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.branches_per_thought > 1 and not (
            self.denoising.window_start is not None and self.denoising.window_size
        ):
            raise ValueError(
                f"branches_per_thought={self.branches_per_thought} needs a stochastic window: without one, images that share "
                f"thought and initial noise are the same"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of painted images."""
        return self.height, self.width

    def deterministic(self) -> RolloutConfig:
        """These settings without a stochastic window, and so with one image per thought."""
        return replace(self, denoising=self.denoising.without_window(), branches_per_thought=1)

    def grid(self, model: UnifiedModel) -> tuple[int, int]:
        """
        Rows and columns of latent tokens.

        Raises:
            `ValueError`: If the model cannot paint this size.
        """
        return model.latent_grid(self.height, self.width)
