# SPDX-License-Identifier: Apache-2.0

"""Image objectives: what the velocities of a trajectory are pushed towards."""

from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveConfig, ObjectiveOutput


__all__ = ["OBJECTIVES", "ImageObjective", "ImageScores", "ObjectiveConfig", "ObjectiveOutput"]
