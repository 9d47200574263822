# SPDX-License-Identifier: Apache-2.0

"""The arguments of sampling, the same in every recipe that only paints. They are parsed without importing a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from alphagrpo_ext.ranges import (
    AtLeastTwo,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
    check_ranges,
)


if TYPE_CHECKING:
    from alphagrpo_ext.rollout.config import RolloutConfig


@dataclass
class SamplingArguments:
    """
    How thoughts and images are sampled. The defaults suit the packaged model; for a large one set size, steps and guidance.

    Each argument is described by the help text of its field.
    """

    dtype: str = field(default="float32", metadata={"help": "Data type of the weights, e.g. 'bfloat16'."})
    num_timesteps: AtLeastTwo = field(default=11, metadata={"help": "Points of the denoising schedule."})
    timestep_shift: PositiveFloat = field(default=1.0, metadata={"help": "Shift of the schedule towards noise."})
    ode_solver: str = field(
        default="euler", metadata={"help": "Rule of the denoising steps: 'euler', 'ab2', 'dpmpp_2m'."}
    )
    ode_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Number of denoising steps; those of the schedule by default."}
    )
    cfg_text_scale: float = field(default=1.0, metadata={"help": "Guidance scale of text; at most 1 is off."})
    cfg_img_scale: float = field(default=1.0, metadata={"help": "Guidance scale of images; at most 1 is off."})
    cfg_interval: list[UnitFloat] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "Half-open interval of guided times."}
    )
    cfg_renorm_type: str = field(default="global", metadata={"help": "'global', 'channel' or 'text_channel'."})
    max_new_tokens: PositiveInt = field(default=48, metadata={"help": "Longest text, in tokens."})
    temperature: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Temperature of texts; 0 takes the likeliest token."}
    )
    top_p: PositiveUnitFloat = field(
        default=1.0, metadata={"help": "Share of the likeliest tokens that texts are drawn from."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.cfg_interval) != 2:
            raise ValueError(f"cfg_interval takes two numbers, but is {self.cfg_interval}")

    def rollout(self, height: int, width: int) -> RolloutConfig:
        """
        Args:
            height, width (`int`): Size of images, in pixels.

        Raises:
            `ValueError`: If an argument is out of range.
        """
        from alphagrpo_ext.flow.guidance import GuidanceConfig
        from alphagrpo_ext.rollout.config import RolloutConfig
        from alphagrpo_ext.rollout.denoising import DenoisingConfig

        guidance = GuidanceConfig(
            self.cfg_text_scale, self.cfg_img_scale, tuple(self.cfg_interval), self.cfg_renorm_type
        )
        return RolloutConfig(
            height,
            width,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            denoising=DenoisingConfig(
                self.num_timesteps,
                self.timestep_shift,
                guidance,
                ode_solver=self.ode_solver,
                ode_steps=self.ode_steps,
            ),
        )
