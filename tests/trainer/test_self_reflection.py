# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import TrainerCallback

from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.rewards import group_advantages
from support.trainers import brightness


PICTURE = render(Scene((SceneObject(0, 0, "circle", "red"),), "white"))
FEATURES = Features({"prompt": Value("string"), "task": Value("string"), "image": Image()})


def rows(*items: tuple[str, str | None, PILImage.Image | None]) -> dict[str, Dataset]:
    """Datasets of (prompt, task, image)."""
    columns = [dict(zip(("prompt", "task", "image"), item, strict=True)) for item in items]
    return {"train_dataset": Dataset.from_list(columns, features=FEATURES)}


def shortness(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward of the text alone."""
    return [1 / (1 + len(completion)) for completion in completions]


shortness.text_only = True


@pytest.fixture
def make(make_trainer: Callable[..., AlphaGRPOTrainer]) -> Callable[..., AlphaGRPOTrainer]:
    def make(**settings: Any) -> AlphaGRPOTrainer:
        return make_trainer(**({"task": "self_reflection", "learning_rate": 0.0} | settings))

    return make


@pytest.mark.invariant
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_reflection_rounds": 2},
        {"cfg_img_scale": 2.0, "cfg_renorm_type": "text_channel", "cfg_interval": [0.0, 1.0]},
        {"lora": True},
        {"num_iterations": 2, "max_steps": 2, "num_reflection_rounds": 2},
        {"refine_strength": 0.8, "num_reflection_rounds": 2},
        {"refine_strength": 0.8, "branches_per_thought": 2, "ode_solver": "ab2", "ode_steps": 2},
    ],
    ids=["one round", "two rounds", "image guidance", "lora", "off-policy", "from a copy", "branches from a copy"],
)
def test_ratio_is_one(make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any]) -> None:
    trainer = make(**settings)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry["image/ratio_mean"] == 1.0
        assert entry["clip_ratio/region_mean"] == 0.0


def test_group_refines_one_image_of_the_policy(make: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make(num_initial_images=3)
    trainer.train()
    (update,) = trainer.recorder.updates
    images = [trajectory.segments[1].image for trajectory in update.trajectories]
    assert len({image.tobytes() for image in images}) == 1
    (entry, _) = trainer.state.log_history
    assert entry["reflection/initial_reward"] == pytest.approx(brightness(images[:1])[0], abs=1e-5)
    finals = brightness([trajectory.final_image for trajectory in update.trajectories])
    assert entry["reflection/final_reward"] == pytest.approx(sum(finals) / 4, abs=1e-5)
    assert entry["reflection/improved_frac"] + entry["reflection/rectified_frac"] == 1.0


def test_lowest_of_the_initial_images_is_refined(make: Callable[..., AlphaGRPOTrainer]) -> None:
    seen = []

    def recording(images: list[PILImage.Image], **kwargs: Any) -> list[float]:
        seen.append(brightness(images))
        return seen[-1]

    trainer = make(reward_funcs=recording, num_initial_images=4)
    trainer.train()
    initial, _ = seen
    assert len(set(initial)) == 4
    assert trainer.state.log_history[0]["reflection/initial_reward"] == pytest.approx(min(initial), abs=1e-5)


def test_logs_are_about_the_images_that_get_a_gradient(make: Callable[..., AlphaGRPOTrainer]) -> None:
    """What reward functions log while they score initial images is dropped."""
    columns = []

    def recording(
        images: list[PILImage.Image], trajectory: list, log_metric: Callable, log_extra: Callable, **kwargs: Any
    ) -> list[float]:
        stage = 1.0 if trajectory[0] is None else 2.0
        log_metric("stage", stage)
        log_extra("stage", [stage] * len(images))
        log_extra(f"only in stage {stage}", [stage] * len(images))
        return brightness(images)

    class Columns(TrainerCallback):
        def on_rollout(self, *args: Any, rollout: Any, **kwargs: Any) -> None:
            columns.append(rollout.extra_columns)

    trainer = make(reward_funcs=recording, arguments={"callbacks": [Columns()]})
    trainer.train()
    assert trainer.state.log_history[0]["stage"] == 2.0
    assert columns == [{"stage": [2.0] * 4, "only in stage 2.0": [2.0] * 4}]


def test_asynchronous_and_failing_functions_score_initial_images(make: Callable[..., AlphaGRPOTrainer]) -> None:
    async def later(images: list[PILImage.Image], **kwargs: Any) -> list[float]:
        return brightness(images)

    def silent(images: list[PILImage.Image], **kwargs: Any) -> list[None]:
        return [None] * len(images)

    trainer = make(reward_funcs=[later, silent])
    trainer.train()
    (update,) = trainer.recorder.updates
    expected = brightness([update.trajectories[0].segments[1].image])[0]
    assert trainer.state.log_history[0]["reflection/initial_reward"] == pytest.approx(expected, abs=1e-5)


def test_image_of_a_row_is_the_one_to_refine(make: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make(datasets=rows(*[("a red circle on a white background", None, PICTURE)] * 4))
    trainer.train()
    (update,) = trainer.recorder.updates
    assert all(t.segments[1].image.tobytes() == PICTURE.tobytes() for t in update.trajectories)
    assert trainer.state.log_history[0]["reflection/initial_reward"] == pytest.approx(
        brightness([PICTURE])[0], abs=1e-5
    )


@pytest.mark.parametrize("rectification", ["minimum", "off"])
def test_nothing_improved_means_no_gradient(make: Callable[..., AlphaGRPOTrainer], rectification: str) -> None:
    white = PILImage.new("RGB", (24, 24), "white")
    trainer = make(
        datasets=rows(*[("a red circle on a white background", None, white)] * 4), rectification=rectification
    )
    trainer.train()
    (update,) = trainer.recorder.updates
    advantages = update.inputs["advantages"]
    entry = trainer.state.log_history[0]
    assert entry["reflection/improved_frac"] == 0.0
    assert entry["reflection/rectified_frac"] == (1.0 if rectification == "minimum" else 0.0)
    assert bool((advantages.abs() < 1e-6).all()) == (rectification == "minimum")


@pytest.mark.parametrize("scale_rewards", ["batch", "group", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_are_trls(make: Callable[..., AlphaGRPOTrainer], scale_rewards: str, aggregation: str) -> None:
    """What `group_advantages` computes for some reward functions equals what TRL computes for all of them."""
    trainer = make(
        reward_funcs=[brightness, lambda images, **kwargs: [len(set(image.tobytes())) / 255 for image in images]],
        scale_rewards=scale_rewards,
        multi_objective_aggregation=aggregation,
        per_device_train_batch_size=8,
    )
    outputs, rewards = [], []
    generate, judge = trainer._generate_and_score_completions, trainer._calculate_rewards
    trainer._generate_and_score_completions = lambda inputs: outputs.append(generate(inputs)) or outputs[-1]
    trainer._calculate_rewards = lambda *args: rewards.append(judge(*args)) or rewards[-1]
    trainer.train()
    weights = trainer.reward_weights
    expected = group_advantages(rewards[0], weights, 4, scale_rewards, aggregation)
    # TRL computes in fp32.
    torch.testing.assert_close(outputs[0]["advantages"], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("separate", [True, False])
def test_rewards_of_text_do_not_reach_images(make: Callable[..., AlphaGRPOTrainer], separate: bool) -> None:
    trainer = make(reward_funcs=[brightness, shortness], separate_advantages=separate, task="reasoning_t2i")
    trainer.train()
    (update,) = trainer.recorder.updates
    text, image = update.inputs["advantages"], update.inputs["image_advantages"]
    assert torch.equal(text, image) != separate
    if separate:
        finals = torch.tensor(brightness([t.final_image for t in update.trajectories]))
        assert torch.equal(image.argsort(), finals.argsort())


def test_reward_functions_see_every_turn(make: Callable[..., AlphaGRPOTrainer]) -> None:
    seen = []

    def recording(texts: list[list[str]], trajectory: list, images: list, **kwargs: Any) -> list[float]:
        seen.append(texts)
        return brightness(images)

    make(reward_funcs=recording, num_reflection_rounds=2).train()
    initial, final = seen
    assert initial == [[]]
    assert [len(written) for written in final] == [2] * 4


def test_broken_format_masks_the_image(make: Callable[..., AlphaGRPOTrainer]) -> None:
    def half(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    half.text_only = True
    trainer = make(reward_funcs=[brightness, half], mask_broken_format=True, task="reasoning_t2i")
    trainer.train()
    image = trainer.recorder.updates[0].inputs["image_advantages"]
    assert (image == 0).sum() == 2


def test_tasks_mix_in_one_batch(make: Callable[..., AlphaGRPOTrainer]) -> None:
    items = [
        ("a red circle on a white background", "reasoning_t2i", None),
        ("a blue square on a gray background", "self_reflection", None),
        ("a green cross on a white background", "image_editing", PICTURE),
        ("two yellow triangles , on black", None, None),
    ]
    trainer = make(
        datasets=rows(*items), task="reasoning_t2i", per_device_train_batch_size=16, num_reflection_rounds=2
    )
    trainer.train()
    (update,) = trainer.recorder.updates
    assert sorted(len(t.sampled_images) for t in update.trajectories) == [1] * 12 + [2] * 4
    entry = trainer.state.log_history[0]
    assert entry["image/ratio_mean"] == 1.0
    for name in ("reasoning_t2i", "self_reflection", "image_editing"):
        assert 0 <= entry[f"rewards/{name}"] <= 1


def test_every_parameter_changes(make: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make(learning_rate=1e-3, freeze_vision_tower=False)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    unchanged = [n for n, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not unchanged


def test_evaluation_refines_too(make: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make(
        datasets={"train_dataset": build_dataset("train", 8, 0), "eval_dataset": build_dataset("train", 4, 0)}
    )
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_reflection/initial_reward"] <= 1


@pytest.mark.parametrize(
    ("items", "settings", "message"),
    [
        ([("a cross", "image_editing", None)], {}, "row 0 of task 'image_editing' has no 'image'"),
        (
            [("a cross", "image_editing", PICTURE), ("a cross", "image_editing", None)],
            {},
            "row 1 of task 'image_editing' has no 'image'",
        ),
        ([("a cross", "self_reflektion", None)], {}, "row 0, column 'task': .*Did you mean 'self_reflection'"),
        ([("a cross", None, None)], {"num_reflection_rounds": 40}, "lower num_reflection_rounds \\(40\\)"),
    ],
)
def test_bad_rows_raise_before_training(
    make: Callable[..., AlphaGRPOTrainer], items: list, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(datasets=rows(*items), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_reflection_rounds": 0}, "num_reflection_rounds must be at least 1, but is 0"),
        ({"num_initial_images": 0}, "num_initial_images must be at least 1, but is 0"),
        ({"rectification": "max"}, "rectification must be one of minimum, initial, off, but is 'max'"),
        ({"stage1_selection": "best"}, "stage1_selection must be one of lowest, sampled, but is 'best'"),
    ],
)
def test_bad_settings_raise(make: Callable[..., AlphaGRPOTrainer], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
