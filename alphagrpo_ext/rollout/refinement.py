# SPDX-License-Identifier: Apache-2.0

"""Self-reflective refinement at inference time: paint, look, say what is wrong, and paint anew, for several rounds.

Each round starts from image and request alone, so that any number of rounds fits into the context and a round can
start from the best image so far. In training a round sees the rounds before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.readable_prompts import check_prompt_room
from alphagrpo_ext.rollout.task import PAINTING_TASK, REFLECTION_TASK, TASKS, Task


Scorer: TypeAlias = Callable[[list[Image.Image], list[Mapping[str, Any]]], list[float | None]]
"""Rewards of images, each for its row; `None` where a reward is missing."""


@dataclass(frozen=True)
class RefinementStep:
    """
    One image of a refinement.

    Args:
        image (`PIL.Image.Image`): The painted image.
        text (`str`): What the policy wrote before it.
        reward (`float`, *optional*): Reward of the image; `None` without a scorer, or where it gave none.
    """

    image: Image.Image
    text: str
    reward: float | None = None


@dataclass
class Refinement:
    """
    The images of one row.

    Args:
        steps (`list[RefinementStep]`): The first image, and one per round.
        verdict (`str`, *optional*): What the policy wrote when it kept the image that it looked at; `None` if it never did.
    """

    steps: list[RefinementStep]
    verdict: str | None = None

    @property
    def best(self) -> RefinementStep:
        """The step with the highest reward, the earliest of equal ones; the last step if none has a reward."""
        scored = [step for step in self.steps if step.reward is not None]
        return max(scored, key=lambda step: step.reward) if scored else self.steps[-1]

    def reached(self, reward: float | None) -> bool:
        """Whether an image has at least this reward. `None` is never reached."""
        best = self.best.reward
        return reward is not None and best is not None and best >= reward


class _Refiner:
    """Samples and scores images for [`refine`], whose arguments it takes."""

    def __init__(
        self,
        model: UnifiedModel,
        processor: UnifiedProcessor,
        config: RolloutConfig | Mapping[str, RolloutConfig],
        seed: int | str,
        scorer: Scorer | None,
    ) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.seed, self.scorer = seed, scorer

    def given(self, rows: Sequence[Mapping[str, Any]]) -> list[RefinementStep]:
        """Steps of images that rows have already."""
        images = [row["image"] for row in rows]
        return [
            RefinementStep(image, "", reward)
            for image, reward in zip(images, self._rewards(images, rows), strict=True)
        ]

    def sample(
        self, name: str, task: Task, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], turn: int
    ) -> list[tuple[str, RefinementStep | None]]:
        """
        The text of every row, and a step if it painted. `indices` are those of the rows among all, and set the noise together
        with `turn`.
        """
        generate = RolloutGenerator(self.model, self.processor, task)
        config = _task_config(self.config, name)
        generators = [sample_generator(self.seed, turn, index) for index in indices]
        trajectories = generate(rows, generators, config)
        texts = [self.processor.decode_sampled(trajectory.sampled_texts) for trajectory in trajectories]
        painted = [i for i, trajectory in enumerate(trajectories) if trajectory.sampled_images]
        images = [trajectories[i].final_image for i in painted]
        rewards = self._rewards(images, [rows[i] for i in painted])
        steps = {i: RefinementStep(image, texts[i], r) for i, image, r in zip(painted, images, rewards, strict=True)}
        return [(text, steps.get(i)) for i, text in enumerate(texts)]

    def _rewards(self, images: list[Image.Image], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        return self.scorer(images, list(rows)) if self.scorer and images else [None] * len(images)


def check_refinement_room(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    rows: Sequence[Mapping[str, Any]],
    config: RolloutConfig | Mapping[str, RolloutConfig],
    num_rounds: int,
    think: bool,
) -> None:
    """
    Check that all that [`refine`], whose arguments it takes, would paint fits into the model's context.

    Raises:
        `ValueError`: At the first row that does not fit; see [`check_prompt_room`].
    """
    named = [(f"row {i}", row) for i, row in enumerate(rows)]
    painted = [(where, row) for where, row in named if row.get("image") is None]
    painting, reflection = TASKS.get(PAINTING_TASK)(think=think), TASKS.get(REFLECTION_TASK)(think=True)
    check_prompt_room(painted, painting, processor, model, _task_config(config, PAINTING_TASK))
    if num_rounds:
        check_prompt_room(named, reflection, processor, model, _task_config(config, REFLECTION_TASK))


def _task_config(config: RolloutConfig | Mapping[str, RolloutConfig], name: str) -> RolloutConfig:
    return config if isinstance(config, RolloutConfig) else config[name]


def refine(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    rows: Sequence[Mapping[str, Any]],
    config: RolloutConfig | Mapping[str, RolloutConfig],
    num_rounds: int = 1,
    think: bool = True,
    seed: int | str = 0,
    scorer: Scorer | None = None,
    stop_reward: float | None = None,
    keep_best: bool = False,
    allow_stop: bool = False,
    stop_threshold: float | None = None,
) -> list[Refinement]:
    """
    Paint every prompt, then reflect on the image and paint it anew, up to `num_rounds` times. A round sees the image
    that it refines and the request, and no earlier round.

    Args:
        model ([`UnifiedModel`]): The policy.
        processor ([`UnifiedProcessor`]): Its processor.
        rows (`Sequence[Mapping[str, Any]]`): Each has a `prompt`. A row with an `image` starts from that image.
        config ([`RolloutConfig`] or `Mapping[str, RolloutConfig]`):
            How to sample all images, or those of the tasks `"reasoning_t2i"` and `"self_reflection"`.
        num_rounds (`int`, *optional*, defaults to `1`): Largest number of rounds; 0 only paints.
        think (`bool`, *optional*, defaults to `True`): Whether the first image follows a thought.
        seed (`int` or `str`, *optional*, defaults to `0`): Seed of all noise.
        scorer (`Scorer`, *optional*): Scores images, e.g. with a judge.
        stop_reward (`float`, *optional*): A row whose image has this reward is not refined further.
        keep_best (`bool`, *optional*, defaults to `False`):
            Whether a round refines the best image so far instead of the last one.
        allow_stop (`bool`, *optional*, defaults to `False`):
            Whether the policy may keep the image that it looks at. Then no round follows.
        stop_threshold (`float`, *optional*):
            With `allow_stop`, it keeps an image where the probability of that verdict is at least this, in [0, 1]; see
            [`keep_probabilities`]. `None` goes by the words that it writes.

    Returns:
        `list[Refinement]`: One per row.

    Raises:
        `ValueError`: If `stop_reward` or `keep_best` is set without a scorer, `stop_threshold` without `allow_stop`, a number is
            out of range, or a row does not fit into the model's context (see [`check_prompt_room`]).
    """
    if num_rounds < 0:
        raise ValueError(f"num_rounds must not be negative, but is {num_rounds}")
    if scorer is None and (stop_reward is not None or keep_best):
        raise ValueError("stop_reward and keep_best need a scorer, which tells how good an image is")
    rows = list(rows)
    check_refinement_room(model, processor, rows, config, num_rounds, think)
    refiner = _Refiner(model, processor, config, seed, scorer)
    given = [i for i, row in enumerate(rows) if row.get("image") is not None]
    painted = [i for i in range(len(rows)) if i not in given]
    first_steps = dict(zip(given, refiner.given([rows[i] for i in given]), strict=True))
    prompts = [rows[i] for i in painted]
    painting = TASKS.get(PAINTING_TASK)(think=think)
    reflection = TASKS.get(REFLECTION_TASK)(think=True, allow_stop=allow_stop, stop_threshold=stop_threshold)
    sampled = refiner.sample(PAINTING_TASK, painting, prompts, painted, turn=0)
    first_steps |= {i: step for i, (_, step) in zip(painted, sampled, strict=True)}
    results = [Refinement([first_steps[i]]) for i in range(len(rows))]
    for turn in range(1, num_rounds + 1):
        open_rows = [
            i for i, result in enumerate(results) if result.verdict is None and not result.reached(stop_reward)
        ]
        if not open_rows:
            break
        sources = [results[i].best if keep_best else results[i].steps[-1] for i in open_rows]
        inputs = [{**rows[i], "image": source.image} for i, source in zip(open_rows, sources, strict=True)]
        outcomes = refiner.sample(REFLECTION_TASK, reflection, inputs, open_rows, turn)
        for i, (text, step) in zip(open_rows, outcomes, strict=True):
            if step is None:
                results[i].verdict = text
            else:
                results[i].steps.append(step)
    return results
