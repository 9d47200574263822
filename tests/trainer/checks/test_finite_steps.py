# SPDX-License-Identifier: Apache-2.0

"""A loss, a gradient or a weight that is not finite stops training, and what trains nothing is refused before it begins."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.checks.finite_steps import FiniteSteps
from reward_models.format import FORMATS
from support.trainers import brightness


ROOT = Path(__file__).parents[2]
MakeTrainer = Callable[..., AlphaGRPOTrainer]


def weights(trainer: AlphaGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_stops(trainer: AlphaGRPOTrainer, message: str) -> None:
    """Training raises, and no weight has changed."""
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_gradient_that_is_not_finite(make_trainer: MakeTrainer, settings: dict[str, Any], value: float) -> None:
    trainer = make_trainer(**settings)
    parameter = next(p for n, p in trainer.model.named_parameters() if "layers.0.self_attn.q_proj.weight" in n)
    calls = []
    # In the first micro-batch only.
    parameter.register_hook(lambda gradient: gradient * (value if not calls.append(0) and len(calls) == 1 else 1))
    assert_stops(trainer, r"before step 1: the norm of the gradient is (nan|inf), .*sample 0, .*prompt '")


@pytest.mark.parametrize("settings", [{}, {"image_steps_per_forward": 1}, {"gradient_accumulation_steps": 2}], ids=str)
def test_loss_of_images_that_is_not_finite(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make_trainer(**settings)
    compute, calls = trainer.image_loss.objective.__call__, []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        output = compute(*args, **kwargs)
        calls.append(0)
        output.loss = output.loss * (math.nan if len(calls) == 1 else 1)
        return output

    trainer.image_loss.objective = spoiled
    assert_stops(trainer, r"before step 1: the loss of images is nan \(one of sample 0, 1, 2, 3 \(prompt '")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (
            {"beta": 0.1},
            "the loss of texts is nan .*texts under the reference, for the KL are not finite for sample 0, 1",
        ),
        (
            {"image_beta": 0.1, "text_loss_weight": 0.0},
            "the loss of images is nan .*images under the reference, for the KL are not finite for sample 0, 1",
        ),
    ],
    ids=["texts", "images"],
)
def test_reference_that_is_not_finite(make_trainer: MakeTrainer, settings: dict[str, Any], cause: str) -> None:
    trainer = make_trainer(**settings)
    with torch.no_grad():
        trainer.ref_model.language_model.model.norm.weight.fill_(math.nan)
        trainer.ref_model.language_model.model.norm_moe_gen.weight.fill_(math.nan)
    assert_stops(trainer, cause)


@pytest.mark.parametrize("rows", [[0], [1, 2]], ids=str)
def test_samples_that_are_not_finite_are_named(make_trainer: MakeTrainer, rows: list[int]) -> None:
    trainer = make_trainer()
    compute = trainer._compute_loss

    def spoiled(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        inputs["image_advantages"] = inputs["image_advantages"].index_fill(0, torch.tensor(rows), math.nan)
        return compute(model, inputs)

    trainer._compute_loss = spoiled
    places = ", ".join(map(str, rows))
    assert_stops(trainer, rf"advantages of images are not finite for sample {places} \(prompt '")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "language_model.model.layers.0.self_attn.v_proj.weight",
            {},
            "a text whose log-probabilities are not finite, in row 0",
        ),
        (
            "language_model.model.layers.1.mlp_moe_gen.up_proj.weight",
            {"think": False},
            "an image whose latents are not finite, in row 0",
        ),
        ("vae.decoder.conv_out.weight", {"think": False}, "the pixels of decoded images are not finite"),
    ],
)
def test_weight_that_is_not_finite_is_named_by_the_rollout(
    make_trainer: MakeTrainer, name: str, settings: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(**settings)
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match=rf"{message}.*these weights are NaN or infinite: {name}"):
        trainer.train()


@pytest.mark.parametrize("saves", [True, False])
def test_weights_that_the_last_step_spoils(make_trainer: MakeTrainer, tmp_path: Path, saves: bool) -> None:
    trainer = make_trainer(save_strategy="steps" if saves else "no", save_steps=1)
    trainer.create_optimizer().register_step_post_hook(
        lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
    )
    with pytest.raises(FloatingPointError, match="go on from an earlier checkpoint: values are NaN or infinite in "):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FloatingPointError):
        trainer.save_model(str(tmp_path / "final"))
    assert not list(tmp_path.glob("final/*"))


@pytest.mark.parametrize(
    ("precision", "scale", "stops"),
    [("no", None, True), ("bf16", None, True), ("fp16", 65536.0, False), ("fp16", 0.5, True), ("fp16", None, False)],
)
def test_overflow_under_fp16_skips_a_step(precision: str, scale: float | None, stops: bool) -> None:
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    steps = FiniteSteps(SimpleNamespace(mixed_precision=precision, scaler=scaler), SimpleNamespace(decode=str))
    assert steps.checked_norm(torch.tensor(2.0), 0) == 2
    assert steps.checked_norm(None, 0) is None
    if stops:
        with pytest.raises(FloatingPointError, match="before step 5: the norm of the gradient is inf"):
            steps.checked_norm(torch.tensor(math.inf), 4)
    else:
        assert steps.checked_norm(torch.tensor(math.inf), 4) == math.inf


def test_micro_batches_are_forgotten_after_a_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer._finite_steps._batches == []


TWO_PROCESSES = """
import math, sys, torch
from types import SimpleNamespace
from accelerate import Accelerator
from alphagrpo_ext.trainer.checks.finite_steps import FiniteSteps
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trajectory import TextSegment, Trajectory

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
steps = FiniteSteps(accelerator, SimpleNamespace(decode=str))
inputs = {"trajectories": [Trajectory([TextSegment([rank])])]}
scores = PackedScores(torch.zeros(1, 2), torch.zeros(1, 2), None)
accelerator.gradient_state._set_sync_gradients(True)
steps.total({"texts": torch.tensor(1.0)}, scores, inputs, 0)
steps.checked_norm(torch.tensor(1.0), 0)
scores.log_probs = torch.tensor([[0.0, math.nan if rank else 0.0]])
try:
    steps.total({"texts": torch.tensor(math.nan if rank else 1.0)}, scores, inputs, 1)
