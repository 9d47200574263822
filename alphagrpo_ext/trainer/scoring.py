# SPDX-License-Identifier: Apache-2.0

"""
The packed forward of whole trajectories: log-probabilities of sampled texts, velocities of sampled images, and the loss of
images.

With `image_steps_per_forward`, the trained steps of a window are split over several forwards. All but the last one are
followed by their own backward, so that the activations of one part are in memory at a time. The gradients add up to the
gradient of one forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.objectives.base import ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import penalized
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Segment, TextSegment, Trajectory


@dataclass
class PackedScores:
    """
    What one policy makes of a batch of trajectories.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(trajectories, longest text)`):
            Scores of sampled tokens; 0 on padding.
        images ([`ImageScores`], *optional*): Scores of the sampled images. `None` if no image has a window.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    images: ImageScores | None


@dataclass
class RolloutScores:
    """
    What a policy that is not trained makes of all trajectories of a rollout. Images are kept as velocities and not as
    log-probabilities, so that every objective finds what it needs.

    Args:
        log_probs, entropies (`torch.Tensor` of shape `(trajectories, longest text)`):
            Scores of sampled tokens; 0 on padding.
        velocities (`list[torch.Tensor]`, *optional*):
            Guided velocities `(images of the trajectory, steps, tokens, channels)` of each trajectory, as a list, so that
            TRL shuffles and splits it. `None` if no image has a window.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    velocities: list[torch.Tensor] | None


class PackedScorer:
    """
    Scores trajectories with a policy or a reference.

    Args:
        args ([`AlphaGRPOConfig`]): Guidance and temperature of each task, split of the window and gradient of contexts.
        accelerator ([`~accelerate.Accelerator`]): Device and autocast of the forward.
        runs_all_parts (`bool`):
            Whether every forward must run every part of the model. With sharded parameters all processes gather the same
            weights, and one of them may have an image to look at where another has none.
    """

    def __init__(self, args: AlphaGRPOConfig, accelerator: Accelerator, runs_all_parts: bool) -> None:
        self.args = args
        self.steps_per_forward = args.image_steps_per_forward
        self.context_gradient = args.context_gradient
        self.accelerator = accelerator
        self.runs_all_parts = runs_all_parts

    def score_rollout(
        self, model: torch.nn.Module, trajectories: Sequence[Trajectory], batch_size: int, length: int
    ) -> RolloutScores:
        """
        Score the trajectories of a rollout, `batch_size` at a time.

        Args:
            model (`torch.nn.Module`): The policy or the reference, as the launcher wrapped it.
            trajectories (`Sequence[Trajectory]`): All of this process.
            batch_size (`int`): Trajectories per packed forward.
            length (`int`): Columns of the result, at least the tokens of the longest text.
        """
        batches = []
        for start in range(0, len(trajectories), batch_size):
            parts = self.split(trajectories[start : start + batch_size])
            scores = [self.score(model, part) for part in parts]
            batches.append(replace(scores[0], images=join_window_steps([part.images for part in scores])))
        images = [batch.images for batch in batches]
        return RolloutScores(
            log_probs=torch.cat([pad_columns(batch.log_probs, length) for batch in batches]),
            entropies=torch.cat([pad_columns(batch.entropies, length) for batch in batches]),
            velocities=None if None in images else [v for scores in images for v in velocities_by_trajectory(scores)],
        )

    def score(self, model: torch.nn.Module, trajectories: Sequence[Trajectory]) -> PackedScores:
        """Score a batch of trajectories in one packed forward, with a gradient where that is enabled."""
        # accelerate's unwrapping asks which backends are installed, which takes longer than a small model's forward.
        unwrapped = model if isinstance(model, UnifiedModel) else self.accelerator.unwrap_model(model)
        tasks = [trajectory.task for trajectory in trajectories]
        settings = {task: self.args.for_task(task) for task in set(tasks)}
        guidance = {task: own.objective_guidance.effective for task, own in settings.items()}
        batch = unwrapped.pack(trajectories, _one_or_each([guidance[task] for task in tasks]))
        inputs = unwrapped.with_all_parts(batch.inputs) if self.runs_all_parts else batch.inputs
        device = self.accelerator.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        temperature = _one_or_each([settings[task].temperature for task in tasks])
        if isinstance(temperature, list):
            temperature = torch.tensor(temperature)[batch.score_trajectory].to(device)
        with self.accelerator.autocast():
            output = model(**inputs, temperature=temperature, context_gradient=self.context_gradient)
        length = max(sum(len(text.token_ids) for text in t.sampled_texts) for t in trajectories)
        index = (batch.score_trajectory.to(device), batch.score_column.to(device))
        blank = output.log_probs.new_zeros(len(trajectories), length)
        return PackedScores(
            log_probs=blank.index_put(index, output.log_probs),
            entropies=blank.index_put(index, output.entropies),
            images=ImageScores.from_packed(trajectories, batch, output),
        )

    def split(self, trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
        """The same trajectories with a part of their trained steps each; see [`split_window_steps`]."""
        return split_window_steps(trajectories, self.steps_per_forward)


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
        num_steps, num_tokens = scores.velocities.shape[1:3]

        def velocities(name: str) -> torch.Tensor | None:
            kept = inputs.get(name)
            if kept is None:
                return None
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
        trajectories = inputs["trajectories"]
        window = next(image.window for t in trajectories for image in t.sampled_images if image.window)
        share = num_steps / window.num_steps
        # A trajectory with several images weighs as much as one with a single image.
        num_images = torch.bincount(scores.trajectory, minlength=len(trajectories))
        losses = (output.loss / num_images[scores.trajectory]).masked_fill(
            ~inputs["is_scored"][scores.trajectory], 0.0
        )
        return ObjectiveOutput(
            loss=share * losses.sum() / len(trajectories),
            metrics={name: share * value for name, value in output.metrics.items()},
        )

    def backward_parts(
        self,
        model: torch.nn.Module,
        parts: Sequence[Sequence[Trajectory]],
        inputs: Mapping[str, Any],
        scorer: PackedScorer,
        accumulation_steps: int,
    ) -> list[ObjectiveOutput]:
        """
        Forward and backward of the parts after the first one, whose backward is the trainer's own.

        Args:
            model (`torch.nn.Module`): The policy, wrapped.
            parts (`Sequence[Sequence[Trajectory]]`): All that [`split_window_steps`] returned but the first.
            inputs (`Mapping[str, Any]`): The micro-batch as TRL buffered it.
            scorer ([`PackedScorer`]): Runs the forwards.
            accumulation_steps (`int`): What a loss is divided by, since gradients of several micro-batches add up.

        Returns:
            `list[ObjectiveOutput]`: One per part, without gradient.
        """
        outputs, start = [], scorer.steps_per_forward
        state, is_last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        for part in parts:
            # Processes exchange gradients, and DeepSpeed takes its step, in the trainer's own backward alone.
            with self.accelerator.no_sync(model) if is_last else nullcontext():
                scores = scorer.score(model, part).images
                output = self(scores, inputs, start)
                options = {"scale_wrt_gas": False} if self.accelerator.distributed_type.value == "DEEPSPEED" else {}
                state._set_sync_gradients(False)
                try:
                    with torch.autocast(self.accelerator.device.type, enabled=False):
                        self.accelerator.backward(self.weight * (output.loss / accumulation_steps), **options)
                finally:
                    state._set_sync_gradients(is_last)
            outputs.append(replace(output, loss=output.loss.detach()))
            start += scores.t.shape[1]
        return outputs

    def metrics(self, outputs: Sequence[ObjectiveOutput]) -> dict[str, float]:
        """Loss and metrics by the names that they are logged under, summed over parts and averaged over processes."""
        names = ["loss", *outputs[0].metrics]
        parts = [torch.stack([output.loss.detach(), *output.metrics.values()]) for output in outputs]
        values = self.accelerator.reduce(torch.stack(parts).sum(dim=0), reduction="mean").tolist()
        return {f"image/{name}": value for name, value in zip(names, values, strict=True)}


def pad_columns(scores: torch.Tensor, length: int) -> torch.Tensor:
    """`(trajectories, tokens)` to `(trajectories, length)`, with zeros on the right."""
    return torch.nn.functional.pad(scores, (0, length - scores.shape[1]))


def fit_tokens(velocities: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Velocities `(images, steps, tokens, channels)` with `num_tokens` tokens. Tasks can paint images of different sizes, and a
    batch is padded to its largest one, so what is added or cut off is padding.
    """
    missing = num_tokens - velocities.shape[2]
    return torch.nn.functional.pad(velocities, (0, 0, 0, missing)) if missing else velocities


def velocities_by_trajectory(scores: ImageScores) -> tuple[torch.Tensor, ...]:
    """Velocities `(images of the trajectory, steps, tokens, channels)` of each trajectory."""
    _, num_images = scores.trajectory.unique_consecutive(return_counts=True)
    return scores.velocities.split(num_images.tolist())


def split_window_steps(trajectories: Sequence[Trajectory], steps_per_part: int | None) -> list[list[Trajectory]]:
    """
    Split the trained steps of all images over several batches of the same trajectories.

    The first part scores the sampled texts; in the others they are context. So the losses of the parts, weighted by
    their number of steps, sum to the loss of the whole.

    Args:
        trajectories (`Sequence[Trajectory]`): A batch whose windows all have the same number of steps.
        steps_per_part (`int`, *optional*): Largest number of steps per part; `None` does not split.

    Returns:
        `list[list[Trajectory]]`: The parts in the order of their steps. Tensors are views of the originals.
    """
    num_steps = {image.window.num_steps for t in trajectories for image in t.sampled_images if image.window}
    # Windows of several lengths are an error, which the scores of the whole batch raise.
    if steps_per_part is None or len(num_steps) != 1 or max(num_steps) <= steps_per_part:
        return [list(trajectories)]
    return [
        [_with_window_steps(trajectory, start, start + steps_per_part) for trajectory in trajectories]
        for start in range(0, num_steps.pop(), steps_per_part)
    ]


def join_window_steps(parts: Sequence[ImageScores | None]) -> ImageScores | None:
    """The scores of a whole batch from those of the parts that [`split_window_steps`] made, in their order."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    by_step = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("velocities", "latents", "next_latents", "t", "t_next")
    }
    return replace(parts[0], **by_step)


def _with_window_steps(trajectory: Trajectory, start: int, stop: int) -> Trajectory:
    def narrow(segment: Segment) -> Segment:
        if isinstance(segment, ImageSegment):
            window = segment.window and _narrowed_window(segment.window, start, stop)
            return replace(segment, window=window) if window else segment
        return TextSegment(segment.content_ids, role=segment.role) if segment.sampled and start else segment

    return replace(trajectory, segments=[narrow(segment) for segment in trajectory.segments])


def _one_or_each(values: list[Any]) -> Any:
    """The one value of all trajectories, or the list of theirs."""
    return values[0] if all(value == values[0] for value in values) else values


def _narrowed_window(window: DenoisingWindow, start: int, stop: int) -> DenoisingWindow:
    return DenoisingWindow(
        latents=window.latents[start : stop + 1],
        timesteps=window.timesteps[start : stop + 1],
        start=window.start + start,
        log_probs=window.log_probs[start:stop],
    )
