# SPDX-License-Identifier: Apache-2.0

"""
Training stops before an optimizer step from a loss or a gradient that is not finite.

A loss is looked at once per optimizer step, together with those of all processes, and before the last backward, in which DeepSpeed
takes its step. Until then only flags are kept, on the device, so no micro-batch waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from alphagrpo_ext.models.contract import UnifiedProcessor
from alphagrpo_ext.models.finite import check_finite_weights
from alphagrpo_ext.trainer.scoring.scores import PackedScores
from alphagrpo_ext.trajectory import TextSegment, Trajectory


NUM_NAMED = 4
"""Samples and prompts that a message names."""

TERMS = {
    "log_probs": "log-probabilities of texts",
    "velocities": "velocities of images",
    "advantages": "advantages of texts",
    "image_advantages": "advantages of images",
    "old_per_token_logps": "log-probabilities of texts under the policy that sampled",
    "old_velocities": "velocities of images under the policy that sampled",
    "ref_per_token_logps": "log-probabilities of texts under the reference, for the KL",
    "ref_velocities": "velocities of images under the reference, for the KL",
    "base_velocities": "velocities of images under the model before training, for the penalty",
}
"""What goes into the losses, by the names of [`PackedScores`] and of TRL's buffered inputs."""


@dataclass
class MicroBatch:
    """
    What is remembered of a micro-batch until the optimizer step.

    Args:
        trajectories (`Sequence[Trajectory]`): Its samples.
        losses (`dict[str, torch.Tensor]`): Value of each term of the loss, scalars without gradient.
        finite (`dict[str, torch.Tensor]`):
            By the names of [`TERMS`]: whether the values of each sample are finite, `(trajectories,)`.
    """

    trajectories: Sequence[Trajectory]
    losses: dict[str, torch.Tensor]
    finite: dict[str, torch.Tensor]

    def describe(self, decode: Any) -> str:
        """Terms, values and samples that are not finite. `""` if all losses are finite."""
        values = {name: loss.item() for name, loss in self.losses.items()}
        losses = [f"the loss of {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not losses:
            return ""
        causes = []
        for name, flags in self.finite.items():
            rows = (~flags).nonzero().flatten().tolist()
            if rows:
                causes.append(f"{TERMS[name]} are not finite for {_samples(self.trajectories, rows, decode)}")
        every = _samples(self.trajectories, range(len(self.trajectories)), decode)
        return f"{' and '.join(losses)} ({'; '.join(causes) or f'one of {every}'})"


def _samples(trajectories: Sequence[Trajectory], rows: Sequence[int], decode: Any) -> str:
    """Samples by their places in the micro-batch and their prompts."""
    prompts = dict.fromkeys(_prompt(trajectories[row], decode) for row in rows)
    places = ", ".join(map(str, rows[:NUM_NAMED])) + (", ..." if len(rows) > NUM_NAMED else "")
    return f"sample {places} (prompt {', '.join(map(repr, list(prompts)[:NUM_NAMED]))})"


def _prompt(trajectory: Trajectory, decode: Any) -> str:
    """The last text that was given to the policy before it acted."""
    given = ""
    for segment in trajectory.segments:
        if segment.sampled:
            break
        if isinstance(segment, TextSegment):
            given = decode(segment.token_ids)
    return given[:120]


class FiniteSteps:
    """
    Looks at losses and gradients before an optimizer step.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Joins the processes, and knows the scale of fp16 gradients.
        processor ([`UnifiedProcessor`]): Decodes the prompts that a message names.
    """

    def __init__(self, accelerator: Accelerator, processor: UnifiedProcessor) -> None:
        self.accelerator = accelerator
        self.processor = processor
        self._batches: list[MicroBatch] = []

    def total(
        self, losses: Mapping[str, torch.Tensor], scores: PackedScores, inputs: Mapping[str, Any], step: int | None
    ) -> torch.Tensor:
        """
        Return the sum of the losses of a micro-batch, and remember them in training. With the last micro-batch of an optimizer
        step, look at the losses of all of them. All processes call this together.

        Args:
            losses (`Mapping[str, torch.Tensor]`): The terms of the loss, scalars by name.
            scores ([`PackedScores`]): What the losses were computed from.
            inputs (`Mapping[str, Any]`): The micro-batch as TRL buffered it.
            step (`int`, *optional*): Optimizer steps done; `None` in evaluation.

        Raises:
            `FloatingPointError`: If a loss is NaN or infinite, in every process; the message names step, terms and samples.
        """
        loss = sum(losses.values())
        if step is None:
            return loss
        values = {name: value.detach() for name, value in losses.items()}
        self._batches.append(MicroBatch(inputs["trajectories"], values, _finite_samples(scores, inputs)))
        if not self.accelerator.sync_gradients:
            return loss
        total = torch.stack([loss.float() for batch in self._batches for loss in batch.losses.values()]).sum()
        if torch.isfinite(self.accelerator.reduce(total, reduction="sum")):
            return loss
        found = [text for batch in self._batches if (text := batch.describe(self.processor.decode))]
        found = gather_object(found) if self.accelerator.num_processes > 1 else found
        raise FloatingPointError(f"training stops before step {step + 1}: {'; '.join(found[:NUM_NAMED])}")

    def checked_norm(self, norm: torch.Tensor | float | None, step: int) -> torch.Tensor | float | None:
        """
        Return the norm of the gradient, which all processes share, after a look at it, and forget the micro-batches.

        Under fp16 the scaler of gradients skips a step whose gradient overflows, and lowers its scale. That is as it should be,
        until the scale itself is below 1.

        Args:
            norm (`torch.Tensor` or `float`, *optional*): The norm; `None` if nobody computes it.
            step (`int`): Optimizer steps done.

        Raises:
            `FloatingPointError`: If the norm is NaN or infinite; the message names step and samples.
        """
        batches, self._batches = self._batches, []
        if norm is None or math.isfinite(norm) or self._skips_overflow():
            return norm
        trajectories = [trajectory for batch in batches for trajectory in batch.trajectories]
        samples = _samples(trajectories, range(len(trajectories)), self.processor.decode)
        raise FloatingPointError(
            f"training stops before step {step + 1}: the norm of the gradient is {float(norm)}, though all losses are finite "
            f"({samples}). Take a lower learning_rate, or bf16 instead of fp16"
        )

    def _skips_overflow(self) -> bool:
        """Whether whoever scales fp16 gradients leaves out the step."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        scaler = self.accelerator.scaler
        return scaler is None or scaler.get_scale() >= 1


def check_trained_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """
    Check that the trained weights of a model are finite, before it is saved and when training ends.

    Args:
        model (`torch.nn.Module`): The model.
        state (`Mapping[str, torch.Tensor]`, *optional*): Its whole weights, where it holds a part of each itself.

    Raises:
        `FloatingPointError`: If a value is NaN or infinite; the message names weights and what to do.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_finite_weights(
        trained if state is None else state.items(), "training failed, so go on from an earlier checkpoint"
    )


def _finite_samples(scores: PackedScores, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whether the values of each sample are finite, `(trajectories,)`, by the names of [`TERMS`]."""
    num_samples = len(inputs["trajectories"])
    finite = {"log_probs": scores.log_probs.detach().isfinite().all(dim=1)}
    if scores.images is not None:
        images = scores.images
        flags = images.velocities.detach().isfinite().flatten(1).all(dim=1)
        whole = torch.ones(num_samples, device=flags.device).scatter_reduce(
            0, images.trajectory, flags.float(), reduce="amin"
        )
        finite["velocities"] = whole.bool()
    for name in TERMS:
        values = inputs.get(name)
        if isinstance(values, torch.Tensor):
            finite[name] = values.isfinite().reshape(len(values), -1).all(dim=1)
        elif isinstance(values, Sequence) and len(values) == num_samples:
            finite[name] = torch.stack([value.isfinite().all() for value in values])
    return finite
