# SPDX-License-Identifier: Apache-2.0

"""Training where trajectories end without painting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alphagrpo_ext.rollout.tasks.self_reflection import SelfReflection
from alphagrpo_ext.trainer import AlphaGRPOTrainer


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
