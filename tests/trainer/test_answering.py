# SPDX-License-Identifier: Apache-2.0

"""Training on questions, alone and in the same run as painting."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from alphagrpo_ext.shapes.answering import question_rows
from alphagrpo_ext.shapes.prompts import prompt_rows
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from reward_models import DVReward
from reward_models.answering.exact import ExactAnswer


MakeTrainer = Callable[..., AlphaGRPOTrainer]
QUESTION = {"question": Value("string"), "tag": Value("string")}
FEATURES = Features(
    {
        **{name: Value("string") for name in ("task", "prompt", "solution")},
        "image": Image(),
        "semantic_questions": [QUESTION],
        "quality_questions": [QUESTION],
    }
)


def mixed_rows(task: str) -> Dataset:
    """Prompts of a task, and as many questions, in turn."""
    prompts = [{"task": task, **row} for row in prompt_rows("train", 4, seed=0)]
    pairs = zip(prompts, question_rows("train", 4, seed=0), strict=True)
    rows = [{name: row.get(name) for name in FEATURES} for pair in pairs for row in pair]
    return Dataset.from_list(rows, features=FEATURES)


def lengthy(completions: list[Any], texts: list[list[str]], **kwargs: Any) -> list[float]:
    """A reward that differs between texts."""
    return [float(sum(map(len, own))) for own in texts]


def moved(trainer: AlphaGRPOTrainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """How the parameters of understanding and of generation change in a run."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    delta = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert all(value.isfinite().all() for value in delta.values())
    generation = {n: d for n, d in delta.items() if model.family.is_generation_parameter(n)}
    return {n: d for n, d in delta.items() if n not in generation}, generation


@pytest.mark.parametrize("think", [True, False])
def test_questions_alone_train_texts_alone(make_trainer: MakeTrainer, think: bool) -> None:
    rows = Dataset.from_list(question_rows("train", 4, seed=0))
    trainer = make_trainer(
        reward_funcs=[ExactAnswer(), lengthy],
        datasets={"train_dataset": rows, "eval_dataset": rows},
        task="visual_question_answering",
        think=think,
        optim="sgd",
        num_iterations=2,
        max_steps=2,
    )
    understanding, generation = moved(trainer)
    assert any(delta.any() for delta in understanding.values())
    assert not any(delta.any() for delta in generation.values())
    first = trainer.state.log_history[0]
    assert {"rewards/answer/mean", "rewards/missing_frac"} <= first.keys() and first["rewards/missing_frac"] == 0
    assert first["image/loss"] == 0
    assert 0 <= trainer.evaluate()["eval_rewards/answer/mean"] <= 1


@pytest.mark.parametrize("task", ["reasoning_t2i", "self_reflection"])
def test_painting_and_answering_train_in_one_run(make_trainer: MakeTrainer, task: str) -> None:
    trainer = make_trainer(
        reward_funcs=[DVReward("shapes", max_failed_frac=0.0), ExactAnswer()],
        datasets={"train_dataset": mixed_rows(task)},
        task=task,
        per_device_train_batch_size=16,
        max_steps=2,
        report=True,
    )
    trainer.train()
    rewards = []
    for update in trainer.recorder.updates:
        for trajectory in update.trajectories:
            is_answer = trajectory.task == "visual_question_answering"
            assert len(trajectory.sampled_images) == (not is_answer)
            rewards.append(is_answer)
        # Nobody is left out of training.
        assert update.inputs["is_scored"].all()
    assert sum(rewards) == len(rewards) / 2
    for entry in trainer.state.log_history[:-1]:
        assert entry["rewards/missing_frac"] == 0 and entry["judge/failed_frac"] == 0
        # The reward of a task is that of its own function.
        assert entry["rewards/visual_question_answering"] == pytest.approx(entry["rewards/answer/mean"])
        if task == "reasoning_t2i":
            assert entry[f"rewards/{task}"] == pytest.approx(entry["rewards/dvreward/mean"])
        else:
            assert entry[f"rewards/{task}"] == pytest.approx(entry["reflection/final_reward"])
    assert "visual_question_answering" in Path(trainer.args.output_dir, "report.html").read_text()


def test_a_judge_that_fails_is_still_seen(make_trainer: MakeTrainer) -> None:
    """A missing reward of an image is a failure, and that of an answer is not."""

    async def fails(prompts: list[Any], images: list[Any], **kwargs: Any) -> list[float | None]:
        return [None if image is None or i % 4 == 0 else float(i) for i, image in enumerate(images)]

    fails.always_applies = True
    trainer = make_trainer(
        reward_funcs=[fails, ExactAnswer()],
        datasets={"train_dataset": mixed_rows("reasoning_t2i")},
        per_device_train_batch_size=16,
    )
    trainer.train()
    (update,) = trainer.recorder.updates
    scored = dict(zip(map(id, update.trajectories), update.inputs["is_scored"].tolist(), strict=True))
    answered = [scored[id(t)] for t in update.trajectories if t.task == "visual_question_answering"]
    painted = [scored[id(t)] for t in update.trajectories if t.task == "reasoning_t2i"]
    assert all(answered) and painted.count(False) == len(painted) / 4
    assert math.isclose(trainer.state.log_history[0]["rewards/missing_frac"], 1 / 8)
