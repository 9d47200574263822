# SPDX-License-Identifier: Apache-2.0

"""
The multimodal rollout generator, and the tasks that define what a policy is given and how often it acts.

Names are imported when they are first used, so that arguments of a rollout can be parsed without importing models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from alphagrpo_ext.rollout.config import RolloutConfig
    from alphagrpo_ext.rollout.generator import RolloutGenerator
    from alphagrpo_ext.rollout.refinement import Refinement, RefinementStep, refine
    from alphagrpo_ext.rollout.settings import TaskSettings
    from alphagrpo_ext.rollout.task import TASKS, Task


__all__ = [
    "TASKS",
    "Refinement",
    "RefinementStep",
    "RolloutConfig",
    "RolloutGenerator",
    "Task",
    "TaskSettings",
    "refine",
]

_MODULES = {
    "TASKS": "task",
    "Refinement": "refinement",
    "RefinementStep": "refinement",
    "RolloutConfig": "config",
    "RolloutGenerator": "generator",
    "Task": "task",
    "TaskSettings": "settings",
    "refine": "refinement",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
