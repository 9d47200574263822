# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from alphagrpo_ext.models.bagel import LORA_TARGET_MODULES, BagelModel, BagelProcessor
from alphagrpo_ext.objectives import ImageScores
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trajectory import Trajectory


def brightness(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """A reward that differs between any two images."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


@dataclass
class Update:
    """
    One loss of a trainer, as its packed forward saw it.

    Args:
        inputs (`dict[str, Any]`): What TRL passed to the loss.
        log_probs (`torch.Tensor` of shape `(trajectories, longest text)`): Of sampled tokens.
        images ([`ImageScores`]): Of sampled images.
    """

    inputs: dict[str, Any]
    log_probs: torch.Tensor
    images: ImageScores | None

    @property
    def trajectories(self) -> list[Trajectory]:
        return self.inputs["trajectories"]


@dataclass
class Recorder:
    """Keeps what a trainer computes."""

    updates: list[Update] = field(default_factory=list)

    def attach(self, trainer: AlphaGRPOTrainer) -> None:
        compute_loss, score = trainer._compute_loss, trainer.scorer.score
        scored: list[PackedScores] = []

        def recording_score(*args: Any) -> PackedScores:
            scored.append(score(*args))
            return scored[-1]

        def recording_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
            scored.clear()
            loss = compute_loss(model, inputs)
            # Where trained steps are split over several forwards, the last one has the text.
            last = scored[-1]
            if model.training:
                images = last.images and ImageScores(**{n: v.detach() for n, v in vars(last.images).items()})
                self.updates.append(Update(inputs, last.log_probs.detach(), images))
            return loss

        trainer._compute_loss, trainer.scorer.score = recording_loss, recording_score


@pytest.fixture
def make_trainer(
    tmp_path: Path, make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor
) -> Callable[..., AlphaGRPOTrainer]:
    """
    Builds a trainer of a random tiny model on prompts of the shapes world: 4 rollouts a step, with guidance in a part of
    the window. Keyword arguments are those of [`AlphaGRPOConfig`], but for `model`, `reward_funcs`, `datasets`,
    `processing_class`, `lora` and `arguments` of the constructor. The trainer's `recorder` keeps its updates.
    """

    def make(
        model: BagelModel | str | None = None,
        reward_funcs: Any = brightness,
        lora: bool = False,
        datasets: dict[str, Any] | None = None,
        processing_class: Any = None,
        arguments: dict[str, Any] | None = None,
        **settings: Any,
    ) -> AlphaGRPOTrainer:
        defaults = {
            "output_dir": str(tmp_path),
            "image_height": 24,
            "image_width": 24,
            "num_timesteps": 6,
            "eval_num_timesteps": 4,
            "timestep_shift": 1.0,
            "sde_window_size": 3,
            "sde_window_range": [1, 4],
            "cfg_interval": [0.5, 1.0],
            "max_completion_length": 10,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_generations": 4,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "log_work": True,
            "disable_tqdm": True,
        }
        rows = build_dataset("train", 8, seed=0)
        peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES) if lora else None
        trainer = AlphaGRPOTrainer(
            model=make_shapes_bagel() if model is None else model,
            reward_funcs=reward_funcs,
            args=AlphaGRPOConfig(**(defaults | settings)),
            processing_class=None if isinstance(model, str) else processing_class or shapes_processor,
            **{"peft_config": peft_config, **(arguments or {})},
            **(datasets or {"train_dataset": rows, "eval_dataset": rows.select(range(2))}),
        )
        trainer.recorder = Recorder()
        trainer.recorder.attach(trainer)
        return trainer

    return make
