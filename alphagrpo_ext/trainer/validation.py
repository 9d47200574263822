# SPDX-License-Identifier: Apache-2.0

"""Checks before training: rows of datasets, their tasks, and whether reward functions can judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import TASKS, Task, prompt_text
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.reward_functions import listed, preflight_rewards, reward_hooks
from alphagrpo_ext.trainer.step import rollout_configs, task_name


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, datasets.Dataset]:
    """All datasets that are not streams, by a name for messages such as `"eval_dataset['hard']"`."""
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        named["eval_dataset"] = eval_dataset
    return {name: dataset for name, dataset in named.items() if isinstance(dataset, datasets.Dataset)}


def validate_rewards(
    functions: Sequence[Callable], named: Mapping[str, datasets.Dataset], sizes: Sequence[tuple[int, int]]
) -> None:
    """
    Ask reward functions to check the datasets and the size of images, if they have a `validate_dataset` or a
    `validate_image_size`; see [`reward_attribute`] for where they are looked up.

    Args:
        functions (`Sequence[Callable]`): Reward functions.
        named (`Mapping[str, datasets.Dataset]`): From [`named_datasets`].
        sizes (`Sequence[tuple[int, int]]`): Heights and widths of sampled images in pixels.

    Raises:
        `ValueError`: If a function refuses a dataset; the message begins with its name.
    """
    for validate in reward_hooks(functions, "validate_dataset"):
        for name, dataset in named.items():
            try:
                validate(dataset)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for validate in reward_hooks(functions, "validate_image_size"):
        for size in dict.fromkeys(sizes):
            validate(*size)


def validated_tasks(
    args: AlphaGRPOConfig,
    reward_funcs: Callable | list[Callable],
    named: Mapping[str, datasets.Dataset],
    processor: UnifiedProcessor,
    model: UnifiedModel,
) -> dict[str, Task]:
    """
    The tasks of all rows by name, after the checks of [`validate_rewards`], [`validate_rows`] and [`preflight_rewards`]. Rows of
    a stream are checked when they are read.

    Args:
        args ([`AlphaGRPOConfig`]): Default task, settings of tasks, and size of images.
        reward_funcs (`Callable` or `list[Callable]`): As given to the trainer.
        named (`Mapping[str, datasets.Dataset]`): From [`named_datasets`].
        processor, model: Processor and model of the policy.
    """
    functions = listed(reward_funcs)
    names = dict.fromkeys(
        [args.task, *(name for dataset in named.values() for name in task_names(dataset, args.task))]
    )
    configs = validated_configs(args, names, model)
    validate_rewards(functions, named, [config.size for config in configs.values()])
    tasks = {name: args.make_task(name) for name in names}
    for dataset in named.values():
        validate_rows(dataset, tasks, args.task, processor, model, configs)
    # Last, because it may wait for another machine.
    preflight_rewards(functions, *configs[args.task].size)
    return tasks


def validated_configs(args: AlphaGRPOConfig, names: Iterable[str], model: UnifiedModel) -> dict[str, RolloutConfig]:
    """
    How rows of each task are sampled in an evaluation, which has the image size and the longest thought of training.

    Raises:
        `ValueError`: If the settings of a task contradict each other, or the model does not support them.
    """
    for name in args.with_painting_task(names):
        args.check_task(name)
    configs = rollout_configs(args, names)
    for name, config in configs.items():
        try:
            config.grid(model)
            for own in (config, args.for_task(name).train_rollout(0)):
                model.guidance(own.denoising.guidance)
        except ValueError as error:
            raise ValueError(f"task '{name}': {error}") from error
    return configs


def task_names(dataset: datasets.Dataset, default: str) -> list[str]:
    """
    The names of all tasks in a dataset.

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
    configs: Mapping[str, RolloutConfig],
) -> None:
    """
    Check that every row has the image that its task needs, and that the longest prompt fits the model.

    Args:
        dataset (`datasets.Dataset`): The rows. Images are not decoded.
        tasks (`Mapping[str, Task]`): By name, all that the rows mention.
        default (`str`): Task of rows that name none.
        processor, model: Processor and model of the policy.
        configs (`Mapping[str, RolloutConfig]`): Size of images, and the longest thought, of each task.

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
        positions = tasks[name].max_positions(row, processor, model, configs[name])
        if positions > model.max_positions:
            raise ValueError(
                f"row {index} of task '{name}' can take {positions} positions, more than the model's "
                f"{model.max_positions}: lower num_reflection_rounds ({tasks[name].num_reflection_rounds}) or "
                f"max_completion_length ({configs[name].max_new_tokens}), or shorten the prompt ({prompt_text(row['prompt'])[:80]!r})"
            )
