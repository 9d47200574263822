# SPDX-License-Identifier: Apache-2.0

"""The loss of images, and the backward of the parts of a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from alphagrpo_ext.objectives.base import ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import penalized
from alphagrpo_ext.trainer.scoring.packed_scorer import PackedScorer
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trainer.scoring.windows import num_window_steps, num_windows
from alphagrpo_ext.trajectory import Trajectory


class ImageLoss:
    """
    The loss of images, averaged over the trained steps and the trajectories of a micro-batch.

    Args:
        objective ([`ImageObjective`]): From velocities and advantages to a loss.
        weight (`float`): Weight of the loss.
        accelerator ([`~accelerate.Accelerator`]): Runs the backward of parts.
    """

    def __init__(self, objective: ImageObjective, weight: float, accelerator: Accelerator) -> None:
        self.objective = objective
        self.weight = weight
        self.accelerator = accelerator

    def __call__(self, scores: ImageScores, inputs: Mapping[str, Any], start: int = 0) -> ObjectiveOutput:
        """
        The share of some trained steps in the loss and the metrics of the whole window.

        Args:
            scores ([`ImageScores`]): What the packed forward made of these steps.
            inputs (`Mapping[str, Any]`): The micro-batch as TRL buffered it.
            start (`int`, *optional*, defaults to `0`): Position of the first of these steps in the window.

        Returns:
            [`ObjectiveOutput`]: With a scalar loss, before `weight`.
        """
        trajectories = inputs["trajectories"]
        has_images = any(map(num_windows, trajectories))
        num_steps, num_tokens = scores.velocities.shape[1:3]

        def velocities(name: str) -> torch.Tensor | None:
            kept = inputs.get(name)
            if kept is None:
                return None
            if not has_images:
                return scores.velocities.detach()
            return torch.cat([fit_tokens(tensor, num_tokens) for tensor in kept])[:, start : start + num_steps]

        output = self.objective(
            scores,
            inputs["image_advantages"][scores.trajectory],
            old_velocities=velocities("old_velocities"),
            ref_velocities=velocities("ref_velocities"),
        )
        base_velocities = velocities("base_velocities")
        if base_velocities is not None:
            output = penalized(output, scores, base_velocities, self.objective.config.base_beta)
        share = num_steps / num_window_steps(trajectories)
        # A trajectory with several images weighs as much as one with a single image.
        num_images = torch.bincount(scores.trajectory, minlength=len(trajectories))
        is_left_out = (
            ~inputs["is_scored"][scores.trajectory] if has_images else torch.ones_like(scores.trajectory).bool()
        )
        losses = (output.loss / num_images[scores.trajectory]).masked_fill(is_left_out, 0.0)
        return ObjectiveOutput(
            loss=share * losses.sum() / len(trajectories),
            # Those of a stand-in are about no image.
            metrics={name: share * has_images * value for name, value in output.metrics.items()},
        )

    def backward_parts(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], scorer: PackedScorer, accumulation_steps: int
    ) -> tuple[PackedScores, list[ObjectiveOutput]]:
        """
        Forward and backward of all parts but the first one, and then the forward of the first one, which has the texts. Its
        backward is the trainer's own.

        Args:
            model (`torch.nn.Module`): The policy, wrapped.
            inputs (`Mapping[str, Any]`): The micro-batch as TRL buffered it.
            scorer ([`PackedScorer`]): Runs the forwards.
            accumulation_steps (`int`): What a loss is divided by, since gradients of several micro-batches add up.

        Returns:
            `tuple[PackedScores, list[ObjectiveOutput]]`: Scores of the first part, and one output without gradient for each
            of the others.
        """
        trajectories = scorer.complete(model, inputs["trajectories"])
        first, *others = scorer.split(trajectories)
        if not others:
            return scorer.score(model, first), []
        outputs, start = [], scorer.steps_per_forward
        # Processes exchange gradients, and DeepSpeed takes its step, in the trainer's own backward alone.
        with self.accelerator.no_sync(model) if self.accelerator.sync_gradients else nullcontext():
            contexts = scorer.read_contexts(model, trajectories)
            for index, part in enumerate(others, 1):
                scores = scorer.score(model, part, contexts and contexts.part(index)).images
                output = self(scores, inputs, start)
                self._backward(self.weight * (output.loss / accumulation_steps))
                outputs.append(replace(output, loss=output.loss.detach()))
                start += scores.t.shape[1]
                # The graph of a part is gone before the next one is built.
                del scores, output
        return scorer.score(model, first, contexts and contexts.part(0)), outputs

    def _backward(self, loss: torch.Tensor) -> None:
        """A backward after which DeepSpeed takes no step."""
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type.value == "DEEPSPEED" else {}
        state, is_last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        state._set_sync_gradients(False)
        try:
            with torch.autocast(self.accelerator.device.type, enabled=False):
                self.accelerator.backward(loss, **options)
        finally:
            state._set_sync_gradients(is_last)

    def metrics(self, outputs: Sequence[ObjectiveOutput], trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """
        Loss and metrics by the names that they are logged under, summed over parts. The loss is averaged over processes, and
        metrics over those whose `trajectories` have images. Without any image, there are no metrics.
        """
        names = ["loss", *outputs[0].metrics]
        parts = [torch.stack([output.loss.detach(), *output.metrics.values()]) for output in outputs]
        own = torch.stack(parts).sum(dim=0)
        has_images = own.new_tensor([any(map(num_windows, trajectories))])
        share, *values = self.accelerator.reduce(torch.cat([has_images, own]), reduction="mean").tolist()
        if not share:
            return {"image/loss": values[0]}
        shares = [1.0, *[share] * len(outputs[0].metrics)]
        return {f"image/{name}": value / part for name, value, part in zip(names, values, shares, strict=True)}


def fit_tokens(velocities: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Velocities `(images, steps, tokens, channels)` with `num_tokens` tokens. Tasks can paint images of different sizes, and a
    batch is padded to its largest one, so what is added or cut off is padding.
    """
    missing = num_tokens - velocities.shape[2]
    return torch.nn.functional.pad(velocities, (0, 0, 0, missing)) if missing else velocities
