# SPDX-License-Identifier: Apache-2.0

"""
Stage 1 of self-reflection: the policy paints the images that its groups then refine.

The policy paints without noise, with the guidance, schedule and size of text-to-image, and with a thought only if the run asks
for it. Every process paints for the prompts that it holds, the reward functions score the images as they score everything, and
the image to refine is chosen among those of all processes by a generator that all of them share.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from trl import GRPOTrainer

from alphagrpo_ext.report.answers import strict_passes
from alphagrpo_ext.rollout.generator import RolloutGenerator, same_context, sample_generator
from alphagrpo_ext.rollout.task import PAINTING_TASK, TASKS, Task
from alphagrpo_ext.trainer.reward_functions import reward_name
from alphagrpo_ext.trainer.rewards import complete_sum, judges_images, refuse_infinite, select_initial
from alphagrpo_ext.trainer.step import RolloutStep, reward_row


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.config import AlphaGRPOConfig


@dataclass(frozen=True)
class ImageRewards:
    """
    The reward functions that judge images, for images that no sampled text comes with.

    Args:
        functions (`Sequence[Callable]`): Reward functions as TRL calls them.
        weights (`torch.Tensor` of shape `(functions,)`): Their weights.
        trainer_state ([`~transformers.TrainerState`]): Passed on to the functions.
        loop (`asyncio.AbstractEventLoop`, *optional*): Runs the asynchronous ones; TRL starts it if there are any.
    """

    functions: Sequence[Callable]
    weights: torch.Tensor
    trainer_state: Any
    loop: asyncio.AbstractEventLoop | None

    @classmethod
    def from_trainer(cls, trainer: GRPOTrainer) -> ImageRewards:
        """The functions of a trainer that judge images."""
        keep = judges_images(trainer.reward_funcs)
        functions = [function for function, judges in zip(trainer.reward_funcs, keep.tolist(), strict=True) if judges]
        return cls(functions, trainer.reward_weights[keep], trainer.state, getattr(trainer, "async_loop", None))

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Rewards `(images, functions)` of the images for their rows; NaN where a function gave none. And whether each image
        passes strictly, `(images,)`: see [`strict_passes`].

        What else the functions log is dropped, since it would be about images that get no gradient.

        Raises:
            `ValueError`: If a function returns another number of rewards, or an infinite one.
        """
        if not images or not self.functions:
            return torch.full((len(images), len(self.functions)), torch.nan), torch.full((len(images),), torch.nan)
        logged: dict[str, Sequence[Any]] = {}
        judged = [reward_row(row) for row in rows]
        prompts = [row["prompt"] for row in judged]
        arguments = {
            "prompts": prompts,
            "completions": ["" if isinstance(p, str) else [{"role": "assistant", "content": ""}] for p in prompts],
            "completion_ids": [[] for _ in prompts],
            **{key: [row[key] for row in judged] for key in judged[0] if key not in ("prompt", "completion")},
            **{"images": list(images), "texts": [[] for _ in prompts], "trajectory": [None] * len(prompts)},
            **{"trainer_state": self.trainer_state, "log_extra": logged.__setitem__, "log_metric": _drop},
        }
        results = [function(**arguments) for function in self.functions]
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            future = asyncio.run_coroutine_threadsafe(_gather([results[i] for i in waiting]), self.loop)
            for i, result in zip(waiting, future.result(), strict=True):
                results[i] = result
        names = [reward_name(function) for function in self.functions]
        columns = [[torch.nan if reward is None else reward for reward in result] for result in results]
        rewards = torch.tensor(columns, dtype=torch.float32).T
        refuse_infinite(rewards, names)
        return rewards, torch.tensor(strict_passes(logged, len(images)))

    def totals(self, rewards: torch.Tensor) -> list[float | None]:
        """Weighted sums of rewards `(images of one prompt, functions)`; `None` where a reward is missing."""
        totals = complete_sum(rewards, self.weights.cpu(), max(len(rewards), 1)).tolist()
        return [None if total != total else total for total in totals]


async def _gather(results: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*results)


def _drop(name: str, value: Any) -> None:
    """Takes the place of TRL's `log_metric`."""


def paint_initial_images(
    step: RolloutStep,
    generate: RolloutGenerator,
    tasks: Mapping[str, Task],
    rewards: ImageRewards,
    args: AlphaGRPOConfig,
) -> None:
    """
    Give every row of a task that refines the image that its group starts from, and note the reward of that image.

    Args:
        step ([`RolloutStep`]): Its `rows`, `initial_scores` and `initial_passes` are set.
        generate ([`RolloutGenerator`]): Holds the policy and its processor.
        tasks (`Mapping[str, Task]`): The tasks of the rows by name.
        rewards ([`ImageRewards`]): Scores the images.
        args ([`AlphaGRPOConfig`]):
            `num_initial_images` that this process paints per prompt, `stage1_think` and `stage1_selection`.
    """
    rows, num_images = step.rows, args.num_initial_images
    refining = [i for i, row in enumerate(rows) if tasks[row["task"]].paints_initial_image]
    first_of_group = {same_context(rows[i]): i for i in reversed(refining)}
    missing = [i for i in sorted(first_of_group.values()) if rows[i].get("image") is None]
    images = _paint(step, generate, missing, num_images, args.stage1_think)
    candidates = [(i, image) for i, image in zip((i for i in missing for _ in range(num_images)), images, strict=True)]
    candidates += [(i, rows[i]["image"]) for i in first_of_group.values() if i not in missing]
    scores, passes = rewards([rows[i] for i, _ in candidates], [image for _, image in candidates])
    judged = zip(candidates, scores.tolist(), passes.tolist(), strict=True)
    # A prompt can stand on several processes, which must all choose the same image.
    found = gather_object([(same_context(rows[i]), score, passed, image) for (i, image), score, passed in judged])
    choices: dict[tuple[str, ...], tuple[list[float], float, Image.Image]] = {}
    step.rows = list(rows)
    step.initial_scores = torch.full((len(rows), len(rewards.functions)), torch.nan)
    step.initial_passes = torch.full((len(rows),), torch.nan)
    for i in refining:
        context = same_context(rows[i])
        if context not in choices:
            offered = [(score, passed, image) for other, score, passed, image in found if other == context]
            rng = random.Random(f"{step.seed}-{step.index}-{context}")
            totals = rewards.totals(torch.tensor([score for score, _, _ in offered]))
            choices[context] = offered[select_initial(totals, args.stage1_selection, rng)]
        score, passed, image = choices[context]
        step.rows[i] = {**rows[i], "image": image}
        step.initial_scores[i] = torch.tensor(score)
        step.initial_passes[i] = passed


def _paint(
    step: RolloutStep, generate: RolloutGenerator, indices: Sequence[int], num_images: int, think: bool
) -> list[Image.Image]:
    """Paint `num_images` images for each row of `indices`, one row after the other, after a thought if it is to `think`."""
    if not indices:
        # Rows that refine nothing have no settings of the task that paints.
        return []
    config = step.configs[PAINTING_TASK].deterministic()
    # There is no image yet whose absence could guide.
    guidance = replace(config.denoising.guidance, image_scale=1.0)
    paint = RolloutGenerator(generate.model, generate.processor, TASKS.get(PAINTING_TASK)(think=think))
    trajectories = paint(
        [step.rows[i] for i in indices for _ in range(num_images)],
        [
            sample_generator(f"initial-{step.seed}", step.index, (step.offset + i) * num_images + j)
            for i in indices
            for j in range(num_images)
        ],
        replace(config, denoising=replace(config.denoising, guidance=guidance)),
    )
    return [trajectory.final_image for trajectory in trajectories]
