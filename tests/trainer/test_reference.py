# SPDX-License-Identifier: Apache-2.0

"""The reference model of a KL without an adapter: a frozen copy of the policy, wherever that came from."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.reference import frozen_copy, mixup_alpha, on_device


MakeTrainer = Callable[..., AlphaGRPOTrainer]


def history(trainer: AlphaGRPOTrainer, metric: str) -> list[float]:
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"beta": 0.1, "image_beta": 0.1}, id="text and image"),
        pytest.param({"image_beta": 0.1}, id="image"),
        pytest.param({"beta": 0.1}, id="text"),
        pytest.param({"beta": 0.1, "image_beta": 0.1, "offload_ref_model": True}, id="in host memory"),
        pytest.param({"image_beta": 0.1, "offload_ref_model": True, "image_steps_per_forward": 2}, id="in parts"),
    ],
)
def test_kl_of_a_model_that_came_from_no_folder(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make_trainer(max_steps=2, **settings)
    assert not trainer.model.config._name_or_path
    initial = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert (trainer.beta, trainer.args.beta) == (settings.get("beta", 0.0),) * 2
    for metric, coefficient in (("kl", "beta"), ("image/kl", "image_beta")):
        values = history(trainer, metric)
        if coefficient not in settings:
            assert not values
            continue
        first, second = values
        assert first < 1e-6 < second
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(reference[name], value) for name, value in initial.items())
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_no_kl_needs_no_reference(make_trainer: MakeTrainer) -> None:
    assert make_trainer().ref_model is None
    assert make_trainer(lora=True, beta=0.1, image_beta=0.1).ref_model is None


def test_adapter_that_was_there_is_its_own_reference(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel]
) -> None:
    """A trained adapter is compared with a copy of itself, not with the base model."""
    model = get_peft_model(make_shapes_bagel(), LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    trainer = make_trainer(model=model, beta=0.1, image_beta=0.1, max_steps=2)
    trainer.train()
    first, second = history(trainer, "image/kl")
    assert first < 1e-6 < second


def test_synchronized_reference_follows_the_policy(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=1
    )
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    pairs = zip(trainer.model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(policy, copied) for policy, copied in pairs)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"beta": 0.1, "image_beta": 0.1}, id="text and image"),
        pytest.param({"image_beta": 0.1}, id="image", marks=pytest.mark.slow),
    ],
)
def test_reference_adapter_is_a_moving_average(make_trainer: MakeTrainer, settings: dict[str, float]) -> None:
    trainer = make_trainer(
        lora=True, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25, max_steps=2, **settings
    )
    states = []

    class States(TrainerCallback):
        def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            states.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name})

    trainer.add_callback(States())
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".default." in name}
    trainer.train()
    assert initial and trainer.model.active_adapter == "default"
    average = initial
    for state in states:
        assert any(not torch.equal(state[name], value) for name, value in initial.items())
        average = {name: 0.75 * value + 0.25 * state[name] for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(state[name.replace(".default.", ".ref.")], value, rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".ref." in name)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in trainer.model.named_parameters() if ".default." in name}
    first, second = history(trainer, "image/kl")
    assert first < 1e-6 < second


@pytest.mark.slow
def test_average_of_a_policy_is_nearer_than_its_beginning(make_trainer: MakeTrainer) -> None:
    settings = {"lora": True, "image_beta": 0.1, "max_steps": 4, "think": False}
    distances = {}
    for follows in (False, True):
        trainer = make_trainer(**settings, sync_ref_model=follows, ref_model_sync_steps=1)
        trainer.train()
        distances[follows] = history(trainer, "image/kl")[-1]
    assert 0 < distances[True] < 0.5 * distances[False]


PUBLISHED_AWM = {
    "image_objective": "awm",
    "sde_window_size": 6,
    "image_beta": 1.0,
    "image_kl_type": "velocity",
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    "ref_model_mixup_alpha": 0.7,
    "ref_model_decay_ramp": 0.001,
    "image_base_beta": 0.003,
}
"""Settings of AWM's authors, as the trainer's README has them."""


@pytest.mark.parametrize("lora", [False, True])
def test_published_awm_compares_images_with_its_average_and_its_beginning(
    make_trainer: MakeTrainer, lora: bool
) -> None:
    settings = {"model": "bagel-shapes", "max_steps": 3, "think": False, "cfg_text_scale": 1.0, "lora": lora}
    trainer = make_trainer(**settings, **(PUBLISHED_AWM | {"ref_model_decay_ramp": 0.2}))
    beginning = trainer.accelerator.unwrap_model(trainer.model)
    beginning = frozen_copy(beginning.get_base_model() if lora else beginning)
    states = []

    class States(TrainerCallback):
        def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            states.append({n: p.detach().clone() for n, p in model.named_parameters() if ".ref." not in n})

    trainer.add_callback(States())
    states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." not in n})
    trainer.train()
    assert history(trainer, "image/ratio_mean") == [1.0, 1.0, 1.0]
    assert all(0 < norm < float("inf") for norm in history(trainer, "grad_norm"))
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".ref." in n)

    # Before the third step the average has followed twice, and kept 0.2 and then 0.3 of itself.
    update = trainer.recorder.updates[2]
    average = {n: 0.3 * (0.2 * p + 0.8 * states[1][n]) + 0.7 * states[2][n] for n, p in states[0].items()}
    for name, weights in (("base_velocities", states[0]), ("ref_velocities", average)):
        current = copy.deepcopy(trainer.model.state_dict())
        trainer.model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            expected = trainer.scorer.score(trainer.model, update.trajectories).images.velocities
            if name == "base_velocities":
                original = trainer.scorer.score(beginning, update.trajectories).images.velocities
                torch.testing.assert_close(original, expected, atol=1e-5, rtol=1e-5)
        trainer.model.load_state_dict(current)
        torch.testing.assert_close(torch.cat(update.inputs[name]), expected, atol=1e-5, rtol=1e-5)
    for metric, name in (("image/base_kl", "base_velocities"), ("image/kl", "ref_velocities")):
        values = history(trainer, metric)
        assert values[0] == pytest.approx(0, abs=1e-9) and values[2] > 1e-6
        difference = update.images.velocities - torch.cat(update.inputs[name])
        assert values[2] == pytest.approx(difference.square().mean().item(), rel=1e-4)


def test_base_penalty_is_added_at_its_weight(make_trainer: MakeTrainer) -> None:
    settings = {"max_steps": 2, "think": False, "image_beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
    settings |= {"learning_rate": 1e-2, "image_steps_per_forward": 2}
    with_penalty, without = make_trainer(**settings, image_base_beta=0.5), make_trainer(**settings)
    assert with_penalty.base_model is not None and without.base_model is None
    with_penalty.train()
    without.train()
    assert not history(without, "image/base_kl")
    distances = history(with_penalty, "image/base_kl")
    # The first update has no penalty and no gradient of it, so that the second rollouts are the same.
    assert distances[0] < 1e-6 < distances[1]
    expected = [loss + 0.5 * d for loss, d in zip(history(without, "image/loss"), distances, strict=True)]
    assert history(with_penalty, "image/loss") == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_reference_that_follows_nothing_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="sync_ref_model=True.*beta=0.0"):
        make_trainer(lora=True, sync_ref_model=True)


def test_copy_of_a_policy_that_was_trained_before_is_a_copy(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel]
) -> None:
    """TRL wraps the forward of a policy, which must not lead the copy's forward back to the policy."""
    model = make_shapes_bagel()
    trainer = make_trainer(model=model)
    trainer.train()
    (update,) = trainer.recorder.updates
    batch = model.pack(update.trajectories, trainer.args.guidance)
    reference = frozen_copy(trainer.model)
    with torch.no_grad():
        expected = reference(**batch.inputs).velocities
        trainer.model.llm2vae.weight.zero_()
        actual = reference(**batch.inputs).velocities
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Traveller(torch.nn.Linear):
    """Notes where it is sent. No accelerator is at hand, and the other devices of a CPU build hold no data."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.places: list[str] = []

    def to(self, device: torch.device) -> "Traveller":
        self.places.append(device.type)
        return self


def test_visitor_goes_home() -> None:
    model = Traveller()
    with pytest.raises(RuntimeError, match="out of memory"), on_device(model, torch.device("cuda")):
        assert model.places == ["cuda"]
        raise RuntimeError("out of memory")
    assert model.places == ["cuda", "cpu"]


@pytest.mark.parametrize("lora", [False, True])
def test_reference_samples_what_the_policy_is_trained_on(make_trainer: MakeTrainer, lora: bool) -> None:
    """Rollouts, their old log-probabilities and old velocities are those of a model that stays behind."""
    settings = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 100,
        "max_steps": 2,
        "lora": lora,
        "learning_rate": 1e-2,
    }
    ours = make_trainer(rollout_policy="reference", **settings)
    ours.train()
    still = make_trainer(learning_rate=0.0, max_steps=2, lora=lora)
    still.train()
    # The reference did not move, so that its second rollout is one of the policy that it was.
    assert len(ours.recorder.updates) == len(still.recorder.updates) == 2
    for update, expected in zip(ours.recorder.updates, still.recorder.updates, strict=True):
        for trajectory, other in zip(update.trajectories, expected.trajectories, strict=True):
            assert [t.token_ids for t in trajectory.sampled_texts] == [t.token_ids for t in other.sampled_texts]
            for image, same in zip(trajectory.sampled_images, other.sampled_images, strict=True):
                torch.testing.assert_close(image.latents, same.latents, atol=1e-5, rtol=1e-5)
    first, second = history(ours, "image/ratio_mean")
    assert first == pytest.approx(1, abs=1e-6) and second != pytest.approx(1, abs=1e-6)
    assert ours.model.training and (not lora or ours.model.active_adapter == "default")
    trained = {id(p) for group in ours.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in ours.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{"image_objective": "diffusion_nft"}, {"beta": 0.1, "image_beta": 0.1}])
def test_old_velocities_are_those_of_the_reference_that_sampled(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(
        rollout_policy="reference", sync_ref_model=True, ref_model_sync_steps=100, max_steps=2, **settings
    )
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    update = trainer.recorder.updates[1]
    with torch.no_grad():
        scores = trainer.scorer.score(reference, update.trajectories)
    old = torch.cat(update.inputs["old_velocities"])
    torch.testing.assert_close(old, scores.images.velocities, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(update.inputs["old_per_token_logps"], scores.log_probs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(old, update.images.velocities, atol=1e-4)


def test_decay_of_the_reference_rises_to_its_limit() -> None:
    """DiffusionNFT's sampling policy keeps `min(0.001 i, 0.5)` of itself."""
    args = AlphaGRPOConfig(
        "unused", sync_ref_model=True, ref_model_decay_ramp=0.001, ref_model_mixup_alpha=0.5, bf16=False, use_cpu=True
    )
    kept = [1 - mixup_alpha(args, step) for step in (1, 100, 499, 500, 5000)]
    assert kept == pytest.approx([0.001, 0.1, 0.499, 0.5, 0.5])
    args.ref_model_decay_ramp = None
    assert mixup_alpha(args, 1) == 0.5


@pytest.mark.parametrize(
    "settings",
    [{"rollout_policy": "reference"}, {"ref_model_decay_ramp": 0.1}, {"image_base_beta": 0.003}],
)
def test_a_policy_that_follows_needs_a_reference_that_does(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* set sync_ref_model=True"):
        AlphaGRPOConfig("unused", bf16=False, use_cpu=True, **settings)
