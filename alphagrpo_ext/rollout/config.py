# SPDX-License-Identifier: Apache-2.0

"""Settings of the rollout generator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveUnitFloat, check_ranges
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.settings import TaskSettings


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
    top_k: NonNegativeInt = 0
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

    @classmethod
    def from_settings(cls, settings: TaskSettings, batch_size: int | None = None) -> RolloutConfig:
        """
        Deterministic sampling with the settings of a task. What is `None` has the default of its field.

        Args:
            settings ([`TaskSettings`]): The settings, with a size of images.
            batch_size (`int`, *optional*): As in the class.
        """

        def pick(**names: str) -> dict[str, Any]:
            values = settings.given()
            return {ours: values[name] for ours, name in names.items() if name in values}

        guidance = pick(
            text_scale="cfg_text_scale",
            image_scale="cfg_img_scale",
            interval="cfg_interval",
            renorm_type="cfg_renorm_type",
            renorm_min="cfg_renorm_min",
        )
        if "interval" in guidance:
            guidance["interval"] = tuple(guidance["interval"])
        schedule = pick(
            num_timesteps="num_timesteps",
            timestep_shift="timestep_shift",
            ode_solver="ode_solver",
            ode_steps="ode_steps",
            refine_strength="refine_strength",
        )
        thought = pick(max_new_tokens="max_completion_length", temperature="temperature", top_k="top_k", top_p="top_p")
        denoising = DenoisingConfig(guidance=GuidanceConfig(**guidance), **schedule)
        return cls(settings.image_height, settings.image_width, denoising=denoising, batch_size=batch_size, **thought)

    def to_settings(self) -> dict[str, Any]:
        """The settings that [`~RolloutConfig.from_settings`] makes this sampling of, by name, without those that are `None`."""
        denoising, guidance = self.denoising, self.denoising.guidance
        return TaskSettings(
            cfg_text_scale=guidance.text_scale,
            cfg_img_scale=guidance.image_scale,
            cfg_interval=guidance.interval,
            cfg_renorm_type=guidance.renorm_type,
            cfg_renorm_min=guidance.renorm_min,
            num_timesteps=denoising.num_timesteps,
            timestep_shift=denoising.timestep_shift,
            ode_solver=denoising.ode_solver,
            ode_steps=denoising.ode_steps,
            refine_strength=denoising.refine_strength,
            image_height=self.height,
            image_width=self.width,
            max_completion_length=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        ).given()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of painted images."""
        return self.height, self.width

    @property
    def effective(self) -> RolloutConfig:
        """Settings that sample the same. Those that differ in nothing but guidance that is off are equal."""
        guidance = self.denoising.guidance.effective
        if guidance == self.denoising.guidance:
            return self
        return replace(self, denoising=replace(self.denoising, guidance=guidance))

    def deterministic(self) -> RolloutConfig:
        """These settings without a stochastic window, and so with one image per thought."""
        return replace(self, denoising=self.denoising.without_window(), branches_per_thought=1)

    def from_noise(self) -> RolloutConfig:
        """These settings for images that start from noise alone, because there is no image to start from."""
        if self.denoising.refine_strength == 1:
            return self
        return replace(self, denoising=replace(self.denoising, refine_strength=1.0))

    def grid(self, model: UnifiedModel) -> tuple[int, int]:
        """
        Rows and columns of latent tokens.

        Raises:
            `ValueError`: If the model cannot paint this size.
        """
        return model.latent_grid(self.height, self.width)