except FloatingPointError as error:
    print(f"rank {rank}: {error}", flush=True)
# Threads of Gloo that outlive the interpreter may abort it.
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_stop_together(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, tmp_path / "script.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert (
            f"rank {rank}: training stops before step 2: the loss of texts is nan (log-probabilities of texts are not finite "
            "for sample 0 (prompt '[1]'))" in result.stdout
        )


class TestNothingToTrain:
    @pytest.mark.parametrize(
        ("train", "evaluation", "message"),
        [
            (0, 2, "train_dataset is empty"),
            (4, 0, "eval_dataset is empty"),
            (4, {"easy": 2, "hard": 0}, r"eval_dataset\['hard'\] is empty"),
            (1, 2, "train_dataset has 1 rows, but a rollout takes 2 prompts, so nothing would be trained"),
        ],
    )
    def test_dataset_without_rows(self, make_trainer: MakeTrainer, train: int, evaluation: Any, message: str) -> None:
        rows = build_dataset("train", 8, seed=0)
        sizes = evaluation if isinstance(evaluation, dict) else {"": evaluation}
        members = {name: rows.select(range(size)) for name, size in sizes.items()}
        datasets = {
            "train_dataset": rows.select(range(train)),
            "eval_dataset": members if isinstance(evaluation, dict) else members[""],
        }
        with pytest.raises(ValueError, match=f"^{message}"):
            make_trainer(datasets=datasets, per_device_train_batch_size=8)

    @pytest.mark.parametrize(
        "settings", [{"lora_dropout": math.nan}, {"lora_alpha": math.nan}, {"lora_alpha": 0}], ids=str
    )
    def test_adapter_without_effect(self, make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"^{next(iter(settings))} in peft_config must be"):
            make_trainer(arguments={"peft_config": LoraConfig(target_modules=["q_proj"], **settings)})

    def test_frozen_model(self, make_trainer: MakeTrainer, make_shapes_bagel: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="all weights of the model are frozen, so nothing would be trained"):
            make_trainer(model=make_shapes_bagel().requires_grad_(False))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"text_loss_weight": 0.0, "image_loss_weight": 0.0}, "text_loss_weight and image_loss_weight are both 0"),
            ({"think": False, "image_loss_weight": 0.0}, "image_loss_weight=0 and think=False leave neither"),
            (
                {"task": "visual_question_answering", "text_loss_weight": 0.0},
                "text_loss_weight=0 leaves nothing to train: the task visual_question_answering paints no images",
            ),
            ({"reward_weights": [0.0]}, r"reward_weights=\[0.0\] are all 0, so nothing would be trained"),
        ],
    )
    def test_loss_without_weight(self, make_trainer: MakeTrainer, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(**settings)


class TestRewardOfTextAlone:
    """A reward of texts does nothing where texts are not trained."""

    def test_is_refused(self, make_trainer: MakeTrainer) -> None:
        with pytest.raises(ValueError, match="^think_format would train nothing: .* text_loss_weight is 0"):
            make_trainer(reward_funcs=[brightness, FORMATS.get("think")()], text_loss_weight=0.0)

    @pytest.mark.parametrize(
        "settings",
        [{"separate_advantages": False}, {"mask_broken_format": True}, {"reward_weights": [1.0, 0.0]}],
        ids=str,
    )
    def test_is_used(self, make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
        trainer = make_trainer(reward_funcs=[brightness, FORMATS.get("think")()], text_loss_weight=0.0, **settings)
        assert len(trainer.reward_funcs) == 2


def test_number_that_is_written_after_the_configuration_was_made(make_trainer: MakeTrainer) -> None:
    args = make_trainer().args
    args.learning_rate = math.nan
    with pytest.raises(ValueError, match="learning_rate must not be negative, but is nan"):
        AlphaGRPOTrainer("bagel-shapes", args=args, reward_funcs=[], train_dataset=build_dataset("train", 8, seed=0))
