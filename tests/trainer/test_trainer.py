# SPDX-License-Identifier: Apache-2.0

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig

from alphagrpo_ext.flow.transitions import transition
from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel
from alphagrpo_ext.models.loading import load_model, load_processor
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer import reference as reference_module
from alphagrpo_ext.trainer.reference import add_scores
from alphagrpo_ext.trainer.step import RolloutStep
from reward_models.dvreward import DVReward
from support.trainers import brightness


MakeTrainer = Callable[..., AlphaGRPOTrainer]


def transition_log_probs(trainer: AlphaGRPOTrainer, scores: ImageScores) -> torch.Tensor:
    args = trainer.args
    return transition(
        args.sde_type,
        scores.latents,
        scores.velocities,
        scores.t,
        scores.t_next,
        args.noise_level,
        next_latents=scores.next_latents,
        mask=scores.mask,
    ).log_prob


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def history(trainer: AlphaGRPOTrainer, metric: str) -> list[float]:
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


@pytest.mark.invariant
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="batch of 4"),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, id="batches of 1"),
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, id="batches of 2"),
        pytest.param({"cfg_text_scale": 1.0}, id="no guidance"),
        pytest.param({"cfg_interval": [0.0, 1.0], "cfg_renorm_type": "channel"}, id="guidance everywhere"),
        pytest.param({"lora": True}, id="LoRA"),
        pytest.param({"think": False}, id="no thought"),
        pytest.param({"sde_type": "flow_cps"}, id="Flow-CPS"),
        pytest.param({"temperature": 0.7, "importance_sampling_level": "token"}, id="temperature"),
        pytest.param({"rollout_batch_size": 1, "num_generations": 2}, id="rollouts in parts"),
    ],
)
def test_first_update_is_on_policy(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    """Every ratio is exactly 1, and the packed forward scores what the cached rollout did as the rollout did."""
    trainer = make_trainer(**settings)
    trainer.train()
    assert history(trainer, "image/ratio_mean") == [1.0]
    assert history(trainer, "image/clip_ratio") == [0.0]
    assert history(trainer, "clip_ratio/region_mean") == [0.0]
    updates = trainer.recorder.updates
    assert len(updates) == trainer.args.gradient_accumulation_steps
    for update in updates:
        assert "old_per_token_logps" not in update.inputs
        assert "old_velocities" not in update.inputs
        image_log_probs = transition_log_probs(trainer, update.images)
        for i, trajectory in enumerate(update.trajectories):
            expected = [p for text in trajectory.sampled_texts for p in text.log_probs]
            assert len(expected) > 0 or not trainer.args.think
            assert update.log_probs[i, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
            assert not update.log_probs[i, len(expected) :].any()
            (image,) = trajectory.sampled_images
            torch.testing.assert_close(image_log_probs[i], image.window.log_probs, atol=1e-5, rtol=0)


def test_what_trl_sees_is_what_was_sampled(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    (update,) = trainer.recorder.updates
    mask = update.inputs["completion_mask"] * update.inputs["tool_mask"]
    for i, trajectory in enumerate(update.trajectories):
        (text,) = trajectory.sampled_texts
        assert update.inputs["completion_ids"][i][mask[i].bool()].tolist() == text.token_ids


def test_without_thought_text_has_no_loss(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(think=False)
    trainer.train()
    (update,) = trainer.recorder.updates
    assert not (update.inputs["completion_mask"] * update.inputs["tool_mask"]).any()
    assert history(trainer, "image/loss") == pytest.approx(history(trainer, "loss"), abs=1e-6)


def test_group_shares_one_window_that_varies_between_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(sde_window_size=1, sde_window_range=[0, 5], max_steps=4)
    trainer.train()
    starts = []
    for update in trainer.recorder.updates:
        (start,) = {image.window.start for t in update.trajectories for image in t.sampled_images}
        starts.append(start)
    assert starts == [trainer.args.train_rollout(step).denoising.window_start for step in range(4)]
    assert len(set(starts)) > 1


def test_rollouts_of_one_optimizer_step_differ(make_trainer: MakeTrainer) -> None:
    """With fewer steps a generation than accumulation steps, several rollouts are made with the same weights."""
    trainer = make_trainer(gradient_accumulation_steps=2, steps_per_generation=1, think=False)
    trainer.train()
    first, second = (
        torch.stack([t.sampled_images[0].window.latents[0] for t in update.trajectories])
        for update in trainer.recorder.updates
    )
    # Paths that started from the same noise would still be near each other.
    distances = (first[:, None] - second[None]).square().mean(dim=(-2, -1))
    assert distances.min() > 0.5


def test_gradient_accumulation_equals_a_larger_batch(make_trainer: MakeTrainer) -> None:
    # The step of plain gradient descent is the gradient.
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    whole = make_trainer(**settings)
    before = weights(whole.model)
    whole.train()
    parts = make_trainer(**settings, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    for name, expected in weights(whole.model).items():
        step = expected - before[name]
        error = weights(parts.model)[name] - expected
        assert error.norm() <= 1e-3 * step.norm(), name


@pytest.mark.parametrize("lora", [False, True])
def test_joint_update_changes_every_trainable_parameter(make_trainer: MakeTrainer, lora: bool) -> None:
    trainer = make_trainer(lora=lora)
    before = weights(trainer.model)
    trainer.train()
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # An adapter's B starts at 0, so that A has no gradient yet.
    expected = {name for name in trainable if "lora_A" not in name}
    assert changed(before, trainer.model) == expected
    for name in before:
        frozen = ".vae." in f".{name}" or "vit_model" in name or "connector" in name or (lora and "lora_" not in name)
        assert (name not in trainable) == frozen
    if lora:
        assert all(f"layers.{i}.mlp_moe_gen" in " ".join(expected) for i in range(2))


def test_vision_tower_can_be_trained(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(freeze_vision_tower=False)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if not n.startswith("vae."))


@pytest.mark.parametrize("silent", ["text", "image"])
def test_loss_weights_choose_what_is_trained(make_trainer: MakeTrainer, silent: str) -> None:
    trainer = make_trainer(**{f"{silent}_loss_weight": 0.0})
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    generation = {n for n in before if "_moe_gen" in n or n.startswith(("llm2vae", "vae2llm", "time_embedder"))}
    head = "language_model.lm_head.weight"
    embedding = "language_model.model.embed_tokens.weight"
    if silent == "text":
        assert generation <= moved
        assert head not in moved
        # The prompt's representation is trained through the image.
        assert {embedding, "language_model.model.layers.0.self_attn.k_proj.weight"} <= moved
    else:
        assert not generation & moved
        assert {head, embedding, "language_model.model.layers.1.mlp.down_proj.weight"} <= moved


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_iterations": 2}, id="two iterations"),
        pytest.param({"steps_per_generation": 2, "num_generations": 4}, id="two steps a generation"),
    ],
)
def test_second_update_is_off_policy(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make_trainer(max_steps=2, **settings)
    trainer.train()
    first, second = trainer.recorder.updates
    ratios = history(trainer, "image/ratio_mean")
    assert ratios[0] == pytest.approx(1.0, abs=2e-6)
    assert abs(ratios[1] - 1) > 1e-5
    assert history(trainer, "image/clip_ratio")[0] == 0.0
    for i, trajectory in enumerate(second.trajectories):
        window = trajectory.sampled_images[0].window
        old = ImageScores(**{**vars(second.images), "velocities": torch.cat(second.inputs["old_velocities"])})
        # The old velocities are those of the policy that sampled, in the order that TRL's shuffle left.
        torch.testing.assert_close(transition_log_probs(trainer, old)[i], window.log_probs, atol=1e-5, rtol=0)
        (text,) = trajectory.sampled_texts
        old_log_probs = second.inputs["old_per_token_logps"][i, : len(text.log_probs)]
        assert old_log_probs.tolist() == pytest.approx(text.log_probs, abs=1e-4)
    log_ratio = transition_log_probs(trainer, second.images) - transition_log_probs(trainer, old)
    assert ratios[1] == pytest.approx(log_ratio.exp().mean().item(), abs=1e-6)


@pytest.mark.parametrize("kl_type", ["mean", "velocity"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_kl_to_the_base_model_of_an_adapter(make_trainer: MakeTrainer, beta: float, kl_type: str) -> None:
    trainer = make_trainer(lora=True, beta=beta, image_beta=0.1, image_kl_type=kl_type, max_steps=2)
    trainer.train()
    first, second = history(trainer, "image/kl")
    assert first < 1e-6 < second
    if beta:
        first, second = history(trainer, "kl")
        assert first < 1e-6 < second


def test_kl_to_a_reference_model(
    make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], BagelModel], shapes_processor: Any, tmp_path: Path
) -> None:
    make_shapes_bagel().save_pretrained(tmp_path / "base")
    shapes_processor.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), beta=0.1, image_beta=0.1, max_steps=2)
    trainer.train()
    for metric in ("image/kl", "kl"):
        first, second = history(trainer, metric)
        assert first < 1e-6 < second


def test_no_image_is_judged_no_weight_moves(make_trainer: MakeTrainer) -> None:
    def failing(images: list, **kwargs: Any) -> list[None]:
        return [None] * len(images)

    trainer = make_trainer(reward_funcs=failing)
    before = weights(trainer.model)
    trainer.train()
    assert history(trainer, "grad_norm") == [0.0]
    assert not changed(before, trainer.model)


def test_one_failed_judgement_has_no_advantage(make_trainer: MakeTrainer) -> None:
    failed = []

    def reward(images: list, trajectory: list, **kwargs: Any) -> list[float | None]:
        failed.append(trajectory[2])
        return [0.1, 0.2, None, 0.6]

    trainer = make_trainer(reward_funcs=reward)
    trainer.train()
    (update,) = trainer.recorder.updates
    for trajectory, advantage in zip(update.trajectories, update.inputs["advantages"].tolist(), strict=True):
        assert (advantage == 0) == (trajectory is failed[0])
    assert update.inputs["advantages"].sum().item() == pytest.approx(0, abs=1e-5)


def test_evaluation_repeats_itself(make_trainer: MakeTrainer) -> None:
    windows = []

    def reward(images: list, trajectory: list, **kwargs: Any) -> list[float]:
        windows.append([image.window for t in trajectory for image in t.sampled_images])
        return [float(image.resize((1, 1)).convert("L").getpixel((0, 0))) for image in images]

    trainer = make_trainer(
        reward_funcs=reward, eval_strategy="steps", eval_steps=1, eval_on_start=True, learning_rate=0.0, max_steps=2
    )
    trainer.train()
    # The weights stand still, so the noise of all evaluations is the same: they are paired.
    rewards = history(trainer, "eval_rewards/reward/mean")
    assert len(rewards) == 3
    assert len(set(rewards)) == 1
    evaluations = [w for w in windows if w[0] is None]
    assert len(windows) - len(evaluations) == 2
    assert all(window is None for w in evaluations for window in w)


def test_evaluation_uses_its_own_settings(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(eval_cfg_text_scale=1.0, eval_temperature=0.0, eval_num_timesteps=9)
    model = trainer.model
    num_rows, temperatures = [], []
    predict_velocity, sample_text = model.predict_velocity, model.sample_text

    def recording_predict(cache: Any, *args: Any) -> torch.Tensor:
        num_rows.append(cache.num_rows)
        return predict_velocity(cache, *args)

    def recording_sample(*args: Any, **kwargs: Any) -> Any:
        temperatures.append(kwargs["temperature"])
        return sample_text(*args, **kwargs)

    monkeypatch.setattr(model, "predict_velocity", recording_predict)
    monkeypatch.setattr(model, "sample_text", recording_sample)
    trainer.evaluate()
    num_batches = 2
    assert num_rows == [4] * 8 * num_batches
    assert temperatures == [0.0] * num_batches
    num_rows.clear(), temperatures.clear()
    trainer.train()
    # Steps at times 1, .8, .6, .4 and .2, guided above .5.
    assert num_rows == [8, 8, 8, 4, 4]
    assert temperatures == [1.0]


def test_metrics(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=DVReward("shapes"),
        lora=True,
        image_beta=0.1,
        eval_on_start=True,
        eval_strategy="steps",
        eval_num_timesteps=60,
    )
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "image/ratio_mean" in entry)
    expected = {
        "image/loss",
        "image/ratio_mean",
        "image/clip_ratio",
        "image/log_prob",
        "image/kl",
        "image/velocity_std",
        "rewards/dvreward/mean",
        "judge/failed_frac",
        "judge/latency_p50",
        "judge/latency_p99",
        "judge/questions_per_second",
        "dvreward/strict_pass",
        "timing/rollout",
        "timing/reward",
        "timing/update",
    }
    assert expected <= entry.keys()
    assert entry["image/velocity_std"] > 0
    assert entry["judge/failed_frac"] == 0
    # The evaluation before it, which takes longer than the step, is not in its times.
    parts = [entry[f"timing/{name}"] for name in ("rollout", "reward", "update")]
    assert all(seconds > 0 for seconds in parts)
    assert sum(parts) == pytest.approx(entry["step_time"], rel=0.2)


def test_gradient_checkpointing_changes_nothing(make_trainer: MakeTrainer) -> None:
    plain = make_trainer()
    plain.train()
    checkpointed = make_trainer(gradient_checkpointing=True)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert history(checkpointed, "grad_norm") == pytest.approx(history(plain, "grad_norm"), rel=1e-5)
    for trainer in (plain, checkpointed):
        trainer.actual = [t.sampled_texts[0].token_ids for t in trainer.recorder.updates[0].trajectories]
    assert sorted(checkpointed.actual) == sorted(plain.actual)


def test_saved_model_loads(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model, processor = load_model(tmp_path / "saved")
    assert processor.generation_system_prompt == trainer.processing_class.generation_system_prompt
    (update,) = trainer.recorder.updates
    batch = model.pack(update.trajectories, trainer.args.guidance)
    with torch.no_grad():
        expected, actual = trainer.model.eval()(**batch.inputs), model(**batch.inputs)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(actual.velocities, expected.velocities, atol=1e-6, rtol=0)


def test_packaged_model_trains_by_name(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(model="bagel-shapes", reward_funcs=DVReward("shapes"))
    trainer.train()
    assert history(trainer, "image/ratio_mean") == [1.0]


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "eval_dataset['second']"])
def test_row_without_question_is_found_before_training(make_trainer: MakeTrainer, name: str) -> None:
    rows = build_dataset("train", 8, seed=0)
    items = rows.to_list()
    items[5]["semantic_questions"] = [{"tag": "Count", "is_valid": True}]
    broken = Dataset.from_list(items)
    evaluated = {"eval_dataset": broken, "eval_dataset['second']": {"first": rows, "second": broken}}.get(name, rows)
    datasets = {"train_dataset": broken if name == "train_dataset" else rows, "eval_dataset": evaluated}
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*row 5.*question"):
        make_trainer(reward_funcs=DVReward("shapes"), datasets=datasets)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "image_beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"beta": 0.1, "lora": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"model": "bagel-shapes", "model_init_kwargs": {"attn_implementation": "eager"}, "beta": 0.1},
        {"eval_on_start": True, "eval_strategy": "steps"},
    ],
    ids=["reference model", "reference adapter", "model by name", "evaluation"],
)
def test_arguments_of_the_caller_stay_as_they_are(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    given, values = [], []
    post_init = AlphaGRPOConfig.__post_init__

    def remember(config: AlphaGRPOConfig) -> None:
        post_init(config)
        given.append(config)
        values.append({field.name: copy.deepcopy(getattr(config, field.name)) for field in fields(config)})

    monkeypatch.setattr(AlphaGRPOConfig, "__post_init__", remember)
    trainer = make_trainer(**settings)
    trainer.train()
    (args,), (expected,) = given, values
    assert {name: getattr(args, name) for name in expected} == expected
    # What the trainer works with has the same values.
    for name in ("beta", "sync_ref_model", "model_init_kwargs", "eval_on_start"):
        assert getattr(trainer.args, name) == expected[name]


class TextLength(torch.nn.Module):
    """A reward model as TRL calls it: it is given the tokens of a text, and has seen no image."""

    config = SimpleNamespace(_name_or_path="models/text-length")

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.num_calls += 1
        return SimpleNamespace(logits=attention_mask.sum(dim=1, keepdim=True).float())


def test_reward_model_reads_texts_with_its_own_tokenizer(make_trainer: MakeTrainer, shapes_processor: Any) -> None:
    tokenizer, reward_model = shapes_processor.tokenizer, TextLength()
    trainer = make_trainer(
        reward_funcs=[brightness, reward_model],
        arguments={"reward_processing_classes": [None, tokenizer]},
        task="self_reflection",
    )
    assert trainer.reward_processing_classes == [None, tokenizer]
    trainer.train()
    # Not for the initial images, which follow no text.
    assert reward_model.num_calls == 1
    assert history(trainer, "rewards/text-length/mean")[0] > 1
    (update,) = trainer.recorder.updates
    assert not torch.equal(update.inputs["advantages"], update.inputs["image_advantages"])


@pytest.mark.parametrize("has_own_adapter", [False, True])
def test_old_and_reference_scores_are_told_apart_by_the_active_adapter(
    make_trainer: MakeTrainer,
    make_shapes_bagel: Callable[[], BagelModel],
    monkeypatch: pytest.MonkeyPatch,
    has_own_adapter: bool,
) -> None:
    """TRL passes the same model for both."""
    model = None
    if has_own_adapter:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES)
        model = get_peft_model(make_shapes_bagel(), config)
    settings = {"beta": 0.1, "image_beta": 0.1, "num_iterations": 2, "max_steps": 3, "learning_rate": 1e-2}
    trainer = make_trainer(model=model, lora=not has_own_adapter, **settings)
    steps = []

    def recording(trainer: AlphaGRPOTrainer, step: RolloutStep, output: dict[str, Any]) -> None:
        steps.append(step)
        add_scores(trainer, step, output)

    monkeypatch.setattr(reference_module, "add_scores", recording)
    trainer.train()
    assert [list(step.scores) for step in steps] == [["old", "reference"]] * 2
    step = steps[1]
    old, reference = step.scores["old"], step.scores["reference"]
    for i, trajectory in enumerate(step.trajectories):
        sampled = [p for text in trajectory.sampled_texts for p in text.log_probs]
        assert old.log_probs[i, : len(sampled)].tolist() == pytest.approx(sampled, abs=1e-4)
        assert reference.log_probs[i, : len(sampled)].tolist() != pytest.approx(sampled, abs=1e-3)
    assert trainer._rollout_step is None


