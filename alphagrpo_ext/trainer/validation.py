# SPDX-License-Identifier: Apache-2.0

"""Checks before training: whether reward functions can judge the datasets, and their rows (see `rows.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import TASKS, Task
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.rows import RowCheck, check_rows, readable_rows, stream_columns, task_names
from alphagrpo_ext.trainer.step import rollout_configs


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
    `validate_image_size`.

    Args:
        functions (`Sequence[Callable]`): Reward functions.
        named (`Mapping[str, datasets.Dataset]`): From [`named_datasets`].
        sizes (`Sequence[tuple[int, int]]`): Heights and widths of sampled images in pixels.

    Raises:
        `ValueError`: If a function refuses a dataset; the message begins with its name.
    """
    for function in functions:
        if validate := getattr(function, "validate_dataset", None):
            for name, dataset in named.items():
                try:
                    validate(dataset)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        if validate := getattr(function, "validate_image_size", None):
            for size in dict.fromkeys(sizes):
                validate(*size)


@dataclass(frozen=True)
class CheckedDatasets:
    """
    Datasets whose rows are checked, and whose images are read with the rows of a rollout.

    Args:
        tasks (`dict[str, Task]`): The tasks of all rows by name.
        train, eval: The datasets in the form that they were given in.
    """

    tasks: dict[str, Task]
    train: Any
    eval: Any


def checked_datasets(
    args: AlphaGRPOConfig,
    reward_funcs: Callable | list[Callable],
    train_dataset: Any,
    eval_dataset: Any,
    processor: UnifiedProcessor,
    model: UnifiedModel,
) -> CheckedDatasets:
    """
    Check every row of every dataset: by the reward functions (see [`validate_rewards`]), and by [`RowCheck`]. The rows of a stream
    are checked when they are read, and an error names their position.

    Args:
        args ([`AlphaGRPOConfig`]): Default task, settings of tasks, and size of images.
        reward_funcs (`Callable` or `list[Callable]`): As given to the trainer.
        train_dataset, eval_dataset: As given to the trainer.
        processor, model: Processor and model of the policy.

    Raises:
        `ValueError`: At the first row that fails. The message names the dataset and the row.
    """
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    named = named_datasets(train_dataset, eval_dataset)
    names = list(
        dict.fromkeys([args.task, *(n for label, rows in named.items() for n in task_names(rows, args.task, label))])
    )
    configs = validated_configs(args, names, model)
    validate_rewards(functions, named, [config.size for config in configs.values()])
    given = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    streams = [dataset for dataset in given if isinstance(dataset, datasets.IterableDataset)]
    if any("task" in stream_columns(stream) for stream in streams):
        configs = _possible_configs(args, TASKS.names(), model) | configs
        names += [name for name in configs if name not in names]
    tasks = {name: args.make_task(name) for name in names}
    check = RowCheck(tasks, args.task, processor, model, configs)
    for label, dataset in named.items():
        check_rows(dataset, check, label)
    prepare = partial(readable_rows, check=check, functions=functions)
    if isinstance(eval_dataset, dict):
        prepared = {name: prepare(dataset, f"eval_dataset[{name!r}]") for name, dataset in eval_dataset.items()}
    else:
        prepared = prepare(eval_dataset, "eval_dataset")
    return CheckedDatasets(tasks, prepare(train_dataset, "train_dataset"), prepared)


def _possible_configs(args: AlphaGRPOConfig, names: Iterable[str], model: UnifiedModel) -> dict[str, RolloutConfig]:
    """Settings of the tasks that a stream may name, which is known at its end, without those that the model cannot do."""
    configs: dict[str, RolloutConfig] = {}
    for name in names:
        try:
            configs |= validated_configs(args, [name], model)
        except ValueError:
            # A row with this task is refused when it comes.
            continue
    return configs


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
