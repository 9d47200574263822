# SPDX-License-Identifier: Apache-2.0

"""
What is known of one rollout: [`RolloutStep`] is made when TRL asks for a rollout and is handed from function to function.

TRL generates, scores and rewards a rollout in one long method that calls the trainer's overrides one after the other. They
share their results here, and not through attributes of the trainer. What the loss needs later travels in the dictionary that
TRL buffers, shuffles and splits.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from alphagrpo_ext.images import read_image
from alphagrpo_ext.rollout.generator import RolloutConfig, sample_generator
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.reward_functions import judging_starts
from alphagrpo_ext.trajectory import TextSegment, Trajectory


if TYPE_CHECKING:
    from alphagrpo_ext.trainer.scoring.scores import RolloutScores


def task_name(row: Mapping[str, Any], default: str) -> str:
    """The name in a row's column `task`, or the default."""
    return row.get("task") or default


def reward_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its image, which TRL would take for the input of a vision-language model."""
    return {name: value for name, value in row.items() if name != "image"}


def with_images(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rows whose images have been read. Neighbours with the same file, e.g. the members of a group, share one image.

    Args:
        rows (`Sequence[dict[str, Any]]`): Rows with or without an `image` that [`read_image`] takes.

    Raises:
        `ValueError`: If an image cannot be read. The message names its file and the prompt.
    """
    result: list[dict[str, Any]] = []
    source = image = None
    for row in rows:
        given = row.get("image")
        if given is None:
            result.append(row)
            continue
        is_same = given is source or isinstance(given, str | bytes | Mapping) and given == source
        if not is_same:
            try:
                source, image = given, read_image(given)
            except ValueError as error:
                raise ValueError(f"the row with the prompt {str(row['prompt'])[:100]!r}: {error}") from error
        result.append({**row, "image": image})
    return result


class Stopwatch:
    """Seconds that training spends in rollouts, rewards, callbacks and updates, summed up over the micro-batches of a step."""

    def __init__(self) -> None:
        self._seconds = {"rollout": 0.0, "reward": 0.0}
        self._totals: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to `part`."""
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count the time of the block that is measured as no other part as `"update"`."""
        # An evaluation since the last step also rolled out, and is not counted.
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        for part, seconds in {**self._seconds, "update": elapsed - sum(self._seconds.values())}.items():
            self._totals[part] += seconds

    def take(self) -> dict[str, float]:
        """The totals by the names that they are logged under; they start again from 0."""
        metrics = {f"timing/{part}": seconds for part, seconds in self._totals.items()}
        self._totals.clear()
        return metrics


@dataclass
class RolloutStep:
    """
    One rollout of this process, as far as it has come.

    Args:
        rows (`list[dict[str, Any]]`):
            Dataset rows with their `task`, one per sample; the members of a group follow each other.
        configs (`dict[str, RolloutConfig]`): How the samples of each task are generated; see [`rollout_configs`].
        seed (`int` or `str`), index (`int`):
            Seed of the run and number of this rollout in it. All randomness of the rollout is derived from the two.
        offset (`int`): Position of the first sample among the samples of all processes.
        group_size (`int`): Samples per prompt.
        trajectories (`list[Trajectory]`): One per row, once they are sampled.
        texts (`list[list[str]]`): Decoded sampled texts of each trajectory, one per turn.
        initial_scores (`torch.Tensor` of shape `(samples, functions that judge images)`):
            Rewards of the image that each sample set out to refine; NaN where there is none.
        initial_passes (`torch.Tensor` of shape `(samples,)`):
            Whether that image passes strictly, 0 or 1; NaN where that is not known.
        initial_rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Their weighted sum; NaN where one that counts is missing.
        image_rewards (`torch.Tensor` of shape `(samples of all processes,)`):
            Weighted sum of the rewards of images, before rectification; NaN where one is missing. For a sample without an image,
            that of all its rewards.
        is_false_positive (`torch.Tensor` of shape `(samples of all processes,)`, bool):
            Samples whose rewards rectification replaced.
        rewards (`torch.Tensor` of shape `(samples of all processes, functions)`):
            Rewards after rectification; NaN in all columns of a sample that is not trained on.
        image_advantages (`torch.Tensor` of shape `(samples,)`): Advantages of the images of this process.
        scores (`dict[str, RolloutScores]`):
            What a policy that is not trained makes of the trajectories: `"old"` is the policy that sampled them,
            `"reference"` the one that a KL compares with.
    """

    rows: list[dict[str, Any]]
    configs: dict[str, RolloutConfig]
    seed: int | str
    index: int
    offset: int
    group_size: int
    trajectories: list[Trajectory] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    initial_scores: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    initial_passes: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    initial_rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    image_rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    is_false_positive: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    image_advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scores: dict[str, RolloutScores] = field(default_factory=dict)

    @property
    def local(self) -> slice:
        """Place of this process' samples among those of all processes."""
        return slice(self.offset, self.offset + len(self.rows))

    @property
    def is_scored(self) -> torch.Tensor:
        """Which samples of this process have their rewards, bool `(samples,)`. The others are not trained on."""
        return ~self.rewards[self.local].isnan().all(dim=1)

    @property
    def has_windows(self) -> bool:
        """Whether images have steps to train on, the same in every process, whatever it painted."""
        return any(trajectory.num_trained_steps for trajectory in self.trajectories)

    def generators(self) -> list[torch.Generator]:
        """One source of randomness per sample, which depends on its position among the samples of all processes alone."""
        return [sample_generator(self.seed, self.index, self.offset + i) for i in range(len(self.rows))]


