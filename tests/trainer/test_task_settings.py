# SPDX-License-Identifier: Apache-2.0

"""Runs of several tasks, each with its own guidance, schedule, image size and sampling of texts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.objectives.regularizers import score_transitions
from alphagrpo_ext.rollout.generator import RolloutConfig, RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.task import TASKS
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from support.trainers import Update


PICTURE = render(Scene((SceneObject(0, 0, "circle", "red"),), "white"))
FEATURES = Features({"prompt": Value("string"), "task": Value("string"), "image": Image()})
ROWS = [
    {"prompt": "a red circle on a white background", "task": "reasoning_t2i", "image": None},
    {"prompt": "a blue square on a gray background", "task": "self_reflection", "image": None},
    {"prompt": "a green cross on a white background", "task": "image_editing", "image": PICTURE},
    {"prompt": "two yellow triangles , on black", "task": None, "image": None},
]
DIFFERENT: dict[str, dict[str, Any]] = {
    "reasoning_t2i": {"cfg_text_scale": 2.5, "timestep_shift": 2.0, "temperature": 0.8, "max_completion_length": 7},
    "image_editing": {"cfg_interval": [0.0, 0.7], "num_timesteps": 8, "temperature": 1.3, "top_p": 1.0},
    "self_reflection": {"cfg_renorm_type": "channel", "refine_strength": 0.8},
}
SIZES = {"reasoning_t2i": {"image_width": 16}, "image_editing": {"image_height": 16, "image_width": 16}}


@pytest.fixture
def make(make_trainer: Callable[..., AlphaGRPOTrainer]) -> Callable[..., AlphaGRPOTrainer]:
    def make(**settings: Any) -> AlphaGRPOTrainer:
        defaults = {
            "task": "self_reflection",
            "learning_rate": 0.0,
            "cfg_interval": None,
            "num_generations": 2,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_reflection_rounds": 2,
            "datasets": {"train_dataset": Dataset.from_list(ROWS, features=FEATURES)},
        }
        return make_trainer(**(defaults | settings))

    return make


def assert_on_policy(trainer: AlphaGRPOTrainer, update: Update) -> None:
    """The packed forward gives the log-probabilities that the rollout recorded."""
    scores = update.images
    replayed = score_transitions(scores, scores.velocities, trainer.args.objective).log_prob
    images = [image for trajectory in update.trajectories for image in trajectory.sampled_images]
    recorded = torch.stack([image.window.log_probs for image in images])
    torch.testing.assert_close(replayed, recorded, atol=1e-5, rtol=0)
    for i, trajectory in enumerate(update.trajectories):
        expected = torch.tensor([p for text in trajectory.sampled_texts for p in text.log_probs])
        torch.testing.assert_close(update.log_probs[i, : len(expected)], expected, atol=1e-4, rtol=0)


def merged(*settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for part in settings for k, v in part.get(name, {}).items()} for name in DIFFERENT}


@pytest.mark.invariant
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="what tasks declare"),
        pytest.param({"task_settings": DIFFERENT}, id="all settings but sizes"),
        pytest.param({"task_settings": merged(DIFFERENT, SIZES)}, id="sizes"),
        pytest.param({"task_settings": DIFFERENT, "lora": True}, id="lora"),
        pytest.param({"task_settings": DIFFERENT, "task": "reasoning_t2i", "rollout_batch_size": 4}, id="other main"),
    ],
)
def test_mixed_run_replays_each_row_as_it_was_sampled(
    make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any]
) -> None:
    trainer = make(**settings)
    trainer.train()
    (update,) = trainer.recorder.updates
    tasks = {name: trainer.args.for_task(name) for name in DIFFERENT}
    assert {t.task for t in update.trajectories} == tasks.keys()
    assert len({str(own.objective_guidance) for own in tasks.values()}) > 1
    assert_on_policy(trainer, update)
    entry = trainer.state.log_history[0]
    assert entry["image/ratio_mean"] == 1.0
    assert entry["clip_ratio/region_mean"] == 0.0
    for trajectory in update.trajectories:
        config = tasks[trajectory.task].train_rollout(0)
        for image in trajectory.sampled_images:
            assert image.image.size == config.size[::-1]
            start, denoising = image.window.start, config.denoising
            schedule = flow_timesteps(denoising.num_timesteps, denoising.timestep_shift)
            assert torch.equal(image.window.timesteps, schedule[start : start + 4])
        assert all(len(text.token_ids) <= config.max_new_tokens for text in trajectory.sampled_texts)


def test_replay_with_the_guidance_of_the_run_would_be_another_policy(make: Callable[..., AlphaGRPOTrainer]) -> None:
    """The check above sees what it is for."""
    trainer = make()
    trainer.scorer.args = trainer.args.copy()
    trainer.scorer.args.for_task = lambda name: trainer.args
    trainer.train()
    with pytest.raises(AssertionError):
        assert_on_policy(trainer, trainer.recorder.updates[0])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_iterations": 2, "max_steps": 2}, id="old policy"),
        pytest.param({"image_beta": 0.1, "beta": 0.1}, id="reference"),
        pytest.param({"image_steps_per_forward": 1, "num_iterations": 2, "max_steps": 2}, id="parts"),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 2, "max_steps": 2},
            id="micro-batches of mixed rows",
        ),
        pytest.param({"image_objective": "awm"}, id="forward process"),
        pytest.param({"image_objective": "diffusion_nft", "num_iterations": 2, "max_steps": 2}, id="implicit policy"),
    ],
)
def test_images_of_several_sizes_are_compared_with_another_policy(
    make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any]
) -> None:
    trainer = make(task_settings=merged(DIFFERENT, SIZES), **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "image/loss" in entry]
    assert len(entries) == trainer.args.max_steps
    for entry in entries:
        assert all(np.isfinite(value) for value in entry.values() if isinstance(value, float))
        # Nothing is learned, so every policy is the one that sampled.
        assert entry.get("image/ratio_mean", 1.0) == pytest.approx(1.0, abs=1e-6)
        assert entry.get("image/kl", 0.0) == pytest.approx(0.0, abs=1e-6)
        assert entry.get("image/velocity_deviation", 0.0) == pytest.approx(0.0, abs=1e-6)


def paint_alone(trainer: AlphaGRPOTrainer, config: RolloutConfig, seed: int | str) -> np.ndarray:
    """The first image of prompt 1, painted as text-to-image."""
    task = TASKS.get("reasoning_t2i")(think=False)
    generate = RolloutGenerator(trainer.model.eval(), trainer.processing_class, task)
    (trajectory,) = generate([{"prompt": ROWS[1]["prompt"]}], [sample_generator(seed, 0, 0)], config)
    return np.asarray(trajectory.final_image).astype(int)


RELEASED = {
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 2.0,
    "cfg_interval": [0.0, 1.0],
    "cfg_renorm_type": "text_channel",
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="declared"),
        pytest.param(RELEASED, id="given for the run"),
        pytest.param(
            {**RELEASED, "task_settings": {"reasoning_t2i": {"timestep_shift": 3.0}}}, id="given for the task"
        ),
    ],
)
def test_initial_images_are_painted_as_text_to_image(
    make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any]
) -> None:
    rows = Dataset.from_list(ROWS[1:2] * 4, features=FEATURES)
    trainer = make(
        datasets={"train_dataset": rows, "eval_dataset": rows},
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        **settings,
    )
    trainer.train()
    (update,) = trainer.recorder.updates
    initial = np.asarray(update.trajectories[0].segments[1].image).astype(int)
    own = trainer.args.for_task("reasoning_t2i")
    config = own.train_rollout(0).deterministic()
    assert config.denoising.guidance.interval == (0.4, 1.0)
    assert config.denoising.guidance.renorm_type == "global"
    seed = f"initial-{trainer.args.seed}"
    # Another batch may round a pixel the other way.
    assert np.abs(initial - paint_alone(trainer, config, seed)).max() <= 1
    refining = replace(config, denoising=replace(config.denoising, guidance=trainer.args.guidance))
    assert np.abs(initial - paint_alone(trainer, refining, seed)).max() > 1

    seen = []
    trainer.reward_funcs[0] = lambda images, **kwargs: seen.append(images) or [0.0] * len(images)
    trainer.evaluate()
    expected = paint_alone(trainer, own.eval_rollout(), f"initial-eval-{trainer.args.seed}")
    assert np.abs(np.asarray(seen[0][0]).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_settings": {"image_editing": {"image_width": 26}}}, "task 'image_editing': width=26 is no positive"),
        (
            {"task_settings": {"reasoning_t2i": {"image_height": 80}}},
            "task 'reasoning_t2i': .*is too large",
        ),
        (
            {"task_settings": {"image_editing": {"max_completion_length": 2000}}},
            "row 2 of task 'image_editing' can take .*max_completion_length \\(2000\\)",
        ),
    ],
)
def test_what_the_model_cannot_do_for_a_task_is_refused(
    make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_every_size_of_images_is_shown_to_the_reward_functions(make: Callable[..., AlphaGRPOTrainer]) -> None:
    sizes = []

    class Reward:
        __name__ = "reward"

        def validate_image_size(self, height: int, width: int) -> None:
            sizes.append((height, width))

        def __call__(self, images: list, **kwargs: Any) -> list[float]:
            return [0.0] * len(images)

    make(reward_funcs=Reward(), task_settings=SIZES)
    assert sorted(sizes) == [(16, 16), (24, 16), (24, 24)]


def test_settings_of_a_task_without_rows_are_said_to_have_no_effect(
    make: Callable[..., AlphaGRPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_list(ROWS[1:2] * 4, features=FEATURES)
    make(datasets={"train_dataset": rows}, task_settings=DIFFERENT)
    (record,) = [record for record in caplog.records if "task_settings" in record.message]
    assert record.message.startswith("task_settings of 'image_editing' have no effect")
