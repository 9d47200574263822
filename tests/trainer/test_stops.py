# SPDX-License-Identifier: Apache-2.0

"""Training where trajectories end without painting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from alphagrpo_ext.report.answers import format_answers
from alphagrpo_ext.report.records import Answer
from alphagrpo_ext.report.store import ReportStore
from alphagrpo_ext.rollout import RolloutGenerator
from alphagrpo_ext.rollout.tasks.self_reflection import SelfReflection
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.rollout_event import ScoredRollout
from alphagrpo_ext.trainer.rewards import stop_metrics
from support.trainers import brightness


MakeTrainer = Callable[..., AlphaGRPOTrainer]
PLAIN = {"task": "self_reflection", "optim": "sgd", "max_grad_norm": 0.0}


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets every `n`-th text end its trajectory; 1 lets all of them."""

    def stop(every: int) -> None:
        counts = iter(range(10**6))
        monkeypatch.setattr(SelfReflection, "paints", lambda self, text, processor: next(counts) % every > 0)

    return stop


def gradients(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return {name: p.detach() - before[name] for name, p in trainer.model.named_parameters() if p.requires_grad}


SETTINGS = [
    pytest.param({}, id="one forward"),
    pytest.param({"image_beta": 0.1, "beta": 0.1, "lora": True, "num_iterations": 2, "max_steps": 2}, id="references"),
    pytest.param({"image_objective": "awm", "image_beta": 0.1, "image_kl_type": "velocity"}, id="AWM"),
    pytest.param({"num_reflection_rounds": 2, "context_gradient": "detached"}, id="two rounds, detached"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("every", [1, 2])
def test_texts_train_where_nothing_is_painted(
    make_trainer: MakeTrainer, stop: Callable[[int], None], settings: dict[str, Any], every: int
) -> None:
    stop(every)
    trainer = make_trainer(**PLAIN, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    moved = gradients(trainer)
    images = [len(t.sampled_images) for update in trainer.recorder.updates for t in update.trajectories]
    assert (max(images) == 0) == (every == 1) and min(images) == 0
    for entry in trainer.state.log_history[:-1]:
        assert ("image/ratio_mean" in entry or "image/kl" in entry) == (every > 1)
        assert every > 1 or entry["image/loss"] == 0.0
    assert all(delta.isfinite().all() for delta in moved.values())
    is_generation = trainer.accelerator.unwrap_model(trainer.model).family.is_generation_parameter
    if every == 1:
        assert not any(delta.any() for name, delta in moved.items() if is_generation(name))


@pytest.mark.parametrize("every", [1, 2])
def test_split_steps_train_as_one_forward(make_trainer: MakeTrainer, stop: Callable[[int], None], every: int) -> None:
    settings = PLAIN | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "image_beta": 0.1}
    stop(every)
    expected = gradients(make_trainer(**settings))
    stop(every)
    parts = make_trainer(**settings, image_steps_per_forward=1)
    actual = gradients(parts)
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(actual[name], delta, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.invariant
def test_ratio_is_one_where_some_stop(make_trainer: MakeTrainer, stop: Callable[[int], None]) -> None:
    stop(3)
    trainer = make_trainer(**PLAIN | {"learning_rate": 0.0}, num_iterations=2, max_steps=2, num_reflection_rounds=2)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry["image/ratio_mean"] == 1.0
        assert entry["clip_ratio/region_mean"] == 0.0


def answered(images: list[Image.Image], log_extra: Callable, **kwargs: Any) -> list[float]:
    """A reward that answers one question: whether an image is bright."""
    rewards = brightness(images)
    answers = [format_answers([Answer("bright ?", "Color", "semantic", round(reward))]) for reward in rewards]
    log_extra("answered/answers", answers)
    return rewards


def test_the_reward_of_an_image_that_is_kept_is_its_own(
    make_trainer: MakeTrainer, stop: Callable[[int], None]
) -> None:
    stop(2)
    rollouts: list[ScoredRollout] = []

    class Rollouts(TrainerCallback):
        def on_rollout(self, *args: Any, rollout: ScoredRollout, **kwargs: Any) -> None:
            rollouts.append(rollout)

    settings = PLAIN | {"allow_stop": True, "stage1_think": True, "report": True}
    trainer = make_trainer(reward_funcs=answered, arguments={"callbacks": [Rollouts()]}, **settings)
    trainer.train()
    (rollout,), entry = rollouts, trainer.state.log_history[0]
    kept = [not t.sampled_images for t in rollout.trajectories]
    initial = rollout.initial_rewards
    assert sum(kept) == 2 and entry["reflection/stop_frac"] == 0.5
    assert torch.equal(rollout.rewards[kept], initial[kept])
    is_false = [not own and rollout.rewards[i] <= initial[i] for i, own in enumerate(kept)]
    assert entry["reflection/rectified_frac"] == sum(is_false) / 4
    passes = rollout.rewards.round()
    assert entry["reflection/stop_right_frac"] == passes[kept].mean().item()
    name, expected = ("broken_frac", 1 - passes) if initial[0].round() else ("fixed_frac", passes)
    assert entry[f"reflection/{name}"] == expected.mean().item()
    # The report shows the kept image with the verdict.
    (group,) = ReportStore(trainer.args.output_dir).groups()
    for record in group.trajectories:
        (turn,) = record.turns
        assert turn.text
        assert (turn.image == record.given_image) == (record.reward == record.given_reward)


@pytest.mark.parametrize("rectification", ["minimum", "initial", "off"])
def test_a_group_that_keeps_its_image_has_no_advantage(
    make_trainer: MakeTrainer, stop: Callable[[int], None], rectification: str
) -> None:
    stop(1)
    seen: list[int] = []

    def recording(images: list[Image.Image], **kwargs: Any) -> list[float]:
        # A judge that never says the same twice.
        seen.append(len(images))
        return [len(seen) + index / 10 for index in range(len(images))]

    trainer = make_trainer(**PLAIN, reward_funcs=recording, allow_stop=True, rectification=rectification)
    trainer.train()
    (update,) = trainer.recorder.updates
    entry = trainer.state.log_history[0]
    assert entry["reflection/initial_reward"] == entry["reflection/final_reward"] == 1.0
    assert entry["reflection/rectified_frac"] == 0.0
    assert not update.inputs["advantages"].any() and not update.inputs["image_advantages"].any()
    # Without answers nothing is known of strict passes.
    assert not {"reflection/stop_right_frac", "reflection/fixed_frac", "reflection/broken_frac"} & entry.keys()


def test_first_images_may_follow_a_thought(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = []
    generate = RolloutGenerator.__call__

    def recording(self: RolloutGenerator, *args: Any) -> Any:
        thinking.append(self.task.think)
        return generate(self, *args)

    monkeypatch.setattr(RolloutGenerator, "__call__", recording)
    for think in (False, True):
        make_trainer(**PLAIN, stage1_think=think).train()
    assert thinking == [False, True]


def test_stopping_needs_a_text() -> None:
    with pytest.raises(ValueError, match="allow_stop=True needs think=True"):
        AlphaGRPOConfig("out", task="self_reflection", allow_stop=True, think=False)


def test_stop_metrics_are_shares_of_those_that_they_are_about() -> None:
    nan = torch.nan
    is_kept = torch.tensor([True, True, True, False, False, False, False])
    initial = torch.tensor([1.0, 0.0, nan, 0.0, 0.0, 1.0, nan])
    final = torch.tensor([1.0, 0.0, nan, 1.0, 0.0, 0.0, 1.0])
    assert stop_metrics(is_kept, initial, final) == {
        "reflection/stop_frac": pytest.approx(3 / 7),
        "reflection/stop_right_frac": 0.5,
        "reflection/fixed_frac": pytest.approx(1 / 3),
        "reflection/broken_frac": 0.5,
    }
