# SPDX-License-Identifier: Apache-2.0

"""
A reward that is logged and not trained on, to notice when training games the one that is.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward_models.dvreward import DVReward
from reward_models.prompts.questions import from_row


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.callbacks.rollout_event import ScoredRollout


logger = logging.getLogger(__name__)

MIN_T = 2.0


class HoldoutCallback(TrainerCallback):
    """
    Scores the images of every training rollout with a reward that nothing is trained on, and logs `holdout/reward`,
    `holdout/strict_pass` and `holdout/failed_frac`. Where it cannot score, it logs nothing and training goes on.

    It warns when the training reward rises while the hold-out reward falls, once for each time that this begins.

    Args:
        reward ([`DVReward`]): The hold-out reward.
        window (`int`, *optional*, defaults to `20`): Logs that are compared; see [`diverges`].
    """

    def __init__(self, reward: DVReward, window: int = 20) -> None:
        self.reward = reward
        self.window = window
        self._diverging = False
        self._runner: asyncio.Runner | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._diverging = self._diverges(state)

    def on_rollout(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        rollout: ScoredRollout,
        log_metric: Callable[[str, float], None],
    ) -> None:
        # One event loop for the whole run: a judge keeps its connections from one rollout to the next.
        self._runner = self._runner or asyncio.Runner()
        images = [trajectory.final_image for trajectory in rollout.trajectories]
        records = [from_row(row, f"sample {i}") for i, row in enumerate(rollout.rows)]
        scores = gather_object(
            [(s.reward, s.strict_pass) for s in self._runner.run(self.reward.score(images, records))]
        )
        rewards = [reward for reward, _ in scores if reward is not None]
        if rewards:
            log_metric("holdout/reward", fmean(rewards))
            log_metric("holdout/strict_pass", fmean(passed for reward, passed in scores if reward is not None))
        log_metric("holdout/failed_frac", 1 - len(rewards) / len(scores))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        was_diverging, self._diverging = self._diverging, self._diverges(state)
        if state.is_world_process_zero and self._diverging and not was_diverging:
            logger.warning(
                "step %d: over the last %d logs the training reward rises while the hold-out reward falls. The policy may "
                "be learning what pleases the judge alone: look at the newest images, and compare both judges' answers.",
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

    def _diverges(self, state: TrainerState) -> bool:
        pairs = [rewards for entry in state.log_history if (rewards := _rewards(entry)) is not None]
        training, holdout = zip(*pairs, strict=True) if pairs else ((), ())
        return diverges(training, holdout, self.window)


def diverges(training: Sequence[float], holdout: Sequence[float], window: int, min_t: float = MIN_T) -> bool:
    """
    Whether the training reward rises while the hold-out reward falls.

    A line is fitted to the last `window` values of each by least squares. It is so if the slope of the first is at least
    `min_t` standard errors above zero and that of the second as far below. With independent noise, 20 values and the
    default of 2, one slope is taken for a trend by chance in 3 of 100 windows, both at once in 1 of 1,000.

    Args:
        training, holdout (`Sequence[float]`): Rewards of the same logs, in their order.
        window (`int`): How many of the last ones count, at least 3. With fewer there is no answer yet, that is `False`.
        min_t (`float`, *optional*, defaults to `2.0`): Slope over its standard error that counts as a trend.
    """
    if len(training) < window:
        return False
    return slope_t(training[-window:]) >= min_t and slope_t(holdout[-window:]) <= -min_t


def slope_t(values: Sequence[float]) -> float:
    """
    Slope of the least-squares line through equally spaced values over its standard error; infinite for values on a line
    that is not level, and 0 on a level one.

    Args:
        values (`Sequence[float]`): At least 3.
    """
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = x @ y / (x @ x)
    residuals = y - y.mean() - slope * x
    # Below rounding there is no noise to compare with.
    scale = np.finfo(np.float64).eps * np.abs(y).max() * len(y)
    if np.abs(residuals).max() <= scale:
        return 0.0 if abs(slope) <= scale else math.copysign(math.inf, slope)
    return float(slope / np.sqrt(residuals @ residuals / (len(y) - 2) / (x @ x)))


def _rewards(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    training, holdout = entry.get("reward"), entry.get("holdout/reward")
    return None if training is None or holdout is None else (training, holdout)
