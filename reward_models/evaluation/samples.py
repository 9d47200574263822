# SPDX-License-Identifier: Apache-2.0

"""The samples of an evaluation with their scores, and the scores of each category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from reward_models.dvreward import Score
from reward_models.evaluation.statistics import standard_error
from reward_models.files.image_files import load_image


NO_CATEGORY = "all"
"""Category of a prompt whose row names none."""


@dataclass(frozen=True)
class EvaluatedSample:
    """
    One image with its score.

    Args:
        index (`int`): Row of the prompt.
        seed (`int`): Noise seed.
        category (`str`): Category of the prompt; `"all"` if its row names none.
        prompt, text (`str`): The prompt, and the thought.
        image (`PIL.Image.Image`, *optional*): The image, if it is kept in memory.
        reward (`float` or `None`): DVReward; `None` if the judge failed.
        strict_pass (`bool` or `None`): Whether the answer to every question is yes.
        semantic, quality (`tuple[float | None, ...]`, *optional*, defaults to `()`):
            P(yes) of each valid question of the row, in order; `None` where there is no answer.
        image_file (`str`, *optional*): Path of the image, if it is kept in a file.
        is_kept (`bool`, *optional*, defaults to `False`):
            Whether it is the image of the round before, because the policy wrote that it is right. Later rounds leave it alone.
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
    is_kept: bool = False

    def kept(self, text: str) -> EvaluatedSample:
        """This sample in the next round, if the policy keeps its image with a `text`."""
        return replace(self, text=text, image=self.load_image(), image_file=None, is_kept=True)

    @classmethod
    def from_score(
        cls, row: Mapping[str, Any], index: int, seed: int, text: str, image: Image.Image | None, score: Score
    ) -> EvaluatedSample:
        """
        Combine a dataset row and the score of its image.

        Args:
            row (`Mapping[str, Any]`): The row, with `prompt` and optionally `category`.
            index, seed (`int`): Index of the row, and the noise seed.
            text (`str`): The thought.
            image (`PIL.Image.Image`, *optional*): The image, if it is kept in memory.
            score ([`Score`]): The score.
        """
        return cls(
            index=index,
            seed=seed,
            category=row.get("category") or NO_CATEGORY,
            prompt=str(row["prompt"]),
            text=text,
            image=image,
            reward=score.reward,
            strict_pass=score.strict_pass,
            semantic=score.semantic,
            quality=score.quality,
        )

    def to_row(self, file: str) -> dict[str, Any]:
        """The sample as a JSON object that names the file of its image."""
        names = [f.name for f in fields(self) if f.name not in ("image", "image_file")]
        return {name: getattr(self, name) for name in names} | {"file": file}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], folder: Path) -> EvaluatedSample:
        """
        Read a sample that [`to_row`] wrote.

        Args:
            row (`Mapping[str, Any]`): The JSON object.
            folder (`Path`): Folder of the image.
        """
        values = {name: value for name, value in row.items() if name != "file"}
        # Files of earlier versions have no answers.
        values |= {side: tuple(row.get(side, ())) for side in ("semantic", "quality")}
        return cls(**values, image=None, image_file=str(folder / row["file"]))

    def load_image(self) -> Image.Image:
        """The image, from memory or from its file."""
        return self.image if self.image is not None else load_image(self.image_file)


@dataclass(frozen=True)
class CategoryScore:
    """
    Scores of the samples of one category.

    Args:
        reward (`float`): Mean reward.
        strict_pass_rate (`float`): Share of samples for which the answer to every question is yes.
        num_samples (`int`): Number of samples that were scored.
        num_failed (`int`): Number of samples that could not be scored.
        reward_error, strict_pass_error (`float`, *optional*): Standard errors of the two means; see [`standard_error`].
    """

    reward: float
    strict_pass_rate: float
    num_samples: int
    num_failed: int
    reward_error: float | None
    strict_pass_error: float | None

    @classmethod
    def from_samples(cls, samples: Sequence[EvaluatedSample]) -> CategoryScore:
        """Average the samples that were scored."""
        scored = [sample for sample in samples if sample.reward is not None]
        count, prompts = max(len(scored), 1), [sample.index for sample in scored]
        return cls(
            reward=sum(sample.reward for sample in scored) / count,
            strict_pass_rate=sum(sample.strict_pass for sample in scored) / count,
            num_samples=len(scored),
            num_failed=len(samples) - len(scored),
            reward_error=standard_error(prompts, [sample.reward for sample in scored]),
            strict_pass_error=standard_error(prompts, [sample.strict_pass for sample in scored]),
        )


@dataclass(frozen=True)
class Evaluation:
    """
    All samples of an evaluation.

    Args:
        samples (`list[EvaluatedSample]`): The samples, ordered by seed and row.
        round (`int`, *optional*, defaults to `0`): Number of times that the images have been refined.

    Attributes:
        total ([`CategoryScore`]): Scores of all samples.
        categories (`dict[str, CategoryScore]`): Scores by category, in order of appearance.
    """

    samples: list[EvaluatedSample]
    round: int = 0
    total: CategoryScore = field(init=False)
    categories: dict[str, CategoryScore] = field(init=False)

    def __post_init__(self) -> None:
        groups = samples_by_category(self.samples)
        categories = {name: CategoryScore.from_samples(samples) for name, samples in groups.items()}
        object.__setattr__(self, "total", CategoryScore.from_samples(self.samples))
        object.__setattr__(self, "categories", categories)

    def summary(self) -> dict[str, Any]:
        """`{"reward", "strict_pass_rate", ..., "categories": {...}}`, for `summary.json`."""
        return {**asdict(self.total), "categories": {name: asdict(score) for name, score in self.categories.items()}}


def samples_by_category(samples: Sequence[EvaluatedSample]) -> dict[str, list[EvaluatedSample]]:
    """Group samples by category, in order of appearance."""
    groups: dict[str, list[EvaluatedSample]] = {}
    for sample in samples:
        groups.setdefault(sample.category, []).append(sample)
    return groups


def named_categories(samples: Sequence[EvaluatedSample]) -> dict[str, list[EvaluatedSample]]:
    """Group samples by category for a table that ends with all of them. There is no group if no row names a category."""
    groups = samples_by_category(samples)
    return {} if list(groups) == [NO_CATEGORY] else groups


def gather_samples(samples: list[EvaluatedSample], round: int) -> Evaluation:
    """Gather the samples of all processes into one evaluation, in every process."""
    gathered = gather_object(samples) if PartialState().num_processes > 1 else samples
    return Evaluation(sorted(gathered, key=lambda sample: (sample.seed, sample.index)), round)