def new_step(
    inputs: Sequence[Mapping[str, Any]],
    args: AlphaGRPOConfig,
    process_index: int,
    group_size: int,
    training_position: tuple[int, int] | None,
) -> RolloutStep:
    """
    A rollout that is about to be sampled.

    Args:
        inputs (`Sequence[Mapping[str, Any]]`): Dataset rows of this process.
        args ([`AlphaGRPOConfig`]): How to sample, and the task of rows that name none.
        process_index (`int`): Rank of this process; every process holds the same number of rows.
        group_size (`int`): Samples per prompt.
        training_position (`tuple[int, int]`, *optional*):
            Optimizer steps and micro-batches done. `None` in evaluation, where the noise is the same every time, so that
            evaluations can be compared.
    """
    rows = with_images([{**row, "task": task_name(row, args.task)} for row in inputs])
    offset = process_index * len(rows)
    names = dict.fromkeys(row["task"] for row in rows)
    if training_position is None:
        return RolloutStep(rows, rollout_configs(args, names), f"eval-{args.seed}", 0, offset, group_size)
    global_step, micro_step = training_position
    # Several rollouts may serve one optimizer step; each has its own noise.
    accumulation = args.gradient_accumulation_steps
    index = global_step * accumulation + micro_step % accumulation
    return RolloutStep(rows, rollout_configs(args, names, global_step), args.seed, index, offset, group_size)


def rollout_configs(
    args: AlphaGRPOConfig, names: Iterable[str], global_step: int | None = None
) -> dict[str, RolloutConfig]:
    """
    How rows are sampled, by the name of their task.

    Args:
        args ([`AlphaGRPOConfig`]): Settings of the run and of its tasks.
        names (`Iterable[str]`): Tasks. If one of them refines images of the policy, the task that paints them is added.
        global_step (`int`, *optional*): Optimizer steps done; `None` in evaluation.
    """
    settings = {name: args.for_task(name) for name in args.with_painting_task(names)}
    if global_step is None:
        return {name: own.eval_rollout() for name, own in settings.items()}
    return {name: own.train_rollout(global_step) for name, own in settings.items()}


def start_judging(
    functions: Sequence[Callable],
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    loop: asyncio.AbstractEventLoop | None,
) -> None:
    """
    Hand painted images to the reward functions that can work on them while the next images are painted.

    Args:
        functions (`Sequence[Callable]`): Reward functions. A coroutine method `start(images, rows)` of theirs is called.
        trajectories (`Sequence[Trajectory]`), rows (`Sequence[Mapping[str, Any]]`): Samples and their rows.
        loop (`asyncio.AbstractEventLoop`, *optional*): Runs them; TRL starts it if a function is asynchronous.
    """
    images = [trajectory.final_image for trajectory in trajectories]
    if loop is None:
        return
    for start in judging_starts(functions):
        asyncio.run_coroutine_threadsafe(start(images, [reward_row(row) for row in rows]), loop)


def rollout_fields(
    trajectories: Sequence[Trajectory], texts: Sequence[Sequence[str]], eos_token_id: int
) -> dict[str, list[Any]]:
    """
    What TRL's `rollout_func` returns: the token ids of prompts and sampled texts, and columns for the reward functions.

    Args:
        trajectories (`Sequence[Trajectory]`): One per row.
        texts (`Sequence[Sequence[str]]`): Their decoded texts.
        eos_token_id (`int`): Stands in for a text where a trajectory has none, and is masked out of the loss.
    """
    fields: defaultdict[str, list[Any]] = defaultdict(list)
    for trajectory, written in zip(trajectories, texts, strict=True):
        sampled = trajectory.sampled_texts
        given = [s for s in trajectory.segments if isinstance(s, TextSegment) and not s.sampled]
        token_ids = [token_id for text in sampled for token_id in text.token_ids]
        fields["prompt_ids"].append([token_id for text in given for token_id in text.token_ids] or [eos_token_id])
        fields["completion_ids"].append(token_ids or [eos_token_id])
        fields["logprobs"].append([p for text in sampled for p in text.log_probs] or [0.0])
        fields["env_mask"].append([1] * len(token_ids) or [0])
        fields["images"].append(trajectory.final_image)
        fields["trajectory"].append(trajectory)
        fields["texts"].append(list(written))
    return dict(fields)
