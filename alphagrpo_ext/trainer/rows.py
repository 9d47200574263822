# SPDX-License-Identifier: Apache-2.0

"""Rows of a dataset: their tasks, what is checked of them before any training starts, and what rewards see of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import TASKS, Task, prompt_text


def task_name(row: Mapping[str, Any], default: str) -> str:
    """The name in a row's column `task`, or the default."""
    return row.get("task") or default


def reward_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its image, which TRL would take for the input of a vision-language model."""
    return {name: value for name, value in row.items() if name != "image"}


def task_names(dataset: datasets.Dataset, default: str) -> list[str]:
    """
    All tasks of a dataset.

    Raises:
        `ValueError`: If a row names a task that is not registered.
    """
    if "task" not in dataset.column_names:
        return [default]
    names = dict.fromkeys(name or default for name in dataset["task"])
    for name in names:
        try:
            TASKS.get(name)
        except UnknownNameError as error:
            raise ValueError(f"row {list(dataset['task']).index(name)}, column 'task': {error}") from error
    return list(names)


def validate_rows(
    dataset: datasets.Dataset,
    tasks: Mapping[str, Task],
    default: str,
    processor: UnifiedProcessor,
    model: UnifiedModel,
    config: RolloutConfig,
) -> None:
    """
    Check that every row has the image that its task needs, and that the longest prompt fits the model.

    Args:
        dataset (`datasets.Dataset`): The rows. Images are not decoded.
        tasks (`Mapping[str, Task]`): By name, all that the rows mention.
        default (`str`): Task of rows that name none.
        processor, model: Of the policy.
        config ([`RolloutConfig`]): Size of images, and the longest thought.

    Raises:
        `ValueError`: At the first row that fails; the message names it.
    """
    columns = [name for name in ("prompt", "task", "image") if name in dataset.column_names]
    rows = dataset.select_columns(columns)
    if isinstance(dataset.features and dataset.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    longest: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for index, row in enumerate(rows):
        name = task_name(row, default)
        task = tasks[name]
        if task.needs_image and not task.paints_initial_image and row.get("image") is None:
            raise ValueError(f"row {index} of task '{name}' has no 'image', which the task needs")
        if name not in longest or len(str(row["prompt"])) > len(str(longest[name][1]["prompt"])):
            longest[name] = (index, row)
    for name, (index, row) in longest.items():
        positions = tasks[name].max_positions(row, processor, model, config)
        if positions > model.max_positions:
            raise ValueError(
                f"row {index} of task '{name}' can take {positions} positions, more than the model's "
                f"{model.max_positions}: lower num_reflection_rounds ({tasks[name].num_reflection_rounds}) or "
                f"max_completion_length ({config.max_new_tokens}), or shorten the prompt ({prompt_text(row['prompt'])[:80]!r})"
            )
