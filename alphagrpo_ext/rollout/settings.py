# SPDX-License-Identifier: Apache-2.0

"""
Settings of a task: how its texts are sampled and its images are painted.

A task class declares the settings that it needs, and a run can override them for each task. Everything that a batch must share
(the number of trained steps, the transition, the group) is a setting of the run and not in here.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from alphagrpo_ext.registry import Registry, UnknownNameError


EVALUATION_PREFIX = "eval_"
"""What the name of a setting begins with if it holds in evaluations alone."""


@dataclass(frozen=True)
class TaskSettings:
    """
    Settings of a task, by the names of the arguments of training. `None` leaves a setting to the run.

    Args:
        cfg_text_scale, cfg_img_scale (`float`, *optional*): Guidance scales; at most 1 is off.
        cfg_interval (`tuple[float, float]`, *optional*): Half-open interval `(low, high]` of shifted times that are guided.
        cfg_renorm_type (`str`, *optional*): Renormalisation of guidance: `"global"`, `"channel"` or `"text_channel"`.
        cfg_renorm_min (`float`, *optional*): Least factor of the renormalisation, in [0, 1].
        num_timesteps (`int`, *optional*): Points of the denoising schedule.
        timestep_shift (`float`, *optional*): Shift of the schedule towards noise.
        ode_solver (`str`, *optional*), ode_steps (`int`, *optional*): Solver and number of the deterministic steps.
        refine_strength (`float`, *optional*): How much a repaint may lose of the image that it starts from, in (0, 1].
        image_height, image_width (`int`, *optional*): Size of painted images, in pixels.
        max_completion_length (`int`, *optional*): Longest text, in tokens.
        temperature, top_p, top_k (`float`, `float`, `int`, *optional*): Sampling of texts.
    """

    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_type: str | None = None
    cfg_renorm_min: float | None = None
    num_timesteps: int | None = None
    timestep_shift: float | None = None
    ode_solver: str | None = None
    ode_steps: int | None = None
    refine_strength: float | None = None
    image_height: int | None = None
    image_width: int | None = None
    max_completion_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are not `None`, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


SETTING_NAMES = tuple(f.name for f in fields(TaskSettings))
"""Names of all settings of a task."""


def resolve_settings(
    declared: TaskSettings,
    run: Mapping[str, Any],
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    is_main_task: bool = True,
) -> dict[str, Any]:
    """
    The settings of one task by name, out of four sources. Each of them wins over those before it:

    1. the defaults of the run;
    2. what the task class declares;
    3. what was given for the run. It is meant for the run's own task: a task beside it keeps what it declares;
    4. what was given for the task.

    Args:
        declared ([`TaskSettings`]): What the task class declares.
        run (`Mapping[str, Any]`): What was given for the run.
        defaults (`Mapping[str, Any]`): Defaults of the run.
        overrides (`Mapping[str, Any]`): What was given for the task.
        is_main_task (`bool`, *optional*, defaults to `True`): Whether the run is about this task.
    """
    own = declared.given()
    if not is_main_task:
        run = {name: value for name, value in run.items() if name.removeprefix(EVALUATION_PREFIX) not in own}
    return {**defaults, **own, **run, **overrides}


def read_task_settings(
    value: Any, tasks: Registry, names: Collection[str] = SETTING_NAMES, run_names: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """
    Read and check the argument `task_settings`.

    Args:
        value (`str` or `Mapping`, *optional*):
            Settings by name, by the name of their task: as JSON, or as a mapping, e.g. out of a YAML file.
        tasks ([`Registry`]): All tasks.
        names (`Collection[str]`): Settings that can be given. A name may begin with `"eval_"`.
        run_names (`Collection[str]`): Settings of the run, which the message about an unknown name tells apart.

    Returns:
        `dict[str, dict[str, Any]]`: Tasks and settings that are known, with finite values of the right type.

    Raises:
        `ValueError`: At the first one that is not; the message names task, setting and value.
    """
    value = _parsed(value) if isinstance(value, str) else value or {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f'task_settings must map tasks to settings, e.g. {{"reasoning_t2i": {{"cfg_text_scale": 4.0}}}}, but is {value!r}'
        )
    return {name: _task_entries(name, entries, tasks, names, run_names) for name, entries in value.items()}


def _parsed(text: str) -> Any:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"task_settings names {name!r} twice: keep one of them")
            found[name] = value
        return found

    if not text.strip():
        return {}
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'task_settings is no JSON ({error}), e.g. {{"reasoning_t2i": {{"cfg_text_scale": 4.0}}}}, but is {text!r}'
        ) from error


def _task_entries(
    task: Any, entries: Any, tasks: Registry, names: Collection[str], run_names: Collection[str]
) -> dict[str, Any]:
    try:
        tasks.get(task)
    except UnknownNameError as error:
        raise ValueError(f"task_settings: {error}") from error
    where = f"task_settings of {task!r}"
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} must map settings to values, but are {entries!r}")
    for name in entries:
        if name in run_names and name not in names:
            raise ValueError(
                f"{where}: {name!r} is a setting of the run, which all its tasks share: give it as --{name}. "
                f"Settings of a task: {', '.join(names)}"
            )
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown setting {name!r}.{hint} Settings of a task: {', '.join(names)}")
    return {name: check_setting(value, name, f"{where}: {name!r}") for name, value in entries.items()}


def check_setting(value: Any, name: str, where: str) -> Any:
    """
    Check the value of a setting, and return it as the setting's type. Integers stand for floats as well.

    Args:
        value (`Any`): The value.
        name (`str`): One of [`SETTING_NAMES`], perhaps after `"eval_"`.
        where (`str`): What the message calls the setting.

    Raises:
        `ValueError`: If it has another type, or is not finite.
    """
    kind = _KINDS[name.removeprefix(EVALUATION_PREFIX)]
    if kind is float:
        # A boolean is an integer for Python, and a typo here.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, but is {value!r}")
        return float(value)
    if kind in (int, str):
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{where} must be {'an integer' if kind is int else 'a string'}, but is {value!r}")
        return value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where} takes two numbers, but is {value!r}")
    # A list, as the arguments of a run have it.
    return [check_setting(bound, "cfg_text_scale", where) for bound in value]


_KINDS = {name: hint.__args__[0] for name, hint in get_type_hints(TaskSettings).items()}
"""Types of the settings by name."""
