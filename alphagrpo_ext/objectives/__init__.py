# SPDX-License-Identifier: Apache-2.0

"""Image objectives: losses on the velocities of sampled images, given advantages."""

from alphagrpo_ext.objectives.base import OBJECTIVES, ImageObjective, ImageScores, ObjectiveConfig, ObjectiveOutput


__all__ = ["OBJECTIVES", "ImageObjective", "ImageScores", "ObjectiveConfig", "ObjectiveOutput"]
