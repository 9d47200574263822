# SPDX-License-Identifier: Apache-2.0

"""Trained steps split over several packed forwards: the same scores, the same gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import TrainerCallback

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models import work
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.rollout import TASKS
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trainer.scoring.steps_per_forward import resolve_steps_per_forward
from alphagrpo_ext.trainer.scoring.windows import join_window_steps, split_window_steps
from alphagrpo_ext.trajectory import TextSegment, Trajectory


MakeTrainer = Callable[..., AlphaGRPOTrainer]
# Plain gradient descent, as Adam's first step turns rounding of gradients near 0 into whole steps.
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0}


def history(trainer: AlphaGRPOTrainer, metric: str) -> list[float]:
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


def count_parts(trainer: AlphaGRPOTrainer) -> list[tuple[int, int]]:
    """Sampled texts and trained steps of every packed forward from now on."""
    counts = []
    score = trainer.scorer.score

    def counting(model: torch.nn.Module, trajectories: list[Trajectory], *contexts: Any) -> PackedScores:
        image = trajectories[0].sampled_images[-1]
        counts.append((sum(len(t.sampled_texts) for t in trajectories), image.window.num_steps))
        return score(model, trajectories, *contexts)

    trainer.scorer.score = counting
    return counts


class Gradients(TrainerCallback):
    """Keeps the gradient of the first optimizer step: that step itself is rounded to the weights."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.kept[name] = parameter.grad.clone()


