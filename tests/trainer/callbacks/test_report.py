# SPDX-License-Identifier: Apache-2.0

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphagrpo_ext.report import ReportStore
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.report import groups_to_show, is_due
from reward_models import DVReward
from reward_models.format import FORMATS


MakeTrainer = Callable[..., AlphaGRPOTrainer]


def weights(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def page_data(folder: Path) -> dict[str, Any]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(island)


def test_report_shows_what_was_trained_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(reward_funcs=DVReward("shapes"), report=True, per_device_train_batch_size=8)
    trainer.train()
    groups = ReportStore(tmp_path).groups()
    assert [(group.step, group.task, len(group.trajectories)) for group in groups] == [(1, "reasoning_t2i", 4)] * 2
    inputs = trainer.recorder.updates[0].inputs
    shown = sorted(t.image_advantage for group in groups for t in group.trajectories)
    assert shown == pytest.approx(sorted(inputs["image_advantages"].tolist()))
    for group in groups:
        advantages = [trajectory.image_advantage for trajectory in group.trajectories]
        assert advantages == sorted(advantages, reverse=True)
        for trajectory in group.trajectories:
            # The answers are those that the reward was made from.
            semantic, quality = (
                [answer.p_yes for answer in trajectory.answers if answer.kind == kind]
                for kind in ("semantic", "quality")
            )
            expected = (sum(semantic) / len(semantic) * sum(quality) / len(quality)) ** 0.5
            assert trajectory.reward == pytest.approx(expected, abs=1e-3)
            assert trajectory.rewards == {"dvreward": pytest.approx(trajectory.reward)}
    data = page_data(tmp_path)
    assert data["run"]["changed"]["report"] == "True" and data["run"]["unchanged"]["task"] == "reasoning_t2i"
    assert len(data["groups"]) == 2
    assert {"Reward", "Pass rate by tag", "Ratios", "Lengths", "Timings"} <= {c["section"] for c in data["charts"]}


def test_refinements_have_their_initial_image_and_reward(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(
        reward_funcs=[DVReward("shapes"), FORMATS.get("think")()], task="self_reflection", report=True
    )
    trainer.train()
    (group,) = ReportStore(tmp_path).groups()
    assert len({trajectory.given_image for trajectory in group.trajectories}) == 1
    logged = trainer.state.log_history[0]
    rewards = [trajectory.reward for trajectory in group.trajectories]
    # Before rectification.
    assert sum(rewards) / len(rewards) == pytest.approx(logged["reflection/final_reward"], abs=1e-5)
    assert group.trajectories[0].given_reward == pytest.approx(logged["reflection/initial_reward"], abs=1e-5)
    assert len(group.trajectories[0].rewards) == 2
    assert all(len(trajectory.turns) == 1 for trajectory in group.trajectories)


@pytest.mark.invariant
def test_report_does_not_change_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    results = []
    for report in (False, True):
        trainer = make_trainer(output_dir=str(tmp_path / str(report)), report=report, max_steps=2)
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert not (tmp_path / "False" / "report.html").exists()


def test_resumed_run_goes_on_with_its_report(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"report": True, "report_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}

    def shown() -> tuple[list[tuple], list[tuple]]:
        data = page_data(tmp_path)
        (reward,) = [chart for chart in data["charts"] if chart["title"] == "Reward"]
        groups = [(g["step"], g["prompt"], [t["reward"] for t in g["trajectories"]]) for g in data["groups"]]
        return groups, reward["series"][0]["points"]

    make_trainer(**settings).train()
    groups, points = shown()
    assert [step for step, _, _ in groups] == [step for step, _ in points] == [1, 2, 3]
    # Of what came after the checkpoint, nothing is left before it is made again.
    resumed = make_trainer(**settings)
    steps_at_start = []
    begin = resumed.callback_handler.on_step_begin

    def note(*args: Any, **kwargs: Any) -> Any:
        if not steps_at_start:
            steps_at_start.append([group.step for group in ReportStore(tmp_path).groups()])
        return begin(*args, **kwargs)

    resumed.callback_handler.on_step_begin = note
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert steps_at_start == [[1]]
    assert shown() == (groups, points)
    rewards = [entry.step for entry in ReportStore(tmp_path).prompt_rewards()]
    assert rewards == [1, 2, 3]
    make_trainer(**(settings | {"max_steps": 1})).train()
    assert [step for step, _, _ in shown()[0]] == [1]


@pytest.mark.parametrize(
    ("every", "period", "expected"),
    [(1, 1, [1, 2, 3, 4, 5, 6, 7]), (3, 1, [1, 3, 6, 7]), (3, 2, [1, 3, 7]), (10, 2, [1, 7]), (10, 3, [1, 7])],
    ids=str,
)
def test_rollouts_that_are_due(every: int, period: int, expected: list[int]) -> None:
    assert [step for step in range(1, 8, period) if is_due(step, every, period, num_steps=7)] == expected


def test_informative_groups_and_a_fair_sample_are_shown() -> None:
    nan = float("nan")
    rewards = torch.tensor([[0.5, 0.5], [0.5, 0.6], [0.1, 0.9], [nan, 0.4], [0.2, 0.2]])
    initial = torch.full((5, 2), nan)
    assert groups_to_show(rewards, initial, 2) == [0, 2]
    # Both members of the last group are worse than what they were given.
    initial[4] = 0.3
    assert groups_to_show(rewards, initial, 3) == [0, 2, 4]
    assert groups_to_show(rewards, initial, 9) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["report_steps", "report_num_trajectories", "report_image_size"])
def test_settings_must_be_positive(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but is 0"):
        AlphaGRPOConfig(output_dir=str(tmp_path), bf16=False, **{name: 0})
