# SPDX-License-Identifier: Apache-2.0

"""
The packed forward of whole trajectories: log-probabilities of sampled texts and velocities of sampled images.

With `image_steps_per_forward`, the trained steps of a window are split over several forwards. Each is followed by its backward,
the last one by the trainer's own, so that the activations of one part are in memory at a time. The gradients add up to the
gradient of one forward.

Contexts run once, in a forward before all parts. What noised latents read of them, e.g. keys and values, is cut off from
its graph, so that the backwards of parts end there and leave a gradient. The last part to be run is not cut off: its
backward adds the gradients that the others left, and goes on through the contexts. So DDP sees one synchronised forward
and backward, from which all parameters can be reached. Two cases run contexts again with every part: a family without
[`UnifiedModel.pack_parts`], and sharded parameters with several tasks, where the contexts of one process may need a part
of the model that those of another do not.

A trajectory may have ended without painting. Where no trajectory of a batch painted, a stand-in of one token with as many
steps as a window takes the place of images; see [`with_stand_in`]. So every process runs the same forwards over the same parts
of the model, and uses the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.contract import PackedBatch, PackedOutput, UnifiedModel
from alphagrpo_ext.objectives.base import ImageScores
from alphagrpo_ext.rollout.task import Task
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.distributed import Sharding
from alphagrpo_ext.trainer.scoring.contexts import PartContexts, SharedContexts
from alphagrpo_ext.trainer.scoring.scores import PackedScores, RolloutScores, pad_columns, velocities_by_trajectory
from alphagrpo_ext.trainer.scoring.steps_per_forward import resolve_steps_per_forward
from alphagrpo_ext.trainer.scoring.windows import join_window_steps, num_windows, split_window_steps, with_stand_in
from alphagrpo_ext.trajectory import Trajectory


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
