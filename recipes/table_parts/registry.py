# SPDX-License-Identifier: Apache-2.0

"""All tables by name."""

from __future__ import annotations

from collections.abc import Callable

from table_parts.evaluations import (
    editing_table,
    guidance_table,
    presets_table,
    rollouts_table,
    rounds_table,
    solvers_table,
)
from table_parts.learning import (
    categories_table,
    cheaper_training_table,
    settings_table,
    training_table,
)
from table_parts.objectives.table import objectives_in_equal_time_table, objectives_table
from table_parts.plan import Plan
from table_parts.refinement import refinement_after_painting_table, reflection_table
from table_parts.refinement_settings import refine_strength_table, reflection_settings_table
from table_parts.rewards import decomposed_or_holistic_table, frozen_rewards_table
from table_parts.tables import MeasuredTable
from table_parts.time_to_quality.table import time_to_quality_table


TABLES: dict[str, Callable[[Plan], MeasuredTable]] = {
    "training": training_table,
    "categories": categories_table,
    "objectives": objectives_table,
    "objectives_in_equal_time": objectives_in_equal_time_table,
    "settings": settings_table,
    "guidance": guidance_table,
    "solvers": solvers_table,
    "rollouts": rollouts_table,
    "presets": presets_table,
    "cheaper_training": cheaper_training_table,
    "reflection": reflection_table,
    "reflection_settings": reflection_settings_table,
    "refinement_after_painting": refinement_after_painting_table,
    "refine_strength": refine_strength_table,
    "rounds": rounds_table,
    "editing": editing_table,
    "frozen_rewards": frozen_rewards_table,
    "decomposed_or_holistic": decomposed_or_holistic_table,
    "time_to_quality": time_to_quality_table,
}
"""What makes each table of `TABLE_NAMES`."""
