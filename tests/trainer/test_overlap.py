# SPDX-License-Identifier: Apache-2.0

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from alphagrpo_ext.shapes.judge import answer_questions
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


def run(make_trainer: Callable[..., AlphaGRPOTrainer], rollout_batch_size: int | None) -> tuple[dict, list, list]:
    """Returns the log, when the judge was asked, and when images were painted."""
    judge, painted_at = PatientJudge(seconds=0.5), []
    trainer = make_trainer(
        reward_funcs=DVReward(judge, max_concurrency=4),
        per_device_train_batch_size=16,
        rollout_batch_size=rollout_batch_size,
    )
    decode = trainer.model.decode_latents
    trainer.model.decode_latents = lambda *args: painted_at.append(time.perf_counter()) or decode(*args)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "timing/reward" in entry)
    return entry, sorted(judge.asked_at), painted_at


@pytest.mark.slow
def test_images_are_judged_while_the_next_are_painted(make_trainer: Callable[..., AlphaGRPOTrainer]) -> None:
    alone, patient, painted_at_once = run(make_trainer, rollout_batch_size=None)
    overlapped, eager, painted_in_parts = run(make_trainer, rollout_batch_size=4)
    assert (len(painted_at_once), len(painted_in_parts)) == (1, 4)
    # Once each, and the same rewards.
    assert len(patient) == len(eager) == 16
    assert overlapped["reward"] == pytest.approx(alone["reward"], rel=1e-4)
    # Four images at a time, half a second each.
    assert alone["timing/reward"] >= 2.0
    assert eager[4] - eager[0] > 0.4
    # The judge has the first images before the last ones are painted.
    assert patient[0] > painted_at_once[-1]
    assert eager[0] < painted_in_parts[-1]
