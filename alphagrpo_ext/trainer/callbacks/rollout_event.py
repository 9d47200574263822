# SPDX-License-Identifier: Apache-2.0

"""The event `on_rollout`, which Transformers' callback handler does not know: callbacks see a rollout with its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from alphagrpo_ext.trainer.step import RolloutStep, Stopwatch
from alphagrpo_ext.trajectory import Trajectory


@dataclass(frozen=True)
class ScoredRollout:
    """
    A training rollout with its rewards and advantages.

    Fields that say "all processes" hold every process' samples. The others hold the samples of this process, the first of which
    is number `offset` among all.

    Args:
        trajectories (`list[Trajectory]`): What the policy saw and did.
        texts (`list[list[str]]`): What it wrote, one text per turn.
        rows (`Sequence[Mapping[str, Any]]`): The dataset's rows, with their `task`.
        image_advantages (`torch.Tensor` of shape `(samples,)`): Advantages of images.
        offset (`int`): Position of the first sample among the samples of all processes.
        group_size (`int`): Samples per prompt; they follow each other across processes.
        rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Weighted rewards of images before rectification; NaN where there is none.
        initial_rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Weighted rewards of the images that were to be refined; NaN where there is none.
        function_rewards (`dict[str, list[float]]`): All processes' rewards of each function, after rectification.
        advantages (`list[float]`): All processes' advantages of text.
        extra_columns (`dict[str, list]`): All processes' values that reward functions gave to `log_extra` for this rollout.
    """

    trajectories: list[Trajectory]
    texts: list[list[str]]
    rows: Sequence[Mapping[str, Any]]
    image_advantages: torch.Tensor
    offset: int
    group_size: int
    rewards: torch.Tensor
    initial_rewards: torch.Tensor
    function_rewards: dict[str, list[float]]
    advantages: list[float]
    extra_columns: dict[str, list[Any]]


def announce_rollout(trainer: GRPOTrainer, step: RolloutStep, stopwatch: Stopwatch) -> None:
    """
    Call the callbacks that have a method `on_rollout`, in every process, as

    ```python
    on_rollout(args, state, control, rollout=ScoredRollout(...), log_metric=...)
    ```

    `log_metric(name, value)` adds a number of the main process to the next log. Callbacks must leave the random number
    generators and their arguments unchanged.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Has the callbacks and the table of completions.
        step ([`RolloutStep`]): A training rollout, once its advantages are known.
        stopwatch ([`Stopwatch`]): Measures the time of the callbacks.
    """
    listeners = [c for c in trainer.callback_handler.callbacks if hasattr(c, "on_rollout")]
    if not listeners:
        return
    with stopwatch.measure("on_rollout"):
        rollout = scored_rollout(step, trainer._logs, trainer.accelerator)

        def log_metric(name: str, value: float) -> None:
            trainer._metrics["train"][name].append(value)

        for callback in listeners:
            callback.on_rollout(trainer.args, trainer.state, trainer.control, rollout=rollout, log_metric=log_metric)


def scored_rollout(step: RolloutStep, logs: Mapping[str, Any], accelerator: Accelerator) -> ScoredRollout:
    """
    What callbacks see of a rollout.

    Args:
        step ([`RolloutStep`]): Once its advantages are known.
        logs (`Mapping[str, Any]`): TRL's table of completions, at whose end TRL has just put this rollout.
        accelerator ([`~accelerate.Accelerator`]): Gathers what is known of this process alone.
    """
    total = len(step.image_rewards)

    def newest(column: Sequence[Any]) -> list[Any]:
        return list(column)[-total:]

    return ScoredRollout(
        trajectories=step.trajectories,
        texts=step.texts,
        rows=step.rows,
        image_advantages=step.image_advantages,
        offset=step.offset,
        group_size=step.group_size,
        rewards=step.image_rewards,
        initial_rewards=step.initial_rewards,
        function_rewards={name: newest(values) for name, values in logs["rewards"].items()},
        advantages=newest(logs["advantages"]),
        extra_columns={name: newest(values) for name, values in logs["extra"].items()},
    )
