# SPDX-License-Identifier: Apache-2.0

"""The multimodal rollout generator, and the tasks that define what a policy is given and how often it acts."""

from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.rollout.refinement import Refinement, RefinementStep, refine
from alphagrpo_ext.rollout.task import TASKS, Task


__all__ = [
    "TASKS",
    "Refinement",
    "RefinementStep",
    "RolloutConfig",
    "RolloutGenerator",
    "Task",
    "refine",
]
