# SPDX-License-Identifier: Apache-2.0

"""
The update of the trainer on a micro-batch of text-to-image, with the trained steps of its window split over several forwards:
its time, and its peak memory in a process of its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.objectives.base import OBJECTIVES
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS
from alphagrpo_ext.trainer import AlphaGRPOConfig
from alphagrpo_ext.trainer.scoring.image_loss import ImageLoss
from alphagrpo_ext.trainer.scoring.packed_scorer import PackedScorer
from alphagrpo_ext.trainer.scoring.steps_per_forward import resolve_steps_per_forward
from benchmark_parts.peaks import peak_in_a_process
from benchmark_parts.sizes import Size
from benchmark_parts.workload import build_model
from recipe_tools.memory import example_trajectories
from recipe_tools.memory_settings import MemorySettings


@dataclass(frozen=True)
class SplitUpdate:
    """
    A micro-batch of text-to-image with guidance in all trained steps, and what computes its loss.

    Args:
        model ([`UnifiedModel`]): The policy; all weights are trained but those of the vision tower.
        inputs (`dict[str, Any]`): The micro-batch as the trainer buffers it.
        scorer ([`PackedScorer`]): Runs the forwards.
        loss ([`ImageLoss`]): Loss of the images, and backward of all forwards but the last.
        automatic (`int`): Steps per forward that `image_steps_per_forward="auto"` chooses.
    """

    model: UnifiedModel
    inputs: dict[str, Any]
    scorer: PackedScorer
    loss: ImageLoss
    automatic: int

    @classmethod
    def of(cls, size: Size, precision: str) -> SplitUpdate:
        """Build the model of a size and a micro-batch for it, in `"float32"` or under autocast in `"bfloat16"`."""
        model, is_bf16 = build_model(size), precision == "bfloat16"
        settings = MemorySettings(
            batch_size=size.num_trajectories,
            prompt_tokens=size.request_tokens,
            thought_tokens=size.thought_tokens,
            height=size.image_size,
            width=size.image_size,
            sde_window_size=size.num_steps,
            image_steps_per_forward="all",
        )
        args = AlphaGRPOConfig(
            output_dir=os.devnull,
            bf16=is_bf16,
            use_cpu=True,
            image_height=size.image_size,
            image_width=size.image_size,
            num_timesteps=size.num_steps + 1,
            sde_window_size=size.num_steps,
            sde_window_range=[0, size.num_steps],
            cfg_interval=[0.0, 1.0],
            per_device_train_batch_size=size.num_trajectories,
            num_generations=max(2, size.num_trajectories),
            generation_batch_size=max(2, size.num_trajectories),
        )
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if is_bf16 else "no")
        tasks = {PAINTING_TASK: TASKS.get(PAINTING_TASK)(think=True)}
        return cls(
            model=model,
            inputs={
                "trajectories": example_trajectories(model, settings),
                "image_advantages": torch.linspace(-1, 2, size.num_trajectories),
                "is_scored": torch.ones(size.num_trajectories, dtype=torch.bool),
            },
            scorer=PackedScorer(args, accelerator, runs_all_parts=False),
            loss=ImageLoss(OBJECTIVES.get("flow_grpo")(args.objective), 1.0, accelerator),
            automatic=resolve_steps_per_forward(args, model, tasks, can_split=True) or size.num_steps,
        )

    def run(self, steps_per_forward: int) -> None:
        """All forwards and backwards, from no gradients on, with at most so many trained steps in one forward."""
        self.model.zero_grad()
        self.scorer.steps_per_forward = steps_per_forward
        scores, _ = self.loss.backward_parts(self.model, self.inputs, self.scorer, 1)
        (self.loss(scores.images, self.inputs).loss - scores.log_probs.mean()).backward()


def peak_memory(size: Size, precision: str, steps_per_forward: int) -> int:
    """Peak of an update in a process of its own, in bytes above what it takes after its imports: weights, gradients and activations."""
    arguments = json.dumps(asdict(size)), precision, str(steps_per_forward)
    return peak_in_a_process(__name__, run_update.__name__, *arguments).above_imports


def run_update(size: str, precision: str, steps_per_forward: str) -> None:
    """The work of such a process: one update of a size in JSON."""
    SplitUpdate.of(Size(**json.loads(size)), precision).run(int(steps_per_forward))
