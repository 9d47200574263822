# SPDX-License-Identifier: Apache-2.0

"""The arguments of sampling, the same in every recipe that only paints. They are parsed without importing a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alphagrpo_ext.ranges import (
    AtLeastTwo,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
    check_ranges,
)
from alphagrpo_ext.rollout.settings import TaskSettings, read_task_settings, resolve_settings


if TYPE_CHECKING:
    from alphagrpo_ext.models.contract import UnifiedModel
    from alphagrpo_ext.rollout.config import RolloutConfig


SAMPLING_DEFAULTS = TaskSettings(
    cfg_text_scale=1.0,
    cfg_img_scale=1.0,
    cfg_interval=(0.4, 1.0),
    cfg_renorm_type="global",
    num_timesteps=11,
    timestep_shift=1.0,
    ode_solver="euler",
    max_completion_length=48,
    temperature=0.0,
    top_p=1.0,
)
"""What holds where neither the user nor the task sets it. Arguments of these names are `None` until then."""


@dataclass
class SamplingArguments:
    """
    How thoughts and images are sampled. The defaults suit the packaged model; for a large one set size, steps and guidance.

    An argument that is given holds for all tasks that a recipe samples (first images, and rounds of reflection or edits), an
    argument that is not given is what the task declares, and `task_settings` wins over both.

    Each argument is described by the help text of its field.
    """

    dtype: str = field(default="float32", metadata={"help": "Data type of the weights, e.g. 'bfloat16'."})
    num_timesteps: AtLeastTwo | None = field(
        default=None, metadata={"help": "Points of the denoising schedule; 11 by default."}
    )
    timestep_shift: PositiveFloat | None = field(
        default=None, metadata={"help": "Shift of the schedule towards noise; 1.0 by default."}
    )
    ode_solver: str | None = field(
        default=None, metadata={"help": "Rule of the denoising steps: 'euler', the default, 'ab2' or 'dpmpp_2m'."}
    )
    ode_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Number of denoising steps; those of the schedule by default."}
    )
    cfg_text_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of text; at most 1 is off. 1.0 by default."}
    )
    cfg_img_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance scale of images; at most 1 is off. By default 1.0, in tasks that refine or edit 2.0. Without "
            "guidance of text it is off."
        },
    )
    cfg_interval: list[UnitFloat] | None = field(
        default=None,
        metadata={
            "help": "Half-open interval (low, high] of guided times. By default 0.4 1.0, in tasks that refine or edit 0.0 1.0."
        },
    )
    cfg_renorm_type: str | None = field(
        default=None,
        metadata={
            "help": "'global', 'channel' or 'text_channel'. By default 'global', in tasks that refine or edit 'text_channel'."
        },
    )
    max_new_tokens: PositiveInt | None = field(
        default=None, metadata={"help": "Longest text, in tokens; 48 by default."}
    )
    temperature: NonNegativeFloat | None = field(
        default=None, metadata={"help": "Temperature of texts; 0, the default, takes the likeliest token."}
    )
    top_p: PositiveUnitFloat | None = field(
        default=None, metadata={"help": "Share of the likeliest tokens that texts are drawn from; 1.0 by default."}
    )
    task_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Settings of single tasks, as JSON or a mapping in YAML, e.g. \'{"self_reflection": {"cfg_img_scale": '
            "1.5}}', by the names of the arguments of training. They win over the argument of that name, which holds for all "
            "tasks."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.cfg_interval is not None and len(self.cfg_interval) != 2:
            raise ValueError(f"cfg_interval takes two numbers, but is {self.cfg_interval}")
        if self.task_settings:
            from alphagrpo_ext.rollout.task import TASKS

            self.task_settings = read_task_settings(self.task_settings, TASKS)

    def rollout(self, height: int, width: int, task: str = "reasoning_t2i") -> RolloutConfig:
        """
        Args:
            height, width (`int`): Size of images, in pixels, unless the task has one of its own.
            task (`str`, *optional*, defaults to `"reasoning_t2i"`): Name of the task that is sampled.

        Raises:
            `ValueError`: If an argument is out of range. The message names the task.
        """
        from alphagrpo_ext.rollout.config import RolloutConfig
        from alphagrpo_ext.rollout.task import TASKS

        given = TaskSettings(
            num_timesteps=self.num_timesteps,
            timestep_shift=self.timestep_shift,
            ode_solver=self.ode_solver,
            ode_steps=self.ode_steps,
            cfg_text_scale=self.cfg_text_scale,
            cfg_img_scale=self.cfg_img_scale,
            cfg_interval=self.cfg_interval,
            cfg_renorm_type=self.cfg_renorm_type,
            max_completion_length=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        ).given()
        defaults = {**SAMPLING_DEFAULTS.given(), "image_height": height, "image_width": width}
        own = (self.task_settings or {}).get(task, {})
        settings = TaskSettings(**resolve_settings(TASKS.get(task).settings, given, defaults, own))
        try:
            return RolloutConfig.from_settings(settings)
        except ValueError as error:
            raise ValueError(f"task '{task}': {error}") from error


@dataclass
class StoppingArguments:
    """When a round of reflection keeps the image that it looks at. Each argument is described by the help text of its field."""

    allow_stop: bool = field(
        default=False,
        metadata={
            "help": "Whether a round of reflection may keep the image that it looks at. No round follows then. Who decides is the "
            "policy itself: by the words that it writes, or by stop_threshold."
        },
    )
    stop_threshold: UnitFloat | None = field(
        default=None,
        metadata={
            "help": "With allow_stop, probability of the verdict that the image is right from which it is kept. Default: the one "
            "that was calibrated for the model (evaluate.py --calibrate_stop); without any, the words decide."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stop_threshold is not None and not self.allow_stop:
            raise ValueError(f"stop_threshold={self.stop_threshold} needs allow_stop")

    def threshold_of(self, model: UnifiedModel) -> float | None:
        """The threshold from which a model keeps images: the one given, or its own if it may keep any."""
        from alphagrpo_ext.rollout.stopping import saved_threshold

        return saved_threshold(model) if self.allow_stop and self.stop_threshold is None else self.stop_threshold
