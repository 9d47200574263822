# SPDX-License-Identifier: Apache-2.0

"""The multimodal rollout generator, and the tasks that say what goes into a context."""

from alphagrpo_ext.rollout.generator import RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.refinement import Refinement, RefinementStep, refine
from alphagrpo_ext.rollout.task import TASKS, Task, TaskContexts


__all__ = [
    "TASKS",
    "Refinement",
    "RefinementStep",
    "RolloutConfig",
    "RolloutGenerator",
    "Task",
    "TaskContexts",
    "refine",
]
