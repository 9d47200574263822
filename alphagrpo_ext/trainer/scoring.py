# SPDX-License-Identifier: Apache-2.0

"""
The packed forward of whole trajectories: log-probabilities of sampled texts, velocities of sampled images, and the loss of
images.

With `image_steps_per_forward`, the trained steps of a window are split over several forwards. All but the last one are
followed by their own backward, so that the activations of one part are in memory at a time. The gradients add up to the
gradient of one forward.

Contexts run once, in a forward before all parts. What noised latents read of them, e.g. keys and values, is cut off from
its graph, so that the backwards of parts end there and leave a gradient. The last part to be run is not cut off: its
backward adds the gradients that the others left, and goes on through the contexts. So DDP sees one synchronised forward
and backward, from which all parameters can be reached. Two cases run contexts again with every part: a family without
[`UnifiedModel.pack_parts`], and sharded parameters with several tasks, where the contexts of one process may need a part
of the model that those of another do not.

A trajectory may have ended without painting. Where no trajectory of a batch painted, a stand-in of one token with as many
steps takes the place of images; see [`with_stand_in`]. So every process runs the same forwards over the same parts of the
model, and adds the same parameters to its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, ReadContexts, UnifiedModel
from alphagrpo_ext.models.work import balanced_steps, min_forward_tokens
from alphagrpo_ext.objectives.base import ImageObjective, ImageScores, ObjectiveOutput
from alphagrpo_ext.objectives.regularizers import penalized
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.distributed import Sharding
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
class PartContexts:
    """
    What the noised latents of one part read.

    Args:
        batch ([`PackedBatch`]): The noised latents.
        contexts ([`ReadContexts`]): Their contexts.
        scores ([`PackedScores`]): Of the texts in the contexts.
    """

    batch: PackedBatch
    contexts: ReadContexts
    scores: PackedScores


class SharedContexts:
    """
    Contexts that were run once, for the parts of a window.

    Args:
        scores ([`PackedScores`]): Of their texts.
        output ([`PackedOutput`]): Of the forward over them, with their `states`.
        copies (`Sequence[PackedBatch]`): The noised latents of every part.
    """

    def __init__(self, scores: PackedScores, output: PackedOutput, copies: Sequence[PackedBatch]) -> None:
        self.scores = scores
        self.output = output
        self.copies = copies
        self.leaves = [state.detach().requires_grad_(state.requires_grad) for state in output.states]

    def part(self, index: int) -> PartContexts:
        """
        Contexts for a part. Those of part 0 have the graph of their forward, and its backward takes along the gradients
        that the backwards of other parts left. It comes last.
        """
        states = self.leaves if index else _JoinGradients.apply(self.leaves, *self.output.states)
        contexts = ReadContexts(self.output.log_probs, self.output.entropies, states)
        return PartContexts(self.copies[index], contexts, self.scores)


class _JoinGradients(torch.autograd.Function):
    """Tensors as they are. The backward adds the gradients of leaves, which may have been scaled, to those of the tensors."""

    @staticmethod
    def forward(ctx, leaves: list[torch.Tensor], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.leaves = leaves
        ctx.set_materialize_grads(False)
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        joined = []
        for leaf, gradient in zip(ctx.leaves, gradients, strict=True):
            present = [g for g in (leaf.grad, gradient) if g is not None]
            joined.append(sum(present[1:], present[0]) if present else None)
            leaf.grad = None
        return None, *joined


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
            TRL shuffles and splits it. `None` if no image has a window, or would have one.
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
        steps_per_forward (`int`, *optional*): Most trained steps in one forward; `None` does not split them.
    """

    def __init__(
        self,
        args: AlphaGRPOConfig,
        accelerator: Accelerator,
        runs_all_parts: bool,
        steps_per_forward: int | None = None,
    ) -> None:
        self.args = args
        self.steps_per_forward = steps_per_forward
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
            batch = self.complete(model, trajectories[start : start + batch_size])
            contexts = self.read_contexts(model, batch)
            parts = enumerate(self.split(batch))
            scores = [self.score(model, part, contexts and contexts.part(i)) for i, part in parts]
            batches.append(replace(scores[0], images=join_window_steps([part.images for part in scores])))
        images = [batch.images for batch in batches]
        counts = [num_windows(trajectory) for trajectory in trajectories]
        return RolloutScores(
            log_probs=torch.cat([pad_columns(batch.log_probs, length) for batch in batches]),
            entropies=torch.cat([pad_columns(batch.entropies, length) for batch in batches]),
            velocities=None if None in images else velocities_by_trajectory(images, counts, batch_size),
        )

    def score(
        self, model: torch.nn.Module, trajectories: Sequence[Trajectory], contexts: PartContexts | None = None
    ) -> PackedScores:
        """
        Score a batch of trajectories in one packed forward, with a gradient where that is enabled.

        Args:
            model (`torch.nn.Module`): The policy or the reference, as the launcher wrapped it.
            trajectories (`Sequence[Trajectory]`): The batch, or one of the parts that [`PackedScorer.split`] makes of it.
            contexts ([`PartContexts`], *optional*): What [`PackedScorer.read_contexts`] has for that part.
        """
        if contexts is not None:
            output = self._run(model, contexts.batch.inputs, contexts=contexts.contexts)
            return replace(contexts.scores, images=ImageScores.from_packed(trajectories, contexts.batch, output))
        unwrapped = self._unwrapped(model)
        batch = unwrapped.pack(trajectories, self._guidance(trajectories))
        inputs = unwrapped.with_all_parts(batch.inputs) if self.runs_all_parts else batch.inputs
        output = self._run(model, inputs, temperature=self._temperature(trajectories, batch))
        images = ImageScores.from_packed(trajectories, batch, output)
        return self._text_scores(trajectories, batch, output, images)

    def read_contexts(self, model: torch.nn.Module, trajectories: Sequence[Trajectory]) -> SharedContexts | None:
        """
        Run the contexts of a batch, once for all of the parts that [`PackedScorer.split`] makes of it. `None` if the batch
        is not split, or if every part has to run contexts anew.
        """
        if self.runs_all_parts or len(self.split(trajectories)) == 1:
            return None
        guidance = self._guidance(trajectories)
        parts = self._unwrapped(model).pack_parts(trajectories, guidance, self.steps_per_forward)
        if parts is None:
            return None
        is_detached = self.context_gradient == "detached"
        has_gradient = len(parts.contexts.score_column) > 0 or not is_detached
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_gradient):
            temperature = self._temperature(trajectories, parts.contexts)
            output = self._run(model, parts.contexts.inputs, temperature=temperature, keep_contexts=True)
        if is_detached:
            output = replace(output, states=[state.detach() for state in output.states])
        scores = self._text_scores(trajectories, parts.contexts, output, images=None)
        return SharedContexts(scores, output, parts.copies)

    def complete(self, model: torch.nn.Module, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """A batch that has an image to train on, if rollouts have any; see [`with_stand_in`]."""
        return with_stand_in(trajectories, self._unwrapped(model))

    def _unwrapped(self, model: torch.nn.Module) -> UnifiedModel:
        # accelerate's unwrapping asks which backends are installed, which takes longer than a small model's forward.
        return model if isinstance(model, UnifiedModel) else self.accelerator.unwrap_model(model)

    def _guidance(self, trajectories: Sequence[Trajectory]) -> GuidanceConfig | list[GuidanceConfig]:
        return self._by_task(trajectories, lambda settings: settings.objective_guidance.effective)

    def _temperature(self, trajectories: Sequence[Trajectory], batch: PackedBatch) -> float | torch.Tensor:
        """Of all sampled tokens, or of each of them."""
        temperature = self._by_task(trajectories, lambda settings: settings.temperature)
        if not isinstance(temperature, list):
            return temperature
        return torch.tensor(temperature)[batch.score_trajectory].to(self.accelerator.device)

    def _by_task(self, trajectories: Sequence[Trajectory], setting: Callable[[AlphaGRPOConfig], Any]) -> Any:
        """A setting of all trajectories, or the list of theirs where their tasks differ in it."""
        tasks = [trajectory.task for trajectory in trajectories]
        values = {task: setting(self.args.for_task(task)) for task in set(tasks)}
        each = [values[task] for task in tasks]
        return each[0] if all(value == each[0] for value in each) else each

    def _run(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **options: Any) -> PackedOutput:
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
        with self.accelerator.autocast():
            # PEFT converts the input of each adapter to the type of the adapter's weights, and autocast converts it back.
            is_autocast = torch.is_autocast_enabled(self.accelerator.device.type)
            with disable_input_dtype_casting(model, active=is_autocast):
                return model(**inputs, context_gradient=self.context_gradient, **options)

    def _text_scores(
        self,
        trajectories: Sequence[Trajectory],
        batch: PackedBatch,
        output: PackedOutput,
        images: ImageScores | None,
    ) -> PackedScores:
        device = self.accelerator.device
        length = max(sum(len(text.token_ids) for text in t.sampled_texts) for t in trajectories)
        index = (batch.score_trajectory.to(device), batch.score_column.to(device))
        blank = output.log_probs.new_zeros(len(trajectories), length)
        return PackedScores(
            log_probs=blank.index_put(index, output.log_probs),
            entropies=blank.index_put(index, output.entropies),
            images=images,
        )

    def split(self, trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
        """The same trajectories with a part of their trained steps each; see [`split_window_steps`]."""
        return split_window_steps(trajectories, self.steps_per_forward)


def make_packed_scorer(
    args: AlphaGRPOConfig,
    accelerator: Accelerator,
    sharding: Sharding,
    model: UnifiedModel,
    tasks: Mapping[str, Task],
) -> PackedScorer:
    """
    The scorer of a run.

    Args:
        args ([`AlphaGRPOConfig`]): Settings of the run.
        accelerator ([`~accelerate.Accelerator`]): Device and autocast of forwards.
        sharding ([`Sharding`]): Sharding of the policy.
        model ([`UnifiedModel`]): The policy, unwrapped.
        tasks (`Mapping[str, Task]`): The tasks that are trained, by name.
    """
    runs_all_parts = sharding.shards_parameters and len(tasks) > 1
    can_split = sharding.zero_stage < 3 and not runs_all_parts
    return PackedScorer(args, accelerator, runs_all_parts, resolve_steps_per_forward(args, model, tasks, can_split))


def computes_in_fp32(model: UnifiedModel, args: AlphaGRPOConfig) -> bool:
    """Whether a run computes in fp32: its weights are in fp32, and there is no autocast."""
    return model.dtype == torch.float32 and not args.bf16 and not args.fp16


def trains_adapters(model: UnifiedModel) -> bool:
    """Whether few weights are trained: less than half as many as every noised token is multiplied with."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 2 * num_trained < model.num_generation_weights


def resolve_steps_per_forward(
    args: AlphaGRPOConfig, model: UnifiedModel, tasks: Mapping[str, Task], can_split: bool
) -> int | None:
    """
    The number of trained steps per forward that `image_steps_per_forward` stands for. `"auto"` goes by [`balanced_steps`] for the
    task that paints the most tokens. It depends on the configuration alone, so that all processes run as many forwards.

    Args:
        args ([`AlphaGRPOConfig`]): Settings of every task, and the trajectories of a micro-batch.
        model ([`UnifiedModel`]): The policy, unwrapped, with whole parameters.
        tasks (`Mapping[str, Task]`): The tasks that are trained, by name.
        can_split (`bool`): Whether several forwards have the right gradient and share contexts. If not, `"auto"` takes all steps.

    Returns:
        `int` or `None`: `None` does not split.
    """
    given = args.image_steps_per_forward
    if isinstance(given, int):
        return given
    # A family without parts of its own runs contexts with every forward.
    if given == "all" or not can_split or type(model).pack_parts is UnifiedModel.pack_parts:
        return None
    tokens_per_trajectory = [0]
    for name, task in tasks.items():
        # The size of images that are never painted need not be one that the model can paint.
        if task.can_paint:
            settings = args.for_task(name)
            rows, columns = model.latent_grid(settings.image_height, settings.image_width)
            num_branches = len(model.guidance(settings.objective_guidance.effective).branches)
            tokens_per_trajectory.append(task.num_turns * num_branches * rows * columns)
    tokens_per_step = args.per_device_train_batch_size * max(tokens_per_trajectory)
    min_tokens = min_forward_tokens(computes_in_fp32(model, args), trains_adapters(model))
    steps = balanced_steps(args.sde_window_size, tokens_per_step, model.num_generation_weights, min_tokens)
    return steps if steps < args.sde_window_size else None


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


def with_stand_in(trajectories: Sequence[Trajectory], model: UnifiedModel) -> list[Trajectory]:
    """
    A batch with a stand-in for an image where none was painted, but all would have been trained on. It is sampled after the
    first trajectory, has a single token, and needs no context of its own. Its velocities have no meaning.

    Args:
        trajectories (`Sequence[Trajectory]`): The batch.
        model ([`UnifiedModel`]): The policy or the reference, unwrapped.
    """
    first, *others = trajectories
    num_steps = first.num_trained_steps
    if not num_steps or any(map(num_windows, trajectories)):
        return list(trajectories)
    states = torch.zeros(num_steps + 1, 1, model.latent_channels)
    times = torch.linspace(0.75, 0.25, num_steps + 1)
    image = ImageSegment(
        states[0],
        (1, 1),
        sampled=True,
        window=DenoisingWindow(states, times, start=0, log_probs=torch.zeros(num_steps)),
        guidance_contexts={name: [] for name in model.branches[1:]},
    )
    return [replace(first, segments=[*first.segments, image]), *others]


def num_windows(trajectory: Trajectory) -> int:
    """Number of sampled images that are trained on."""
    return sum(image.window is not None for image in trajectory.sampled_images)


def num_window_steps(trajectories: Sequence[Trajectory]) -> int:
    """Steps of the windows of a batch, or of the stand-in of one without images."""
    windows = [image.window for t in trajectories for image in t.sampled_images if image.window is not None]
    return windows[0].num_steps if windows else trajectories[0].num_trained_steps


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


def velocities_by_trajectory(
    batches: Sequence[ImageScores], num_images: Sequence[int], batch_size: int
) -> list[torch.Tensor]:
    """
    Velocities `(images of the trajectory, steps, tokens, channels)` of each trajectory.

    Args:
        batches (`Sequence[ImageScores]`): Scores of batches of trajectories. Those of a batch without images are a stand-in's.
        num_images (`Sequence[int]`): Images with a window of every trajectory.
        batch_size (`int`): Trajectories per batch.
    """
    result: list[torch.Tensor] = []
    for index, scores in enumerate(batches):
        counts = num_images[index * batch_size : (index + 1) * batch_size]
        result += scores.velocities[: sum(counts)].split(list(counts))
    return result


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


def _narrowed_window(window: DenoisingWindow, start: int, stop: int) -> DenoisingWindow:
    return DenoisingWindow(
        latents=window.latents[start : stop + 1],
        timesteps=window.timesteps[start : stop + 1],
        start=window.start + start,
        log_probs=window.log_probs[start:stop],
    )
