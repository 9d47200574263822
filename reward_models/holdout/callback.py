# SPDX-License-Identifier: Apache-2.0

"""
A reward that is logged and not trained on, to detect when training exploits the training reward.

It is a callback and not a reward function of weight 0: TRL counts a sample as scored if any reward function scored it, and a
reward function would take part in rectification and in the advantages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alphagrpo_ext.trainer.reward_functions import preflight_rewards
from reward_models.dvreward import DVReward, JudgeFailedError
from reward_models.prompts.questions import from_row


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.callbacks.rollout_event import ScoredRollout


logger = logging.getLogger(__name__)

MIN_T = 2.0
"""Smallest ratio of a slope to its standard error that counts as a trend."""


class HoldoutCallback(TrainerCallback):
    """
    Scores the images of every training rollout with a hold-out reward, and logs `holdout/reward`, `holdout/strict_pass` and
    `holdout/failed_frac`. If no image can be scored, it logs the last of these alone, and training continues.

    Before training, its judge is asked one question; see [`DVReward.preflight`]. It warns when the training reward rises while the hold-out reward falls, once per episode.

    Args:
        reward ([`DVReward`]): The hold-out reward.
        window (`int`, *optional*, defaults to `20`): Number of logs that are compared; see [`diverges`].
    """

    def __init__(self, reward: DVReward, window: int = 20) -> None:
        self.reward = reward
        self.window = window
        self._diverging = False
        self._runner: asyncio.Runner | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._preflight(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A callback that was added to a trainer later is not told of its making.
        self._preflight(args)
        self._diverging = self._diverges(state)

    def on_rollout(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        rollout: ScoredRollout,
        log_metric: Callable[[str, float], None],
    ) -> None:
        # The whole run shares one event loop, so that the judge keeps its connections.
        self._runner = self._runner or asyncio.Runner()
        # A task that paints nothing leaves nothing to judge.
        places = [i for i, trajectory in enumerate(rollout.trajectories) if trajectory.final_image is not None]
        images = [rollout.trajectories[i].final_image for i in places]
        records = [from_row(rollout.rows[i], f"sample {i}") for i in places]
        scores = gather_object(
            [(s.reward, s.strict_pass) for s in self._runner.run(self.reward.score(images, records))]
        )
        rewards = [reward for reward, _ in scores if reward is not None]
        if rewards:
            log_metric("holdout/reward", fmean(rewards))
            log_metric("holdout/strict_pass", fmean(passed for reward, passed in scores if reward is not None))
        if scores:
            log_metric("holdout/failed_frac", 1 - len(rewards) / len(scores))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        was_diverging, self._diverging = self._diverging, self._diverges(state)
        if state.is_world_process_zero and self._diverging and not was_diverging:
            logger.warning(
                "step %d: over the last %d logs the training reward rises while the hold-out reward falls. The policy may "
                "be exploiting the judge: look at the newest images, and compare the answers of both judges.",
                state.global_step,
                self.window,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._runner is not None:
            self._runner.run(self.reward.aclose())
            self._runner.close()
            self._runner = None

    def _preflight(self, args: TrainingArguments) -> None:
        size = (getattr(args, "image_height", 64), getattr(args, "image_width", 64))
        try:
            preflight_rewards([self.reward], *size)
        except JudgeFailedError as error:
            raise JudgeFailedError(f"{error} (the hold-out judge's arguments begin with holdout_)") from error

    def _diverges(self, state: TrainerState) -> bool:
        pairs = [rewards for entry in state.log_history if (rewards := _rewards(entry)) is not None]
        training, holdout = zip(*pairs, strict=True) if pairs else ((), ())
        return diverges(training, holdout, self.window)


def diverges(training: Sequence[float], holdout: Sequence[float], window: int) -> bool:
    """
    Whether the training reward rises while the hold-out reward falls.

    A line is fitted to the last `window` values of each reward by least squares. The rewards diverge if the slope of the training
    reward is at least two standard errors above zero, and the slope of the hold-out reward at least two below. With
    independent noise and 20 values, this happens by chance in 3 of 100 windows for one slope, and in 1 of 1,000
    for both.

    Args:
        training, holdout (`Sequence[float]`): Rewards of the same logs, in order.
        window (`int`): Number of latest values to compare, at least 3. With fewer values the result is `False`.
    """
    if len(training) < window:
        return False
    return slope_t(training[-window:]) >= MIN_T and slope_t(holdout[-window:]) <= -MIN_T


def slope_t(values: Sequence[float]) -> float:
    """
    Compute the t-statistic of a trend: the slope of the least-squares line through equally spaced values, divided by its
    standard error. It is infinite if the values lie on a sloped line, and 0 if they are equal.

    Args:
        values (`Sequence[float]`): At least 3 values.
    """
    from scipy.stats import linregress

    y = np.asarray(values, dtype=np.float64)
    # A smaller range is due to the rounding of rewards, which are averaged in fp32.
    if np.ptp(y) <= np.finfo(np.float32).eps * np.abs(y).max() * len(y):
        return 0.0
    line = linregress(np.arange(len(y)), y)
    # Rounding alone leaves a standard error of about 1e-8 slopes.
    if line.stderr <= 1e-7 * abs(line.slope):
        return float(np.copysign(np.inf, line.slope))
    return float(line.slope / line.stderr)


def _rewards(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    training, holdout = entry.get("reward"), entry.get("holdout/reward")
    return None if training is None or holdout is None else (training, holdout)
