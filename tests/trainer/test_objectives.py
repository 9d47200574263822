# SPDX-License-Identifier: Apache-2.0

"""Every image objective in the real trainer, on the packaged model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.transitions import velocity_mse
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.objectives.regularizers import score_transitions
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trajectory import Trajectory


MakeTrainer = Callable[..., AlphaGRPOTrainer]

OBJECTIVE_SETTINGS = [
    pytest.param({"image_objective": "flow_grpo"}, id="flow_grpo"),
    pytest.param({"image_objective": "flow_grpo", "sde_type": "flow_cps"}, id="flow_cps"),
    pytest.param({"image_objective": "grpo_guard"}, id="grpo_guard"),
    pytest.param({"image_objective": "diffusion_nft"}, id="diffusion_nft"),
    pytest.param({"image_objective": "awm"}, id="awm"),
]


def score(trainer: AlphaGRPOTrainer, trajectories: list[Trajectory]) -> ImageScores:
    """What the policy now makes of trajectories."""
    model, guidance = trainer.model.eval(), trainer.args.objective_guidance
    batch = model.pack(trajectories, guidance)
    with torch.no_grad():
        return ImageScores.from_packed(trajectories, batch, model(**batch.inputs))


def likelihood(trainer: AlphaGRPOTrainer, scores: ImageScores) -> torch.Tensor:
    """How likely the objective takes each image to be, `(images,)`."""
    if trainer.args.trains_forward_process:
        target = (scores.latents - scores.clean_latents) / scores.t[..., None, None]
        # In all of these objectives times weigh by the error of the image, not of the velocity, or nearly so.
        return -(scores.t * velocity_mse(scores.velocities, target, scores.mask)).mean(dim=1)
    return score_transitions(scores, scores.velocities, trainer.args.objective).log_prob.mean(dim=1)


@pytest.mark.parametrize("settings", OBJECTIVE_SETTINGS)
@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param([1.0, 0.0, 0.0, 0.0], id="one good"),
        pytest.param([0.0, 1.0, 1.0, 1.0], id="one bad", marks=pytest.mark.slow),
    ],
)
def test_an_image_becomes_more_likely_with_its_advantage(
    make_trainer: MakeTrainer, settings: dict[str, str], rewards: list[float]
) -> None:
    def reward(images: list[Image.Image], **kwargs: Any) -> list[float]:
        return rewards

    trainer = make_trainer(
        model="bagel-shapes",
        reward_funcs=reward,
        text_loss_weight=0.0,
        learning_rate=1e-3,
        optim="sgd",
        max_grad_norm=0.1,
        cfg_text_scale=1.0,
        **settings,
    )
    trainer.train()
    (update,) = trainer.recorder.updates
    advantages = update.inputs["image_advantages"]
    gain = likelihood(trainer, score(trainer, update.trajectories)) - likelihood(trainer, update.images)
    (odd,) = [i for i, a in enumerate(advantages) if (a > 0) == (rewards[0] > 0)]
    assert torch.sign(gain[odd]) == torch.sign(advantages[odd])
    assert (advantages * gain).sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        *OBJECTIVE_SETTINGS,
        pytest.param(
            {"image_objective": "awm", "task": "self_reflection", "num_reflection_rounds": 2, "think": True},
            id="awm, two images",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_first_update_is_on_policy_and_the_second_is_not(make_trainer: MakeTrainer, settings: dict[str, str]) -> None:
    trainer = make_trainer(**{"think": False, **settings}, max_steps=2, num_iterations=2, cfg_text_scale=1.0)
    trainer.train()
    name, neutral = ("old_deviation", 0.0) if settings["image_objective"] == "diffusion_nft" else ("ratio_mean", 1.0)
    first, second = (e[f"image/{name}"] for e in trainer.state.log_history if f"image/{name}" in e)
    assert first == pytest.approx(neutral, abs=1e-6)
    assert abs(second - neutral) > 1e-5


def test_copies_are_the_painted_image_with_noise(make_trainer: MakeTrainer) -> None:
    settings = {"image_objective": "diffusion_nft", "num_generations": 2, "think": False}
    trainer = make_trainer(**settings)
    trainer.train()
    (update,) = trainer.recorder.updates
    images = update.images
    assert images.t.shape == (4, 3)
    assert (images.t == images.t[0]).all()
    noise = (images.latents - (1 - images.t[..., None, None]) * images.clean_latents) / images.t[..., None, None]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    flat = noise.flatten(0, 1).flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.3
    for trajectory, clean in zip(update.trajectories, images.clean_latents, strict=True):
        assert torch.equal(trajectory.sampled_images[0].latents, clean[0])
    # Noise belongs to the sample, in whatever batch it was painted.
    apart = make_trainer(**settings, rollout_batch_size=2)
    apart.train()
    for name in ("t", "latents", "clean_latents"):
        actual, expected = (getattr(t.recorder.updates[0].images, name) for t in (apart, trainer))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_times_differ_between_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(image_objective="awm", max_steps=2, think=False)
    trainer.train()
    first, second = (update.images.t for update in trainer.recorder.updates)
    assert not torch.equal(first, second)


def test_forward_process_trains_without_guidance_what_was_painted_with_it(make_trainer: MakeTrainer) -> None:
    settings = {"cfg_text_scale": 4.0, "cfg_interval": [0.0, 1.0], "think": False}
    guided = make_trainer(image_objective="awm", **settings)
    guided.train()
    (update,) = guided.recorder.updates
    assert guided.model.pack(
        update.trajectories, guided.args.objective_guidance
    ).velocities.branch.unique().tolist() == [0]
    plain = make_trainer(image_objective="awm", **{**settings, "cfg_text_scale": 1.0})
    plain.train()
    assert not torch.allclose(plain.recorder.updates[0].images.clean_latents, update.images.clean_latents, atol=1e-2)


def test_guidance_free_training_evaluates_and_packs_one_branch(make_trainer: MakeTrainer) -> None:
    def work(**settings: Any) -> tuple[int, int, list[int]]:
        """Rows of denoising, packed latent tokens, and rows of denoising in an evaluation."""
        trainer = make_trainer(model="bagel-shapes", cfg_interval=[0.0, 1.0], think=False, **settings)
        rows = []
        predict = trainer.model.predict_velocity

        def counting(cache: Any, latents: torch.Tensor, *args: Any) -> torch.Tensor:
            rows.append(len(latents))
            return predict(cache, latents, *args)

        trainer.model.predict_velocity = counting
        trainer.train()
        in_training = sum(rows)
        rows.clear()
        trainer.evaluate()
        (update,) = trainer.recorder.updates
        layout = trainer.model.pack(update.trajectories, trainer.args.objective_guidance).velocities
        return in_training, int(layout.mask.sum()), rows

    guided, free = work(cfg_text_scale=4.0), work(cfg_text_scale=1.0, eval_cfg_text_scale=4.0)
    num_steps, num_samples, num_tokens, window = 5, 4, 36, 3
    assert free[0] == num_steps * num_samples == guided[0] // 2
    assert free[1] == window * num_samples * num_tokens == guided[1] // 2
    # An evaluation may be guided all the same.
    assert free[2] == guided[2] and free[2]
