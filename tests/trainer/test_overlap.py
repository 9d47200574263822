# SPDX-License-Identifier: Apache-2.0

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from alphagrpo_ext.shapes import answer_questions
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from reward_models import DVReward, Judge


class PatientJudge(Judge):
    """The pixel judge, as slow as a model behind a network. Notes when it was asked."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked_at: list[float] = []

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        self.asked_at.append(time.perf_counter())
        await asyncio.sleep(self.seconds)
        return answer_questions(image, questions)


def run(make_trainer: Callable[..., AlphaGRPOTrainer], rollout_batch_size: int | None) -> tuple[dict, PatientJudge]:
    judge = PatientJudge(seconds=0.5)
    trainer = make_trainer(
        reward_funcs=DVReward(judge, max_concurrency=4),
        per_device_train_batch_size=16,
        rollout_batch_size=rollout_batch_size,
        # Long enough a rollout to hide something behind.
        num_timesteps=30,
    )
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "timing/reward" in entry)
    return entry, judge


def test_images_are_judged_while_the_next_are_painted(make_trainer: Callable[..., AlphaGRPOTrainer]) -> None:
    alone, patient = run(make_trainer, rollout_batch_size=None)
    overlapped, eager = run(make_trainer, rollout_batch_size=4)
    # Once each, and the same rewards.
    assert len(patient.asked_at) == len(eager.asked_at) == 16
    assert overlapped["reward"] == pytest.approx(alone["reward"], rel=1e-4)
    # Sixteen images, four at a time, half a second each.
    assert alone["timing/reward"] >= 2.0
    hidden = 1 - overlapped["timing/reward"] / alone["timing/reward"]
    assert hidden > 0.2
    # The first part was with the judge while later ones were painted.
    assert eager.asked_at[4] - eager.asked_at[0] > 0.4
    assert max(eager.asked_at) - min(eager.asked_at) > max(patient.asked_at) - min(patient.asked_at) - 0.5
