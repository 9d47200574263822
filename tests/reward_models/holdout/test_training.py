# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from reward_models import DVReward, Judge
from reward_models.arguments import PromptArguments
from reward_models.holdout.callback import HoldoutCallback


MakeTrainer = Callable[..., AlphaGRPOTrainer]


class UnavailableJudge(Judge):
    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        raise ConnectionError("nobody is there")


@pytest.mark.invariant
def test_hold_out_reward_is_logged_and_not_trained_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    results = []
    for name in ("without", "with"):
        trainer = make_trainer(output_dir=str(tmp_path / name), max_steps=2, task="self_reflection")
        # The tiny model has random weights, so no word of its answers is likely.
        judge = "policy" if name == "with" else None
        arguments = PromptArguments(holdout_judge=judge, holdout_judge_min_answer_mass=0.0)
        policy = (trainer.model, trainer.processing_class)
        for callback in arguments.make_holdout_callbacks(policy=policy):
            trainer.add_callback(callback)
        trainer.train()
        results.append((trainer.model.state_dict(), trainer.state.log_history))
    (expected, without), (actual, logs) = results
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    for entry, other in zip(logs[:2], without[:2], strict=True):
        assert 0 <= entry["holdout/reward"] <= 1 and entry["holdout/failed_frac"] == 0
        assert entry["reward"] == other["reward"]
        assert not any("holdout" in key or "on_rollout" in key for key in other)


def test_hold_out_judge_that_fails_does_not_stop_training(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.add_callback(HoldoutCallback(DVReward(UnavailableJudge(), name="holdout")))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["holdout/failed_frac"] == 1
    assert "holdout/reward" not in entry
