# SPDX-License-Identifier: Apache-2.0

"""Self-reflective refinement at inference time: paint, look, say what is wrong, paint anew, as often as is worth it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import UnifiedModel
from alphagrpo_ext.rollout.generator import RolloutConfig, RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.task import TASKS
from alphagrpo_ext.trajectory import Trajectory


Scorer: TypeAlias = Callable[[list[Image.Image], list[Mapping[str, Any]]], list[float | None]]
"""Rewards of images, each for its row; `None` where there is none."""


@dataclass(frozen=True)
class RefinementStep:
    """
    Args:
        image (`PIL.Image.Image`): What was painted.
        text (`str`): What the policy wrote before it.
        reward (`float`, *optional*): Of the image; `None` without a scorer, or where it gave none.
    """

    image: Image.Image
    text: str
    reward: float | None = None


@dataclass
class Refinement:
    """
    Args:
        steps (`list[RefinementStep]`): The first image, and one a round.
    """

    steps: list[RefinementStep]

    @property
    def best(self) -> RefinementStep:
        """The step with the highest reward, the earliest of equal ones; the last step if none has a reward."""
        scored = [step for step in self.steps if step.reward is not None]
        return max(scored, key=lambda step: step.reward) if scored else self.steps[-1]

    def reached(self, reward: float | None) -> bool:
        """Whether an image has at least this reward. `None` is never reached."""
        best = self.best.reward
        return reward is not None and best is not None and best >= reward


def refine(
    model: UnifiedModel,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    config: RolloutConfig,
    num_rounds: int = 1,
    think: bool = True,
    seed: int | str = 0,
    scorer: Scorer | None = None,
    stop_reward: float | None = None,
    keep_best: bool = False,
) -> list[Refinement]:
    """
    Paint every prompt, then reflect on the image and paint it anew, up to `num_rounds` times. A round sees the image that
    it refines and the request, and no earlier round.

    Args:
        model ([`UnifiedModel`]): The policy.
        processor (`ProcessorMixin`): Its processor.
        rows (`Sequence[Mapping[str, Any]]`): Each has a `prompt`; one with an `image` starts from that.
        config ([`RolloutConfig`]): How to sample.
        num_rounds (`int`, *optional*, defaults to `1`): Most rounds; 0 only paints.
        think (`bool`, *optional*, defaults to `True`): Whether the first image follows a thought.
        seed (`int` or `str`, *optional*, defaults to `0`): Of all noise.
        scorer (`Scorer`, *optional*): Scores images, e.g. with a judge.
        stop_reward (`float`, *optional*): A row whose image has this reward is not refined further.
        keep_best (`bool`, *optional*, defaults to `False`):
            Whether a round refines the best image so far instead of the last one.

    Returns:
        `list[Refinement]`: One a row.

    Raises:
        `ValueError`: If `stop_reward` or `keep_best` is asked for without a scorer, or `num_rounds` is negative.
    """
    if num_rounds < 0:
        raise ValueError(f"num_rounds must not be negative, but is {num_rounds}")
    if scorer is None and (stop_reward is not None or keep_best):
        raise ValueError("stop_reward and keep_best need a scorer, which tells how good an image is")
    rows = list(rows)

    def steps(trajectories: Sequence[Trajectory], of_rows: list[Mapping[str, Any]]) -> list[RefinementStep]:
        images = [trajectory.final_image for trajectory in trajectories]
        rewards = scorer(images, of_rows) if scorer and images else [None] * len(images)
        texts = [
            processor.decode([i for text in trajectory.sampled_texts for i in text.content_ids])
            for trajectory in trajectories
        ]
        return [RefinementStep(*step) for step in zip(images, texts, rewards, strict=True)]

    def run(task: str, of_rows: list[Mapping[str, Any]], indices: Sequence[int], turn: int) -> list[RefinementStep]:
        generate = RolloutGenerator(model, processor, TASKS.get(task)(think=think or turn > 0))
        generators = [sample_generator(seed, turn, index) for index in indices]
        return steps(generate(of_rows, generators, config), of_rows)

    given = [i for i, row in enumerate(rows) if row.get("image") is not None]
    painted = [i for i in range(len(rows)) if i not in given]
    results: dict[int, Refinement] = {}
    rewards = scorer([rows[i]["image"] for i in given], [rows[i] for i in given]) if scorer and given else None
    for place, i in enumerate(given):
        results[i] = Refinement([RefinementStep(rows[i]["image"], "", rewards[place] if rewards else None)])
    for i, step in zip(painted, run("reasoning_t2i", [rows[i] for i in painted], painted, 0), strict=True):
        results[i] = Refinement([step])
    for turn in range(1, num_rounds + 1):
        open_rows = [i for i in range(len(rows)) if not results[i].reached(stop_reward)]
        if not open_rows:
            break
        sources = [results[i].best if keep_best else results[i].steps[-1] for i in open_rows]
        of_rows = [{**rows[i], "image": source.image} for i, source in zip(open_rows, sources, strict=True)]
        for i, step in zip(open_rows, run("self_reflection", of_rows, open_rows, turn), strict=True):
            results[i].steps.append(step)
    return [results[i] for i in range(len(rows))]
