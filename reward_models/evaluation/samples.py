# SPDX-License-Identifier: Apache-2.0

"""What an evaluation found: samples with their scores, and rates over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from reward_models.dvreward import Score
from reward_models.files.image_files import load_image


@dataclass(frozen=True)
class EvaluatedSample:
    """
    Args:
        index (`int`): Row of the prompt.
        seed (`int`): Noise seed.
        category (`str`): Category of the prompt.
        prompt, text (`str`): The request, and the thought.
        image (`PIL.Image.Image`, *optional*): What was painted, if it is kept in memory.
        reward (`float` or `None`): DVReward; `None` if the judge failed.
        strict_pass (`bool` or `None`): Whether every question got a yes.
        semantic, quality (`tuple[float | None, ...]`, *optional*, defaults to `()`):
            P(yes) of the row's valid questions, in their order; `None` where there is no answer.
        image_file (`str`, *optional*): The image, if it is kept in a file.
    """

    index: int
    seed: int
    category: str
    prompt: str
    text: str
    image: Image.Image | None
    reward: float | None
    strict_pass: bool | None
    semantic: tuple[float | None, ...] = ()
    quality: tuple[float | None, ...] = ()
    image_file: str | None = None

    @classmethod
    def of(
        cls, row: Mapping[str, Any], index: int, seed: int, text: str, image: Image.Image | None, score: Score
    ) -> EvaluatedSample:
        """
        Args:
            row (`Mapping[str, Any]`): The row, with `prompt` and optionally `category`.
            index, seed (`int`): Its place, and the noise seed.
            text (`str`): The thought.
            image (`PIL.Image.Image`, *optional*): What was painted, if it is kept in memory.
            score ([`Score`]): How it was judged.
        """
        return cls(
            index=index,
            seed=seed,
            category=row.get("category") or "all",
            prompt=str(row["prompt"]),
            text=text,
            image=image,
            reward=score.reward,
            strict_pass=score.strict_pass,
            semantic=score.semantic,
            quality=score.quality,
        )

    def load_image(self) -> Image.Image:
        """The image, from memory or from its file."""
        return self.image if self.image is not None else load_image(self.image_file)


@dataclass(frozen=True)
class CategoryScore:
    """
    Args:
        reward (`float`): Mean reward.
        strict_pass_rate (`float`): Share of samples with a yes to every question.
        num_samples (`int`): Samples that could be scored.
        num_failed (`int`): Samples that could not.
    """

    reward: float
    strict_pass_rate: float
    num_samples: int
    num_failed: int

    @classmethod
    def of(cls, samples: Sequence[EvaluatedSample]) -> CategoryScore:
        scored = [sample for sample in samples if sample.reward is not None]
        count = max(len(scored), 1)
        return cls(
            reward=sum(sample.reward for sample in scored) / count,
            strict_pass_rate=sum(sample.strict_pass for sample in scored) / count,
            num_samples=len(scored),
            num_failed=len(samples) - len(scored),
        )


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        samples (`list[EvaluatedSample]`): Ordered by seed and row.
        round (`int`, *optional*, defaults to `0`): How often the images have been refined.
        total ([`CategoryScore`]): Over all samples.
        categories (`dict[str, CategoryScore]`): By category, in order of appearance.
    """

    samples: list[EvaluatedSample]
    round: int = 0
    total: CategoryScore = field(init=False)
    categories: dict[str, CategoryScore] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(sample.category for sample in self.samples)
        object.__setattr__(self, "total", CategoryScore.of(self.samples))
        object.__setattr__(
            self,
            "categories",
            {name: CategoryScore.of([s for s in self.samples if s.category == name]) for name in names},
        )

    def summary(self) -> dict[str, Any]:
        """`{"reward", "strict_pass_rate", ..., "categories": {...}}`, for `summary.json`."""
        return {**asdict(self.total), "categories": {name: asdict(score) for name, score in self.categories.items()}}


def gather_samples(samples: list[EvaluatedSample], round: int) -> Evaluation:
    """The evaluation of the samples of all processes, in each of them."""
    gathered = gather_object(samples) if PartialState().num_processes > 1 else samples
    return Evaluation(sorted(gathered, key=lambda sample: (sample.seed, sample.index)), round)
