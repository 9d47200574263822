# SPDX-License-Identifier: Apache-2.0

"""
Presets of sampling: defaults for the settings that say how often the network is evaluated in a rollout.

The steps of the stochastic window are trained, so no preset changes them. Outside the window a step has no probability, and a
solver of second order needs fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


PRESETS = ("paper", "fast")
"""Names of the presets."""
FAST_STRIDE = 3
"""Steps of the schedule that `fast` replaces by one step of second order."""
FAST_STRIDE_WITHOUT_WINDOW = 2
"""The same where no step is stochastic, so that all steps are replaced."""
FAST_BRANCHES = 2
"""Images that `fast` paints after each thought."""


def preset_settings(
    name: str, count_free_steps: Callable[[], int], has_window: bool, group_size: int, samples: int
) -> dict[str, Any]:
    """
    The settings of a preset by name. They are defaults: what is given for a run or declared by its task wins.

    Args:
        name (`str`):
            One of [`PRESETS`]. `"paper"` evaluates the network at every step of the schedule, by Euler, and paints one image per
            thought, as in https://huggingface.co/papers/2605.12495. `"fast"` takes a third of the steps outside the window, by a
            solver of second order, and paints two images per thought where a group then still has two thoughts. Without a window it
            takes half of all steps, and one image per thought, since nothing would tell two images apart.
        count_free_steps (`Callable[[], int]`): Counts the steps of the schedule outside the window. Only `"fast"` asks.
        has_window (`bool`): Whether the objective trains the steps of a window.
        group_size (`int`): Samples of a group.
        samples (`int`): Samples that a process draws in one rollout.

    Returns:
        `dict[str, Any]`: `ode_solver`, `ode_steps` (`None` for those of the schedule) and `branches_per_thought`.
    """
    if name == "paper":
        return {"ode_solver": "euler", "ode_steps": None, "branches_per_thought": 1}
    has_room = (
        has_window and group_size % FAST_BRANCHES == samples % FAST_BRANCHES == 0 and group_size >= 2 * FAST_BRANCHES
    )
    num_free_steps = count_free_steps()
    # A window in the middle of the path leaves two stretches, each of which takes a step.
    stride = FAST_STRIDE if has_window else FAST_STRIDE_WITHOUT_WINDOW
    steps = min(max(math.ceil(num_free_steps / stride), 2), num_free_steps)
    return {"ode_solver": "ab2", "ode_steps": steps or None, "branches_per_thought": FAST_BRANCHES if has_room else 1}
