# SPDX-License-Identifier: Apache-2.0

"""Checks before training: rows of datasets, their tasks, and whether reward functions can judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel

from alphagrpo_ext.models.adapters import fit_adapter_config, freeze_parts
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.ranges import check_ranges
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import TASKS, Task, prompt_text
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.step import rollout_configs, task_name


ADAPTER_RANGES = {"r": "[1, inf)", "lora_alpha": "(0, inf)", "lora_dropout": "[0, 1)"}
"""Ranges of numbers of PEFT's configurations. With an alpha of 0 an adapter would have no effect."""


def freeze_for_training(
    model: UnifiedModel, peft_config: PeftConfig | None, args: AlphaGRPOConfig
) -> PeftConfig | None:
    """Freeze what the arguments exclude from training, and fit the configuration of an adapter to the model."""
    if args.freeze_vision_tower:
        model.family.freeze_vision_tower(model)
    if peft_config is None:
        return None
    check_ranges(peft_config, ADAPTER_RANGES)
    return fit_adapter_config(peft_config, model, args.lora_targets, not args.freeze_vision_tower)


def check_trains(model: torch.nn.Module, args: AlphaGRPOConfig) -> None:
    """Freeze the parts of an adapted model that are not trained, and raise `ValueError` if all of its weights are frozen."""
    if isinstance(model, PeftModel):
        freeze_parts(model, not args.freeze_vision_tower)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "all weights of the model are frozen, so nothing would be trained: unfreeze some, or give the adapter as trainable "
            "(is_trainable=True)"
        )


def check_not_empty(dataset: Any, name: str, least: int = 1) -> None:
    """
    Check that a dataset has rows, if it knows their number.

    Args:
        dataset: A dataset, or several by name.
        name (`str`): What the message calls it.
        least (`int`, *optional*, defaults to `1`): Fewest rows.

    Raises:
        `ValueError`: If there are fewer.
    """
    if isinstance(dataset, Mapping):
        for key, member in dataset.items():
            check_not_empty(member, f"{name}[{key!r}]", least)
    elif hasattr(dataset, "__len__") and len(dataset) < least:
        if not len(dataset):
            raise ValueError(f"{name} is empty: it has no row to train or evaluate on")
        raise ValueError(
            f"{name} has {len(dataset)} rows, but a rollout takes {least} prompts, so nothing would be trained: lower "
            f"per_device_train_batch_size or steps_per_generation, or give more rows"
        )


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, datasets.Dataset]:
    """
    All datasets that are not streams, by a name for messages such as `"eval_dataset['hard']"`.

    Raises:
        `ValueError`: If one is empty.
    """
    check_not_empty(train_dataset, "train_dataset")
    check_not_empty(eval_dataset, "eval_dataset")
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


def validated_tasks(
    args: AlphaGRPOConfig,
    reward_funcs: Callable | list[Callable],
    named: Mapping[str, datasets.Dataset],
    processor: UnifiedProcessor,
    model: UnifiedModel,
) -> dict[str, Task]:
    """
    The tasks of all rows by name, after the checks of [`validate_rewards`] and [`validate_rows`], and of what the model can
    paint. Rows of a stream are checked when they are read. The configuration is checked again, because its fields can be
    written to after it was made.

    Args:
        args ([`AlphaGRPOConfig`]): Default task, settings of tasks, and size of images.
        reward_funcs (`Callable` or `list[Callable]`): As given to the trainer.
        named (`Mapping[str, datasets.Dataset]`): From [`named_datasets`].
        processor, model: Processor and model of the policy.
    """
    args.check_numbers()
    check_not_empty(named.get("train_dataset"), "train_dataset", args.generation_batch_size // args.num_generations)
    args.eval_rollout().grid(model)
    model.guidance(args.guidance)
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    names = dict.fromkeys(
        [args.task, *(name for dataset in named.values() for name in task_names(dataset, args.task))]
    )
    configs = validated_configs(args, names, model)
    validate_rewards(functions, named, [config.size for config in configs.values()])
    tasks = {name: args.make_task(name) for name in names}
    for dataset in named.values():
        validate_rows(dataset, tasks, args.task, processor, model, configs)
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