def test_column_of_an_earlier_step_is_not_handed_on(make_trainer: MakeTrainer) -> None:
    """TRL keeps a column that a reward function filled once."""
    seen = []

    def reward(images: list, log_extra: Callable, trainer_state: Any, **kwargs: Any) -> list[float]:
        log_extra("always", [trainer_state.global_step] * len(images))
        if trainer_state.global_step == 0:
            log_extra("once", ["first"] * len(images))
        return brightness(images)

    class Columns(TrainerCallback):
        def on_rollout(self, *args: Any, rollout: Any, **kwargs: Any) -> None:
            seen.append(rollout.extra_columns)

    trainer = make_trainer(reward_funcs=reward, max_steps=2, arguments={"callbacks": [Columns()]})
    trainer.train()
    assert seen == [{"always": [0] * 4, "once": ["first"] * 4}, {"always": [1] * 4}]


def test_impossible_image_size_is_found_before_training(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="width=26"):
        make_trainer(image_width=26)
    with pytest.raises(ValueError, match="48 x 24 pixels is too large: the model paints at most 24 x 24 pixels"):
        make_trainer(image_height=48)


def test_arguments_of_another_trainer_are_refused_by_name(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    given = {"model": "bagel-shapes", "reward_funcs": brightness}
    with pytest.raises(TypeError, match="args must be an AlphaGRPOConfig, but is a GRPOConfig"):
        AlphaGRPOTrainer(args=GRPOConfig(str(tmp_path), bf16=False, use_cpu=True), **given)
    with pytest.raises(TypeError, match=r"is a tokenizer \(.*\): pass the processor of the model"):
        AlphaGRPOTrainer(processing_class=load_processor("bagel-shapes").tokenizer, **given)


def test_trainer_is_silent_about_what_no_user_can_change(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", "You are using 'rollout_func'")
        trainer = make_trainer(model="bagel-shapes", lora=True, gradient_checkpointing=True)
        trainer.train()
    assert "PAD/BOS/EOS" not in caplog.text


def test_detached_context_has_the_same_loss_and_another_gradient(make_trainer: MakeTrainer) -> None:
    norms, losses = [], []
    for context_gradient in ("exact", "detached"):
        trainer = make_trainer(context_gradient=context_gradient, text_loss_weight=0.01)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        norms.append(trainer.state.log_history[0]["grad_norm"])
        assert trainer.state.log_history[0]["image/ratio_mean"] == 1.0
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