def gradients(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()
    return callback.kept


SETTINGS = [
    pytest.param({}, id="guidance in a part of the window"),
    pytest.param({"cfg_interval": [0.0, 1.0], "cfg_renorm_type": "channel"}, id="guidance everywhere"),
    pytest.param({"cfg_text_scale": 1.0, "text_loss_weight": 0.3, "image_loss_weight": 2.0}, id="weights"),
    pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, id="accumulation"),
    pytest.param({"image_beta": 0.1, "beta": 0.1, "lora": True}, id="reference"),
    pytest.param({"think": False}, id="no text"),
    pytest.param({"image_objective": "grpo_guard"}, id="GRPO-Guard"),
    pytest.param(
        {"image_objective": "diffusion_nft", "image_beta": 0.1, "image_kl_type": "velocity"}, id="DiffusionNFT"
    ),
    pytest.param({"gradient_checkpointing": True}, id="gradient checkpointing"),
    pytest.param(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant"
    ),
    pytest.param({"context_gradient": "detached"}, id="detached context"),
    pytest.param({"task": "self_reflection", "cfg_img_scale": 2.0, "num_reflection_rounds": 2}, id="two rounds"),
]


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS[::2], *(pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in SETTINGS[1::2])],
)
def test_gradient_is_that_of_one_forward(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    assert_gradient_is_that_of_one_forward(make_trainer, settings, 2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradient_of_single_steps_is_that_of_one_forward(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    assert_gradient_is_that_of_one_forward(make_trainer, settings, 1)


def assert_gradient_is_that_of_one_forward(
    make_trainer: MakeTrainer, settings: dict[str, Any], steps_per_forward: int
) -> None:
    """Of the three trained steps, two steps per forward leave one for the last."""
    whole = make_trainer(**PLAIN, **settings)
    parts = make_trainer(**PLAIN, **settings, image_steps_per_forward=steps_per_forward)
    counts = count_parts(parts)
    expected, actual = gradients(whole), gradients(parts)
    largest = max(gradient.norm().item() for gradient in expected.values())
    assert largest > 0
    assert actual.keys() == expected.keys()
    assert {count for _, count in counts} == ({1} if steps_per_forward == 1 else {1, 2})
    num_forwards = -(-3 // steps_per_forward)
    assert len(counts) % num_forwards == 0
    if parts.args.think:
        # Text is scored in one forward of each batch.
        assert sum(texts > 0 for texts, _ in counts) == len(counts) // num_forwards
    for name, gradient in expected.items():
        # One that is nothing but rounding, as that of the keys' biases, is measured by the largest.
        scale = max(gradient.norm().item(), 1e-3 * largest)
        assert (actual[name] - gradient).norm().item() <= 1e-5 * scale, name
    for metric in ("loss", "image/loss", "image/ratio_mean", "image/log_prob", "image/kl", "kl", "grad_norm"):
        assert history(parts, metric) == pytest.approx(history(whole, metric), rel=1e-4, abs=1e-6), metric
    # Contexts are run once.
    for metric in ("work/training_tokens", "work/scoring_tokens"):
        assert history(parts, metric) == history(whole, metric), metric


@pytest.mark.parametrize("reason", ["family", "sharding"])
def test_contexts_are_run_with_every_part_where_they_cannot_be_shared(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    whole, parts = make_trainer(**PLAIN), make_trainer(**PLAIN, image_steps_per_forward=1)
    expected = gradients(whole)
    if reason == "family":
        monkeypatch.setattr(BagelModel, "pack_parts", UnifiedModel.pack_parts)
    else:
        parts.scorer.runs_all_parts = True
    actual = gradients(parts)
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = [(actual[name] - gradient).norm() for name, gradient in expected.items()]
    assert torch.stack(errors).norm() <= 1e-5 * size
    assert history(parts, "work/training_tokens")[0] > history(whole, "work/training_tokens")[0]


def test_second_update_compares_each_step_with_its_own_old_velocity(make_trainer: MakeTrainer) -> None:
    settings = {"max_steps": 2, "num_iterations": 2, **PLAIN, "learning_rate": 1e-2}
    whole, parts = make_trainer(**settings), make_trainer(**settings, image_steps_per_forward=1)
    whole.train()
    parts.train()
    ratios = history(whole, "image/ratio_mean")
    assert abs(ratios[1] - 1) > 1e-4
    for metric in ("image/ratio_mean", "image/clip_ratio", "image/log_prob"):
        assert history(parts, metric) == pytest.approx(history(whole, metric), rel=1e-5)
    for (name, expected), actual in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_join_to_the_whole(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    (update,) = trainer.recorder.updates
    model, guidance = trainer.model.eval(), trainer.args.guidance

    def scores(trajectories: list[Trajectory]) -> ImageScores:
        batch = model.pack(trajectories, guidance)
        with torch.no_grad():
            return ImageScores.from_packed(trajectories, batch, model(**batch.inputs))

    whole = scores(update.trajectories)
    joined = join_window_steps([scores(part) for part in split_window_steps(update.trajectories, 2)])
    for name, expected in vars(whole).items():
        torch.testing.assert_close(getattr(joined, name), expected, rtol=0, atol=1e-5, msg=name)


def test_context_of_a_later_part_is_that_of_the_first(make_trainer: MakeTrainer) -> None:
    """What is no action any more stands in its place, without its end token, which is a delimiter then."""
    trainer = make_trainer()
    trainer.train()
    (update,) = trainer.recorder.updates
    first, second = split_window_steps(update.trajectories, 2)
    guidance = GuidanceConfig(text_scale=1.0)
    batches = [trainer.model.pack(part, guidance) for part in (first, second)]
    assert len(batches[1].score_column) == 0 < len(batches[0].score_column)
    for before, after in zip(first, second, strict=True):
        assert [t.content_ids for t in before.sampled_texts] == [
            s.token_ids for s in after.segments[len(after.segments) - 1 - len(before.sampled_texts) : -1]
        ]
        old, new = before.sampled_images[0].window, after.sampled_images[0].window
        assert torch.equal(old.latents[-1], new.latents[0])
        assert (old.num_steps, new.num_steps, new.start) == (2, 1, old.start + 2)


def test_default_splits_by_the_size_of_a_forward(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four trajectories of 36 tokens in two branches are 288 tokens per step, of which there are three.
    assert make_trainer().scorer.steps_per_forward is None
    monkeypatch.setattr(work, "MIN_FORWARD_WORK", 0)
    monkeypatch.setattr(work, "MIN_FORWARD_TOKENS_FP32", 432)
    automatic, explicit = make_trainer(**PLAIN, beta=0.1), make_trainer(**PLAIN, beta=0.1, image_steps_per_forward=2)
    counts = [count_parts(trainer) for trainer in (automatic, explicit)]
    actual = gradients(automatic)
    for name, gradient in gradients(explicit).items():
        assert torch.equal(actual[name], gradient), name
    assert counts[0] == counts[1]
    # The policy before training is scored in as large forwards as the update.
    assert [steps for _, steps in counts[0]] == [2, 1, 1, 2]


def test_adapters_have_forwards_of_their_own_size_in_bf16(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MIN_FORWARD_WORK", 0)
    monkeypatch.setattr(work, "MIN_FORWARD_TOKENS", 865)
    monkeypatch.setattr(work, "MIN_FORWARD_TOKENS_ADAPTERS", 432)
    args, model = make_trainer().args.copy(), make_shapes_bagel()
    args.bf16 = True
    tasks = {"reasoning_t2i": TASKS.get("reasoning_t2i")(think=True)}
    # All three steps of 288 tokens each are still too few.
    assert resolve_steps_per_forward(args, model, tasks, can_split=True) is None
    adapter = LoraConfig(r=4, target_modules=model.family.lora_target_modules("both"))
    model.requires_grad_(False)
    inject_adapter_in_model(adapter, model)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert resolve_steps_per_forward(args, model, tasks, can_split=True) == 2


def test_automatic_number_is_that_of_the_configuration(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the task with the most tokens, whatever a batch holds: processes with sharded weights run as many forwards."""
    monkeypatch.setattr(work, "MIN_FORWARD_WORK", 0)
    monkeypatch.setattr(work, "MIN_FORWARD_TOKENS_FP32", 432)
    trainer, model = make_trainer(), make_shapes_bagel()

    def steps(names: str, can_split: bool = True, **changes: Any) -> int | None:
        tasks = {name: TASKS.get(name)(think=True, num_reflection_rounds=2) for name in names.split()}
        args = trainer.args.copy()
        for name, value in changes.items():
            setattr(args, name, value)
        return resolve_steps_per_forward(args, model, tasks, can_split)

    assert steps("reasoning_t2i") == 2
    assert steps("reasoning_t2i", cfg_text_scale=1.0) is None
    assert steps("reasoning_t2i", cfg_text_scale=1.0, per_device_train_batch_size=8) == 2
    # Two images of a trajectory, in three branches.
    assert steps("self_reflection") == steps("self_reflection reasoning_t2i") == 1
    assert steps("visual_question_answering", image_height=1000) is None
    assert steps("reasoning_t2i", can_split=False) is steps("reasoning_t2i", image_steps_per_forward="all") is None
    assert steps("reasoning_t2i", can_split=False, image_steps_per_forward=2) == 2
    trainer.train()
    (update,) = trainer.recorder.updates
    segments = [[s for s in t.segments if isinstance(s, TextSegment)] for t in update.trajectories]
    without = [replace(t, segments=own) for t, own in zip(update.trajectories, segments, strict=True)]
    assert len(trainer.scorer.split(trainer.scorer.complete(model, without))) == 2
    monkeypatch.setattr(BagelModel, "pack_parts", UnifiedModel.pack_parts)
    assert steps("reasoning_t2i") is None
