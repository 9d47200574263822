# SPDX-License-Identifier: Apache-2.0

"""The update that is measured: the loss of a micro-batch, and its packed forward and backward through the contract."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, UnifiedModel
from alphagrpo_ext.objectives.base import OBJECTIVES, ImageScores, ObjectiveConfig
from alphagrpo_ext.trajectory import Trajectory
from benchmark_parts.workload import GUIDANCE


@dataclass(frozen=True)
class Update:
    """
    The loss that is measured: Flow-GRPO with a penalty on the images, and the mean log-probability of the texts.

    Args:
        model ([`UnifiedModel`]): The model, in training mode.
        trajectories (`list[Trajectory]`): Trajectories with one window each.
        precision (`torch.dtype`): `torch.float32`, or `torch.bfloat16` by autocast.
    """

    model: UnifiedModel
    trajectories: list[Trajectory]
    precision: torch.dtype = torch.float32

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    @property
    def num_steps(self) -> int:
        return self.trajectories[0].sampled_images[0].window.num_steps

    def image_loss(self, trajectories: list[Trajectory], batch: PackedBatch, output: PackedOutput) -> torch.Tensor:
        """Contribution of the trained steps in `trajectories` to the average over all trained steps."""
        scores = ImageScores.from_packed(trajectories, batch, output)
        # At a ratio of 1 the value of the clipped loss does not depend on the velocities. That of the penalty does.
        objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig(beta=0.1, kl_type="velocity"))
        advantages = torch.linspace(-1, 2, len(trajectories))
        output = objective(scores, advantages, ref_velocities=torch.zeros_like(scores.velocities))
        return output.loss.mean() * scores.t.shape[1] / self.num_steps

    def text_loss(self, output: PackedOutput) -> torch.Tensor:
        return -output.log_probs.mean()


def packed(update: Update, context_gradient: str) -> float:
    """All steps in one forward, as in this library."""
    batch = update.model.pack(update.trajectories, GUIDANCE)
    with update.autocast():
        output = update.model(**batch.inputs, context_gradient=context_gradient)
    loss = update.image_loss(update.trajectories, batch, output) + update.text_loss(output)
    loss.backward()
    return loss.item()
