# SPDX-License-Identifier: Apache-2.0

"""What callbacks see of a rollout once it has rewards and advantages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alphagrpo_ext.trajectory import Trajectory


@dataclass(frozen=True)
class ScoredRollout:
    """
    A training rollout. Of all processes are the fields that say so; the others are about the samples of this process,
    the first of which is number `offset` of all.

    Args:
        trajectories (`list[Trajectory]`): What the policy saw and did.
        texts (`list[list[str]]`): What it wrote, one text a turn.
        rows (`Sequence[Mapping[str, Any]]`): The dataset's rows, with their `task`.
        image_advantages (`torch.Tensor` of shape `(samples,)`): Advantages of images.
        offset (`int`): Place of the first sample among those of all processes.
        group_size (`int`): Samples of a prompt, which follow each other in all processes.
        rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Weighted rewards of images, before rectification; NaN where there is none.
        initial_rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Those of the images that were to be refined; NaN where there is none.
        function_rewards (`dict[str, list[float]]`): Of all processes, the rewards of each function after rectification.
        advantages (`list[float]`): Of all processes, the advantages of text.
        extra_columns (`dict[str, list]`): Of all processes, what reward functions gave to `log_extra`.
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


class RolloutEventMixin:
    """
    Gives a trainer's callbacks an event more: one with a method `on_rollout` is called after every training rollout, in every
    process, as

    ```python
    on_rollout(args, state, control, rollout=ScoredRollout(...), log_metric=...)
    ```

    `log_metric(name, value)` logs a number of the main process with the next log. Callbacks must leave the random number
    generators and what they are given as it is.
    """

    def _announce_rollout(self, image_advantages: torch.Tensor) -> None:
        callbacks = [c for c in self.callback_handler.callbacks if hasattr(c, "on_rollout")]
        if not callbacks or not self.model.training:
            return
        start = time.perf_counter()
        rollout = self._scored_rollout(image_advantages)

        def log_metric(name: str, value: float) -> None:
            self._metrics["train"][name].append(value)

        for callback in callbacks:
            callback.on_rollout(self.args, self.state, self.control, rollout=rollout, log_metric=log_metric)
        # Else the trainer would count it as time of the update.
        self._seconds["on_rollout"] = self._seconds.get("on_rollout", 0.0) + time.perf_counter() - start

    def _scored_rollout(self, image_advantages: torch.Tensor) -> ScoredRollout:
        # TRL has just put what it gathered at the end of its logs.
        total = len(self._judged_rewards)

        def newest(column: Sequence[Any]) -> list[Any]:
            return list(column)[-total:]

        initial = torch.tensor(self._initial_rewards, device=self.accelerator.device)
        return ScoredRollout(
            trajectories=self._trajectories,
            texts=self._texts,
            rows=self._rows,
            image_advantages=image_advantages,
            offset=self.accelerator.process_index * len(self._trajectories),
            group_size=self.num_generations,
            rewards=self._judged_rewards,
            initial_rewards=self.accelerator.gather(initial),
            function_rewards={name: newest(values) for name, values in self._logs["rewards"].items()},
            advantages=newest(self._logs["advantages"]),
            extra_columns={name: newest(values) for name, values in self._logs["extra"].items()},
        )
