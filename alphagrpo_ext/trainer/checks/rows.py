# SPDX-License-Identifier: Apache-2.0

"""Checks of every row of a dataset: its task, its prompt, its image, and the room that it needs in the model's context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from alphagrpo_ext.image_rows import broken_images, refuse_broken_images, refuse_images_column, undecoded_images
from alphagrpo_ext.images import check_image
from alphagrpo_ext.messages import num_image_parts, prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.readable_prompts import check_trajectory_room
from alphagrpo_ext.rollout.task import TASKS, Task
from alphagrpo_ext.trainer.reward_functions import ARGUMENTS, reward_hooks
from alphagrpo_ext.trainer.step import task_name


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowCheck:
    """
    What a row must fulfil.

    Args:
        tasks (`Mapping[str, Task]`): By name, all that rows may mention.
        default (`str`): Task of rows that name none.
        processor, model: Processor and model of the policy.
        configs (`Mapping[str, RolloutConfig]`): Size of images, and the longest thought, of each task.
    """

    tasks: Mapping[str, Task]
    default: str
    processor: UnifiedProcessor
    model: UnifiedModel
    configs: Mapping[str, RolloutConfig]

    def __call__(self, row: Mapping[str, Any], where: str) -> None:
        """
        Check that a row has a prompt that can be read, the image that its task needs, and room in the model's context.

        Args:
            row (`Mapping[str, Any]`): The row. Its image is not decoded.
            where (`str`): Name of the row for messages.

        Raises:
            `ValueError`: If it fails.
        """
        name = task_name(row, self.default)
        task = self.tasks.get(name)
        if task is None:
            raise ValueError(f"{where}, column 'task': {_unknown_task(name)}")
        if row.get("prompt") is None:
            raise ValueError(f"{where} has no 'prompt'; its columns are {list(row)}")
        try:
            prompt_text(row["prompt"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        has_image = row.get("image") is not None
        if task.needs_image and not task.paints_initial_image and not has_image:
            raise ValueError(f"{where} of task '{name}' has no 'image', which the task needs")
        if (places := num_image_parts(row["prompt"])) > (num_seen := int(task.needs_image and has_image)):
            raise ValueError(
                f"{where} of task '{name}' has a prompt with {places} places for images, but the policy sees {num_seen}: give the "
                f"row one image, in the column 'image', and a task that looks at it"
            )
        check_trajectory_room(row, f"{where} of task '{name}'", task, self.processor, self.model, self.configs[name])

    def ignores_image(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has an image that its task does not look at."""
        return row.get("image") is not None and not self.tasks[task_name(row, self.default)].needs_image


def _unknown_task(name: Any) -> str:
    try:
        TASKS.get(name)
    except UnknownNameError as error:
        return str(error)
    return f"the trainer was not set up for the task {name!r}"


def task_names(dataset: datasets.Dataset, default: str, label: str) -> list[str]:
    """
    The names of all tasks in a dataset.

    Args:
        dataset (`datasets.Dataset`): The rows.
        default (`str`): Task of rows that name none.
        label (`str`): Name of the dataset for messages.

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
            index = list(dataset["task"]).index(name)
            raise ValueError(f"{label}, row {index}, column 'task': {error}") from error
    return list(names)


def check_rows(dataset: datasets.Dataset, check: RowCheck, label: str) -> None:
    """
    Check every row of a dataset, and that every image can be read; see [`RowCheck`] and [`broken_images`].

    Says how many rows have an image that their task does not look at.

    Args:
        dataset (`datasets.Dataset`): The rows.
        check ([`RowCheck`]): What they must fulfil.
        label (`str`): Name of the dataset for messages.

    Raises:
        `ValueError`: At the first row that fails. The message names the dataset and the row.
    """
    check_columns(dataset.column_names, label)
    rows = undecoded_images(dataset)
    rows = rows.select_columns([name for name in ("prompt", "task", "image") if name in dataset.column_names])
    with_unused_image = []
    for index, row in enumerate(rows):
        check(row, f"{label}, row {index}")
        if check.ignores_image(row):
            with_unused_image.append(index)
    if with_unused_image:
        logger.warning(
            "%s: %d rows (the first is row %d) have an 'image', which their task does not look at.",
            *(label, len(with_unused_image), with_unused_image[0]),
        )
    faults = [f"{label}, row {index}: {fault}" for index, fault in broken_images(dataset).items()]
    refuse_broken_images(faults, "Repair the file, or leave the row out")


def check_columns(columns: Iterable[str], label: str) -> None:
    """
    Check that a dataset has a column `prompt`, and none whose name is that of something else that reward functions get.

    Args:
        columns (`Iterable[str]`): Names of the columns.
        label (`str`): Name of the dataset for messages.

    Raises:
        `ValueError`: If `prompt` is missing, or a name is taken.
    """
    refuse_images_column(columns, label)
    if taken := [name for name in columns if name in ARGUMENTS and name != "task"]:
        raise ValueError(
            f"{label} has a column '{taken[0]}', but reward functions get something else of this name: rename the column "
            f"(rename_column), or remove it"
        )
    if "prompt" not in columns:
        raise ValueError(
            f"{label} has no column 'prompt'; its columns are {', '.join(columns) or 'none'}: rename the one with the prompts "
            f"(rename_column)"
        )


def stream_columns(stream: datasets.IterableDataset) -> Iterable[str]:
    """Names of the columns of a stream; if it does not know them, those of its first row."""
    return stream.column_names or next(iter(undecoded_images(stream)), {}).keys()


def readable_rows(dataset: Any, label: str, check: RowCheck, functions: Sequence[Callable]) -> Any:
    """
    The dataset with images that are not decoded, so that [`read_image`] reads them with the rows of a rollout.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `None`):
            A stream's rows are checked when they are read. Others have been checked by [`check_rows`].
        label (`str`): Name of the dataset for messages.
        check ([`RowCheck`]), functions (`Sequence[Callable]`): Check the rows of a stream.
    """
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset
    rows = undecoded_images(dataset)
    if isinstance(dataset, datasets.Dataset):
        return rows
    return rows.filter(_StreamCheck(label, check, reward_hooks(functions, "validate_dataset")), with_indices=True)


class _StreamCheck:
    """Checks the rows of a stream as they come, each with its position, and keeps them all."""

    def __init__(self, label: str, check: RowCheck, validators: Sequence[Callable]) -> None:
        self.label = label
        self.check = check
        self.validators = validators

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        where = f"{self.label}, row {index}"
        check_columns(row, where)
        self.check(row, where)
        if row.get("image") is not None:
            try:
                check_image(row["image"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        for validate in self.validators:
            try:
                validate([row])
            except ValueError as error:
                # The function counts from the start of what it was given.
                raise ValueError(f"{where}{str(error).removeprefix('row 0')}") from error
        return True
