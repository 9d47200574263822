# SPDX-License-Identifier: Apache-2.0

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from reward_models import DVReward
from reward_models.arguments import PromptArguments
from reward_models.holdout.arguments import HoldoutArguments
from reward_models.holdout.callback import HoldoutCallback, diverges, slope_t
from reward_models.judges.arguments import JudgeArguments


RISING = [0.5 + 0.01 * i for i in range(20)]
FALLING = RISING[::-1]
NOISE = np.random.default_rng(0).normal(0, 0.05, 20)


@pytest.mark.parametrize(
    ("training", "holdout", "expected"),
    [
        pytest.param(RISING, FALLING, True, id="apart"),
        pytest.param(RISING + NOISE, FALLING + NOISE[::-1], True, id="apart, with noise"),
        pytest.param(RISING, RISING, False, id="both rise"),
        pytest.param(FALLING, FALLING, False, id="both fall"),
        pytest.param(FALLING, RISING, False, id="the other way round"),
        pytest.param(RISING, [0.5] * 20, False, id="hold-out is level"),
        pytest.param(RISING, 0.5 + NOISE - 1e-4 * np.arange(20), False, id="hold-out falls within its noise"),
        pytest.param(RISING[:19], FALLING[:19], False, id="too few"),
        pytest.param(FALLING + RISING, RISING + FALLING, True, id="only the window counts"),
    ],
)
def test_rewards_that_move_apart(training: Sequence[float], holdout: Sequence[float], expected: bool) -> None:
    assert diverges(training, holdout, window=20) is expected


@pytest.mark.slow
def test_chance_is_rarely_taken_for_a_trend() -> None:
    """As the docstring says: of windows without a trend, 3 in 100 a slope, and 1 in 1,000 both."""
    rng = np.random.default_rng(0)
    slopes = [slope_t(rng.normal(size=20)) for _ in range(20_000)]
    assert np.mean(np.array(slopes) >= 2) == pytest.approx(0.03, abs=0.006)


def test_slope_against_a_hand_computed_fit() -> None:
    # Values 0, 1, 1 on -1, 0, 1: slope 1/2, residuals 1/6 (-1, 2, -1), variance 1/6, standard error of the slope
    # sqrt(1/12).
    assert slope_t([0.0, 1.0, 1.0]) == pytest.approx(0.5 / math.sqrt(1 / 12))
    assert slope_t([1.0, 1.0, 0.0]) == pytest.approx(-0.5 / math.sqrt(1 / 12))
    assert slope_t([0.3, 0.3, 0.3]) == 0
    # Rewards are averaged in fp32, so a trend of that size is none.
    assert slope_t([0.3 + step * 3e-8 for step in range(3)]) == 0
    assert slope_t([0.1, 0.2, 0.3]) == math.inf


def test_each_episode_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = HoldoutCallback(DVReward("shapes"), window=4)
    args, state, control = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    holdout = [5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1]
    warned = []
    for step, value in enumerate(holdout, start=1):
        state.global_step = step
        state.log_history.append({"step": step, "reward": float(step), "holdout/reward": float(value)})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            callback.on_log(args, state, control)
        if caplog.records:
            warned.append(step)
            assert f"step {step}:" in caplog.text and "hold-out reward falls" in caplog.text
    assert len(warned) == 2 and warned[0] == 4
    # A run that is resumed within an episode has had its warning.
    resumed = HoldoutCallback(DVReward("shapes"), window=4)
    caplog.clear()
    resumed.on_train_begin(args, state, control)
    resumed.on_log(args, state, control)
    assert not caplog.records


def test_arguments_are_those_of_the_judge_with_a_prefix() -> None:
    with pytest.raises(ValueError, match="^holdout_judge_batch_size must be at least 1, but is 0"):
        PromptArguments(judge="shapes", holdout_judge="policy", holdout_judge_batch_size=0)
    assert PromptArguments().make_holdout_callbacks() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout_window": 3}, "holdout_window must be at least 4, but is 3"),
        ({"holdout_judge": "openai", "holdout_judge_extra_body": "[1]"}, "must be a JSON object"),
        ({"judge_min_answer_mass": float("nan")}, "judge_min_answer_mass must be in"),
        ({"holdout_judge": "policy", "holdout_judge_min_answer_mass": 1.5}, "judge_min_answer_mass must be in"),
    ],
)
def test_malformed_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptArguments(**settings)


def test_a_holdout_judge_has_the_settings_of_the_other_where_none_are_given() -> None:
    defaults, holdout = JudgeArguments(), HoldoutArguments()
    for setting in fields(JudgeArguments):
        if setting.name != "judge":
            assert getattr(holdout, f"holdout_{setting.name}") == getattr(defaults, setting.name), setting.name
