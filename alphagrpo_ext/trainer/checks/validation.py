# SPDX-License-Identifier: Apache-2.0

"""Checks before training: whether reward functions can judge the datasets, and their rows (see `rows.py`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from transformers import TrainerState

from alphagrpo_ext.models.adapters import check_adapter_numbers, fit_adapter_config, freeze_parts
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.task import TASKS, Task
from alphagrpo_ext.trainer.checks.rows import (
    RowCheck,
    check_columns,
    check_rows,
    readable_rows,
    stream_columns,
    task_names,
)
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.reward_functions import (
    check_parameters,
    listed,
    preflight_rewards,
    reward_hooks,
    reward_name,
)
from alphagrpo_ext.trainer.rewards import judges_images
from alphagrpo_ext.trainer.step import rollout_configs


logger = logging.getLogger(__name__)


def freeze_for_training(
    model: UnifiedModel, peft_config: PeftConfig | None, args: AlphaGRPOConfig
) -> PeftConfig | None:
    """Freeze what the arguments exclude from training, and fit the configuration of an adapter to the model."""
    if args.freeze_vision_tower:
        model.family.freeze_vision_tower(model)
    if peft_config is None:
        return None
    check_adapter_numbers(peft_config, "peft_config")
    fitted = fit_adapter_config(peft_config, model, args.lora_targets, not args.freeze_vision_tower)
    # True is PEFT's default; any other value was chosen.
    if args.lora_init == "gaussian" and getattr(fitted, "init_lora_weights", None) is True:
        fitted.init_lora_weights = "gaussian"
    return fitted


def check_trains(
    model: torch.nn.Module, args: AlphaGRPOConfig, functions: Sequence[Callable], weights: torch.Tensor
) -> None:
    """
    Freeze the parts of an adapted model that are not trained, and check that there is something to train.

    Args:
        model (`torch.nn.Module`): The policy.
        args ([`AlphaGRPOConfig`]): Its training.
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`): The reward functions.

    Raises:
        `ValueError`: If all weights of the model are frozen, or if a reward would train nothing.
    """
    _refuse_idle_rewards(functions, weights, args)
    if isinstance(model, PeftModel):
        freeze_parts(model, not args.freeze_vision_tower)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "all weights of the model are frozen, so nothing would be trained: unfreeze some, or give the adapter as trainable "
            "(is_trainable=True)"
        )


def _refuse_idle_rewards(functions: Sequence[Callable], weights: torch.Tensor, args: AlphaGRPOConfig) -> None:
    """
    Refuse rewards of text alone where texts are not trained, and images do not depend on them either.

    Args:
        functions (`Sequence[Callable]`), weights (`torch.Tensor` of shape `(functions,)`): The reward functions.
        args ([`AlphaGRPOConfig`]): `text_loss_weight`, `separate_advantages` and `mask_broken_format`.

    Raises:
        `ValueError`: If there is such a reward with a weight other than 0; the message names it.
    """
    if args.text_loss_weight or args.mask_broken_format or not args.separate_advantages:
        return
    is_idle = ~judges_images(functions) & (weights.cpu() != 0)
    names = [reward_name(function) for function, idle in zip(functions, is_idle.tolist(), strict=True) if idle]
    if names:
        raise ValueError(
            f"{', '.join(names)} would train nothing: such rewards train texts alone, and text_loss_weight is 0. Set "
            f"text_loss_weight, or leave them out"
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
        if not dataset:
            raise ValueError(f"{name} is a dict without a dataset: give None where nothing is evaluated")
        for key, member in dataset.items():
            check_not_empty(member, f"{name}[{key!r}]", least)
    elif hasattr(dataset, "__len__") and len(dataset) < least:
        if not len(dataset):
            raise ValueError(f"{name} is empty: it has no row to train or evaluate on")
        raise ValueError(
            f"{name} has {len(dataset)} rows, but a rollout takes {least} prompts, so nothing would be trained: lower "
            f"per_device_train_batch_size or steps_per_generation, or give more rows"
        )


def check_steps_done(state: TrainerState) -> None:
    """Raise `ValueError` if a training has ended before its first step, as that of a stream that has too few rows."""
    if not state.global_step:
        cause = "train_dataset gave too few rows for one rollout" if state.max_steps else "max_steps is 0"
        raise ValueError(f"nothing was trained: {cause}")


def check_scores_found(metrics: Mapping[str, float]) -> None:
    """Raise `ValueError` if an evaluation has met no row, as that of an empty stream."""
    if not any(name.endswith("_loss") for name in metrics):
        raise ValueError("nothing was evaluated: eval_dataset gave no row")


def check_evaluation_groups(args: AlphaGRPOConfig) -> None:
    """
    Check that the samples that an evaluation paints at a time are whole groups, which TRL does for an `eval_strategy` alone.

    Raises:
        `ValueError`: If they are not.
    """
    name = "num_generations" if args.num_generations_eval is None else "num_generations_eval"
    size, group = args.per_device_eval_batch_size * args.world_size, getattr(args, name)
    if size % group:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size}: an evaluation paints {size} samples at a time (that x "
            f"{args.world_size} processes), and {name}={group} must divide them: change per_device_eval_batch_size, or set "
            f"num_generations_eval, 1 for one image per prompt"
        )


def check_form(dataset: Any, name: str) -> None:
    """
    Check that data for an evaluation has a form whose rows can be checked.

    Args:
        dataset: A dataset, a stream, several of these by name, or `None` for no evaluation.
        name (`str`): What the message calls it.

    Raises:
        `TypeError`: If it is something else; the message names it.
    """
    if dataset is None:
        return
    members = (
        {f"{name}[{key!r}]": member for key, member in dataset.items()}
        if isinstance(dataset, Mapping)
        else {name: dataset}
    )
    for label, member in members.items():
        if not isinstance(member, datasets.Dataset | datasets.IterableDataset):
            raise TypeError(
                f"{label} must be a datasets.Dataset or a datasets.IterableDataset, but is {type(member).__name__}: "
                f"datasets.Dataset.from_list makes one of a list of rows, and several are given as a dict of them by name"
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


@dataclass(frozen=True)
class CheckedDatasets:
    """
    Datasets whose rows are checked, and whose images are read with the rows of a rollout.

    Args:
        check ([`RowCheck`]): What every row fulfils.
        functions (`Sequence[Callable]`): Reward functions, which have looked at the datasets as well.
        train, eval: The datasets in the form that they were given in.
    """

    check: RowCheck
    functions: Sequence[Callable]
    train: Any
    eval: Any

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks of all rows by name."""
        return self.check.tasks

    def checked(self, dataset: Any, label: str = "eval_dataset") -> Any:
        """
        Another dataset of the same tasks, checked and prepared in the same way. `None`, and the name of one that was given before,
        stay as they are. So do several datasets by name, each of which is then evaluated as a dataset of its own.

        Raises:
            `TypeError`: If it is none of these.
            `ValueError`: At the first row that fails. The message names the dataset and the row.
        """
        if not (isinstance(dataset, str) and isinstance(self.eval, Mapping) and dataset in self.eval):
            check_form(dataset, label)
        if isinstance(dataset, datasets.Dataset):
            check_not_empty(dataset, label)
            check_columns(dataset.column_names, label)
            validate_rewards(self.functions, {label: dataset}, [])
            check_rows(dataset, self.check, label)
        return readable_rows(dataset, label, self.check, self.functions)


def checked_datasets(
    args: AlphaGRPOConfig,
    reward_funcs: Callable | list[Callable],
    train_dataset: Any,
    eval_dataset: Any,
    processor: UnifiedProcessor,
    model: UnifiedModel,
) -> CheckedDatasets:
    """
    Check every row of every dataset: by the reward functions (see [`validate_rewards`]), and by [`RowCheck`]. Then ask the functions whether
    they can give rewards (see [`preflight_rewards`]). The rows of a stream
    are checked when they are read, and an error names their position. The numbers of the configuration are checked again, because
    its fields can be written to after it was made.

    Args:
        args ([`AlphaGRPOConfig`]): Default task, settings of tasks, and size of images.
        reward_funcs (`Callable` or `list[Callable]`): As given to the trainer.
        train_dataset, eval_dataset: As given to the trainer.
        processor, model: Processor and model of the policy.

    Raises:
        `TypeError`: If data for evaluations has a form that is not read.
        `ValueError`: At the first row that fails. The message names the dataset and the row.
    """
    args.check_numbers()
    check_form(eval_dataset, "eval_dataset")
    if args.eval_on_start and eval_dataset is not None:
        check_evaluation_groups(args)
    check_not_empty(train_dataset, "train_dataset", args.generation_batch_size // args.num_generations)
    functions = listed(reward_funcs)
    named = named_datasets(train_dataset, eval_dataset)
    for label, dataset in named.items():
        check_columns(dataset.column_names, label)
        check_parameters(functions, dataset.column_names, label)
    names = list(
        dict.fromkeys([args.task, *(n for label, rows in named.items() for n in task_names(rows, args.task, label))])
    )
    configs = validated_configs(args, names, model)
    validate_rewards(functions, named, [config.size for config in configs.values()])
    given = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    streams = [dataset for dataset in given if isinstance(dataset, datasets.IterableDataset)]
    columns = [list(stream_columns(stream)) for stream in streams]
    for names_of_stream in columns:
        check_columns(names_of_stream, "a stream")
        check_parameters(functions, names_of_stream, "a stream")
    if any("task" in found for found in columns):
        configs = _possible_configs(args, TASKS.names(), model) | configs
        names += [name for name in configs if name not in names]
    tasks = {name: args.make_task(name) for name in names}
    check = RowCheck(tasks, args.task, processor, model, configs)
    for label, dataset in named.items():
        check_rows(dataset, check, label)
    # Last, because it may wait for another machine.
    preflight_rewards(functions, *configs[args.task].size)
    prepare = partial(readable_rows, check=check, functions=functions)
    if isinstance(eval_dataset, dict):
        prepared = {name: prepare(dataset, f"eval_dataset[{name!r}]") for name, dataset in eval_dataset.items()}
    else:
        prepared = prepare(eval_dataset, "eval_dataset")
    return CheckedDatasets(check, functions, prepare(train_dataset, "train_dataset"), prepared)


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
    for name in args.task_settings.keys() - configs.keys():
        logger.warning(
            "task_settings of '%s' have no effect, unless a stream has rows of this task: this run has %s",
            *(name, ", ".join(configs)),
        )
    for name, config in configs.items():
        try:
            config.grid(model)
            for own in (config, args.for_task(name).train_rollout(0)):
                model.guidance(own.denoising.guidance)
        except ValueError as error:
            raise ValueError(f"task '{name}': {error}") from error
    return configs
