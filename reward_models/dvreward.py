# SPDX-License-Identifier: Apache-2.0

"""DVReward: decompositional verifiable reward, as a reward function for TRL and as a scorer for evaluation."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.report.answers import COLUMN_SUFFIX, format_answers
from alphagrpo_ext.report.records import Answer
from reward_models.aggregation import AGGREGATIONS, aggregate, all_yes
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, Judge
from reward_models.prompts.questions import PromptRecord, Question, from_row, validate_dataset
from reward_models.prompts.tags import OwnTags


logger = logging.getLogger(__name__)

PREFLIGHT_SECONDS = 10.0
"""Time for the first question of a run, which is about a blank image."""

_GRACE_SECONDS = 5.0

PASS_THRESHOLD = 0.5
"""Smallest P(yes) that counts as a yes."""


def make_named_judge(name: str, settings: Mapping[str, Any]) -> Judge:
    """
    Make a judge by its name.

    Args:
        name (`str`): One of `JUDGES`.
        settings (`Mapping[str, Any]`): Fields of [`JudgeArguments`] without their prefix `judge_`.

    Raises:
        `TypeError`: If there is no such setting; the message lists those that exist.
        `ValueError`: If the judge lacks a setting.
    """
    known = [f.name.removeprefix("judge_") for f in fields(JudgeArguments) if f.name != "judge"]
    if unknown := [key for key in settings if key not in known]:
        raise TypeError(
            f"DVReward has no setting {', '.join(unknown)}; the settings of its judge are {', '.join(known)}"
        )
    arguments = JudgeArguments(judge=name, **{f"judge_{key}": value for key, value in settings.items()})
    return JUDGES.get(name).from_arguments(arguments)


@dataclass(frozen=True)
class Score:
    """
    Score of one image.

    Args:
        reward (`float` or `None`):
            The reward in [0, 1]; `None` if the image could not be scored.
        semantic, quality (`tuple[float | None, ...]`):
            P(yes) of the valid semantic and quality questions, in their order; `None` for a question without an answer.
        strict_pass (`bool` or `None`):
            Whether every answer is yes; `None` if the image could not be scored.
        asked_at, answered_at (`float`, *optional*):
            When the judge received the image and when it was done, in seconds of a monotonic clock; `None` without an image.
    """

    reward: float | None
    semantic: tuple[float | None, ...]
    quality: tuple[float | None, ...]
    strict_pass: bool | None
    asked_at: float | None = field(default=None, compare=False)
    answered_at: float | None = field(default=None, compare=False)


class JudgeFailedError(RuntimeError):
    """Raised when a judge leaves more images without a score than `max_failed_frac` allows, or cannot be asked at all."""


class DVReward:
    """
    Decompositional verifiable reward (https://huggingface.co/papers/2605.12495). A judge answers atomic yes/no
    questions about an image. The reward aggregates its P(yes), by default as
    `sqrt(mean semantic P(yes) * mean quality P(yes))`.

    An instance is an asynchronous reward function for TRL, which reads the dataset columns `semantic_questions` and
    `quality_questions` and the images of the rollout.

    Args:
        judge ([`Judge`] or `str`):
            The judge, or its name in `JUDGES`.
        aggregation (`str`, *optional*, defaults to `"geometric"`):
            How answers become a reward: `"geometric"`, `"mean"` or `"pooled"`. See [`aggregate`].
        max_concurrency (`int`, *optional*, defaults to `64`):
            Largest number of images that are judged concurrently, over all calls in one event loop.
        timeout (`float`, *optional*):
            Seconds that the judge has per image. Then the image is not scored. `None` waits without limit.
        max_failed_frac (`float`, *optional*, defaults to `0.5`):
            Share of a batch's images that may stay without a score, in [0, 1]. If more fail, the reward function raises
            [`JudgeFailedError`], because the remaining rewards would be mostly noise.
        name (`str`, *optional*, defaults to `"dvreward"`):
            Name of the reward function, and prefix of its metrics.
        judge_settings:
            Settings of a judge that is given by its name: those of [`JudgeArguments`] without the prefix `judge_`, e.g.
            `base_url` and `model`.

    Example:

    ```python
    >>> trainer = AlphaGRPOTrainer(..., reward_funcs=DVReward("shapes"))
    >>> reward = DVReward("openai", base_url="http://localhost:8000/v1")
    ```
    """

    always_applies = True
    """Every row whose task paints has questions, so a missing reward of an image is a failure of the judge."""

    def __init__(
        self,
        judge: Judge | str,
        aggregation: str = "geometric",
        max_concurrency: int = 64,
        timeout: float | None = None,
        max_failed_frac: float = 0.5,
        name: str = "dvreward",
        **judge_settings: Any,
    ):
        if isinstance(judge, str):
            judge = make_named_judge(judge, judge_settings)
        elif judge_settings:
            raise ValueError(
                f"{', '.join(judge_settings)}: a judge that is given as an object has its settings already"
            )
        if not isinstance(judge, Judge):
            raise ValueError(f"judge must be a Judge or the name of one, got {judge!r}")
        check_number("max_concurrency", max_concurrency, "[1, inf)")
        if timeout is not None:
            check_number("timeout", timeout, "(0, inf)")
        check_number("max_failed_frac", max_failed_frac, "[0, 1]")
        AGGREGATIONS.get(aggregation)
        self.judge = judge
        self.aggregation = aggregation
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_failed_frac = max_failed_frac
        self.__name__ = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore | None = None
        self._last_error: Exception | None = None
        self._last_cause: str | None = None
        self._is_reached = False
        self._logged_errors: set[type[Exception]] = set()
        # Of all datasets that the reward is asked to check, which share the metrics of a run.
        self._own_tags = OwnTags()
        # By the id of an image. The entry keeps the image alive, so that the id stays unique.
        self._started: dict[int, tuple[Image.Image, PromptRecord, asyncio.Task[Score]]] = {}

    @property
    def run_settings(self) -> dict[str, Any]:
        """What a reward depends on, which a run that resumes keeps as it was."""
        return {
            "judge": type(self.judge).__name__,
            "aggregation": self.aggregation,
            "reward_model": self.judge.run_settings,
        }

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        *,
        images: Sequence[Image.Image | Sequence[Image.Image] | None],
        semantic_questions: Sequence[Any],
        quality_questions: Sequence[Any],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Compute the reward of each completion, as TRL calls it. All sequences have one entry per completion.

        Args:
            prompts, completions, completion_ids (`Sequence`):
                As TRL passes them. Completions are ignored: only the image counts.
            images (`Sequence`):
                The image of each completion, bare or in a sequence of length 1. A completion without an image (`None` or an
                empty sequence) is not scored.
            semantic_questions, quality_questions (`Sequence`):
                Questions of each completion, as in [`from_row`].
            log_extra (`Callable`, *optional*):
                TRL's logger of columns. Under the function's name: the means `semantic` and `quality` of a sample, and its
                `answers` (see [`format_answers`]).
            log_metric (`Callable`, *optional*):
                TRL's logger of metrics. Under the function's name: see [`batch_metrics`]; under `judge`: see
                [`judge_metrics`], and `answer_mass`, the mean of `p_yes + p_no` over the answers of a judge with probabilities.

        Returns:
            `list[float | None]`: Rewards in [0, 1]; `None` for an image that could not be scored.

        Raises:
            `ValueError`: If the arguments are malformed.
            [`JudgeFailedError`]: If more than `max_failed_frac` of the images could not be scored.
        """
        columns = {"images": images, "semantic_questions": semantic_questions, "quality_questions": quality_questions}
        for column, values in columns.items():
            if len(values) != len(prompts):
                raise ValueError(f"{column} has {len(values)} entries for {len(prompts)} prompts")
        found = [completion_image(image, f"images[{i}]") for i, image in enumerate(images)]
        # A task that paints nothing has rows without questions.
        places = [i for i, image in enumerate(found) if image is not None]
        rows = [
            {
                "prompt": prompts[i],
                "semantic_questions": semantic_questions[i],
                "quality_questions": quality_questions[i],
            }
            for i in places
        ]
        records = [from_row(row, f"sample {i}") for i, row in zip(places, rows, strict=True)]
        scores = await self.score([found[i] for i in places], records)
        if log_metric is not None:
            for metric, value in batch_metrics(scores, records).items():
                log_metric(f"{self.__name__}/{metric}", value)
            for metric, value in judge_metrics(scores).items():
                log_metric(f"judge/{metric}", value)
            answer_mass = self.judge.take_answer_mass()
            if answer_mass is not None:
                log_metric("judge/answer_mass", answer_mass)
        self.check_failures(scores)
        if log_extra is not None:
            for column, values in _columns(scores, records).items():
                log_extra(f"{self.__name__}{column}", _spread(values, places, len(found)))
        return _spread([score.reward for score in scores], places, len(found))

    def validate_dataset(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """
        Check the questions of a whole dataset, that the judge can answer them (see [`Judge.validate_question`]), and that the run
        does not get too many tags (see [`OwnTags`]).

        Raises:
            `ValueError`: At the first malformed row or question that the judge cannot answer. The message names the row.
        """
        # A dataset that is refused leaves nothing behind.
        own_tags = OwnTags(set(self._own_tags.found))
        validate_dataset(dataset, self.judge.validate_question, own_tags)
        self._own_tags = own_tags

    def validate_named(self, datasets: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """
        Check several datasets by name; see [`~DVReward.validate_dataset`].

        Raises:
            `ValueError`: As there. The message begins with the name of the dataset.
        """
        for name, dataset in datasets.items():
            try:
                self.validate_dataset(dataset)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def validate_image_size(self, height: int, width: int) -> None:
        """
        Check that the judge can read images of this size, in pixels.

        Raises:
            `ValueError`: If it cannot.
        """
        self.judge.validate_image_size(height, width)

    async def preflight(self, height: int = 64, width: int = 64) -> None:
        """
        Check before a run that the judge answers, by one question about a blank image; see [`Judge.preflight`]. A reward whose
        judge has answered does not ask it again.

        Args:
            height, width (`int`, *optional*, defaults to `64`): Size of the image in pixels.

        Raises:
            [`JudgeFailedError`]: If the judge does not answer within [`PREFLIGHT_SECONDS`]. The message says what to change.
        """
        if self._is_reached:
            return
        image = Image.new("RGB", (width, height), "white")
        try:
            # Judges keep to the time themselves, as they know what they wait for. This is for those that do not.
            async with asyncio.timeout(PREFLIGHT_SECONDS + _GRACE_SECONDS):
                await self.judge.preflight(image, PREFLIGHT_SECONDS)
        except Exception as error:
            cause = str(error) or f"{type(error).__name__} after {PREFLIGHT_SECONDS} s"
            raise JudgeFailedError(
                f"the judge of the reward '{self.__name__}' ({type(self.judge).__name__}) does not answer, so nothing was "
                f"started: {cause}"
            ) from error
        finally:
            await self.judge.aclose()
        self._is_reached = True

    async def start(
        self, images: Sequence[Image.Image | Sequence[Image.Image] | None], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """
        Start judging images without waiting. The next [`~DVReward.score`] in this event loop uses these results, and cancels
        those for images that it is not asked for.

        Args:
            images (`Sequence`): As in [`~DVReward.score`].
            rows (`Sequence[Mapping]`): The dataset row of each image, with its questions.
        """
        for i, (image, row) in enumerate(zip(images, rows, strict=True)):
            image = completion_image(image, f"images[{i}]")
            if image is None:
                continue
            record = from_row(row, f"sample {i}")
            if not self._has_started(image, record):
                self._started[id(image)] = (image, record, asyncio.create_task(self._score_one(image, record)))

    async def aclose(self) -> None:
        """Cancel started judgements and release the resources of the judge in this event loop."""
        await self._drop_started()
        await self.judge.aclose()

    async def score(
        self, images: Sequence[Image.Image | Sequence[Image.Image] | None], records: Sequence[PromptRecord]
    ) -> list[Score]:
        """
        Score each image by the valid questions of its record. One image object that several records with the same questions
        have is judged once.

        Args:
            images (`Sequence`):
                One entry per record: an image, a sequence of length 1 with an image, or `None`.
            records (`Sequence[PromptRecord]`):
                The questions.

        Returns:
            `list[Score]`: In the order of the images.

        Raises:
            `ValueError`: If the arguments are malformed.
        """
        if len(images) != len(records):
            raise ValueError(f"images has {len(images)} entries for {len(records)} records")
        images = [completion_image(image, f"images[{i}]") for i, image in enumerate(images)]
        # An image that several samples have kept is judged once.
        shared: dict[int, tuple[PromptRecord, asyncio.Task[Score]]] = {}
        tasks = []
        for image, record in zip(images, records, strict=True):
            known = shared.get(id(image))
            if image is None or known is None or known[0] != record:
                known = (
                    record,
                    self._started_task(image, record) or asyncio.create_task(self._score_one(image, record)),
                )
                shared[id(image)] = known
            tasks.append(known[1])
        try:
            return await asyncio.gather(*tasks)
        finally:
            await self._drop_started()

    def _has_started(self, image: Image.Image | None, record: PromptRecord) -> bool:
        started = self._started.get(id(image))
        return started is not None and started[1] == record and started[2].get_loop() is asyncio.get_running_loop()

    def _started_task(self, image: Image.Image | None, record: PromptRecord) -> asyncio.Task[Score] | None:
        return self._started.pop(id(image))[2] if self._has_started(image, record) else None

    async def _drop_started(self) -> None:
        loop = asyncio.get_running_loop()
        tasks = [task for _, _, task in self._started.values() if task.get_loop() is loop]
        self._started.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_failures(self, scores: Sequence[Score]) -> None:
        """
        Check that not too many images of a batch failed.

        Args:
            scores (`Sequence[Score]`): Scores of the batch.

        Raises:
            [`JudgeFailedError`]: If more than `max_failed_frac` of the images could not be scored.
        """
        judged = [score for score in scores if score.asked_at is not None]
        num_failed = sum(score.reward is None for score in judged)
        if num_failed <= self.max_failed_frac * len(judged):
            return
        cause = self._last_cause or self.judge.last_failure or "single questions failed"
        raise JudgeFailedError(
            f"{type(self.judge).__name__} left {num_failed} of {len(judged)} images without a score, more than "
            f"judge_max_failed_frac={self.max_failed_frac} allows ({cause})"
        ) from self._last_error

    def _current_slots(self) -> asyncio.Semaphore:
        # A semaphore belongs to the event loop that first waits on it, and evaluation may run in another loop than training.
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._slots = loop, asyncio.Semaphore(self.max_concurrency)
        return self._slots

    async def _score_one(self, image: Image.Image | None, record: PromptRecord) -> Score:
        semantic, quality = record.valid_semantic_questions, record.valid_quality_questions
        questions = [question.question for question in semantic + quality]
        answers: tuple[float | None, ...] = (None,) * len(questions)
        asked_at = answered_at = None
        if image is not None:
            async with self._current_slots():
                asked_at = time.perf_counter()
                answers = await self._ask(image, questions)
                answered_at = time.perf_counter()
        semantic_answers, quality_answers = answers[: len(semantic)], answers[len(semantic) :]
        return Score(
            reward=aggregate(semantic_answers, quality_answers, self.aggregation),
            semantic=semantic_answers,
            quality=quality_answers,
            strict_pass=all_yes(semantic_answers, quality_answers, PASS_THRESHOLD),
            asked_at=asked_at,
            answered_at=answered_at,
        )

    async def _ask(self, image: Image.Image, questions: list[str]) -> tuple[float | None, ...]:
        try:
            answers = await asyncio.wait_for(self.judge.answer(to_rgb(image), questions), self.timeout)
            if None in answers:
                self._last_error, self._last_cause = None, self.judge.last_failure
            return _checked_answers(answers, len(questions))
        except Exception as error:
            is_timeout = isinstance(error, TimeoutError) and not str(error)
            cause = f"no answer about an image in {self.timeout} s" if is_timeout else str(error)
            self._last_error, self._last_cause = error, f"{type(error).__name__}: {cause}"
            if type(error) not in self._logged_errors:
                self._logged_errors.add(type(error))
                logger.warning(
                    "%s could not judge an image, so it has no reward (%s: %s). Further errors of this type are not logged.",
                    type(self.judge).__name__,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
            return (None,) * len(questions)


def batch_metrics(scores: Sequence[Score], records: Sequence[PromptRecord]) -> dict[str, float]:
    """
    Summarise the scores of a batch.

    Args:
        scores (`Sequence[Score]`): The scores.
        records (`Sequence[PromptRecord]`): Their records.

    Returns:
        `dict[str, float]`: Over the images with a score, the share `strict_pass` and the mean P(yes) `semantic` and `quality`.
        For each tag, the share of answered questions whose answer is yes, e.g. `semantic/Count`. A metric without data is left
        out.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for score, record in zip(scores, records, strict=True):
        if score.reward is not None:
            values["strict_pass"].append(score.strict_pass)
            for side, answers in (("semantic", score.semantic), ("quality", score.quality)):
                if answers:
                    values[side].append(fmean(answers))
        for side, question, p_yes in _answered_questions(score, record):
            if p_yes is not None:
                values[f"{side}/{question.tag}"].append(p_yes >= PASS_THRESHOLD)
    return {metric: fmean(entries) for metric, entries in values.items()}


def _answered_questions(score: Score, record: PromptRecord) -> Iterator[tuple[str, Question, float | None]]:
    """Yield the side of each valid question, the question, and P(yes)."""
    for side, questions, answers in (
        ("semantic", record.valid_semantic_questions, score.semantic),
        ("quality", record.valid_quality_questions, score.quality),
    ):
        for question, p_yes in zip(questions, answers, strict=True):
            yield side, question, p_yes


def _columns(scores: Sequence[Score], records: Sequence[PromptRecord]) -> dict[str, list[Any]]:
    """Columns of TRL's table of completions, by the end of their names."""
    return {
        "/semantic": [_mean(score.semantic) for score in scores],
        "/quality": [_mean(score.quality) for score in scores],
        COLUMN_SUFFIX: [
            format_answers(
                [Answer(question.question, question.tag, side, p_yes) for side, question, p_yes in answered]
            )
            for answered in map(_answered_questions, scores, records)
        ],
    }


def judge_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """
    Summarise the reliability and the speed of a judge on a batch.

    Args:
        scores (`Sequence[Score]`): Scores of the batch.

    Returns:
        `dict[str, float]`: `failed_frac`, the share of images without a score; `latency_p50` and `latency_p99`, the seconds
        per image; and `questions_per_second`, the answered questions over the time from the first image to the last answer. A
        metric without data is left out.
    """
    judged = [score for score in scores if score.asked_at is not None]
    if not judged:
        return {"failed_frac": 1.0} if scores else {}
    latencies = np.array([score.answered_at - score.asked_at for score in judged])
    seconds = max(score.answered_at for score in judged) - min(score.asked_at for score in judged)
    num_answered = sum(answer is not None for score in judged for answer in score.semantic + score.quality)
    return {
        "failed_frac": fmean(score.reward is None for score in scores),
        "latency_p50": float(np.quantile(latencies, 0.5)),
        "latency_p99": float(np.quantile(latencies, 0.99)),
        **({"questions_per_second": num_answered / seconds} if seconds else {}),
    }


def completion_image(image: Any, where: str) -> Image.Image | None:
    """
    The image of a completion, which TRL passes bare, in a sequence of length 1, or not at all (`None`, or an empty sequence).

    Raises:
        `ValueError`: If it is anything else. The message begins with `where`.
    """
    if isinstance(image, (list, tuple)):
        if len(image) > 1:
            raise ValueError(f"{where} holds {len(image)} images; a reward scores one image per completion")
        image = image[0] if image else None
    if image is not None and not isinstance(image, Image.Image):
        raise ValueError(f"{where} must be a PIL image or None, got {type(image).__name__}")
    return image


def _checked_answers(answers: Sequence[float | None], count: int) -> tuple[float | None, ...]:
    if len(answers) != count:
        raise ValueError(f"the judge returned {len(answers)} answers for {count} questions")
    for answer in answers:
        if answer is not None and not 0.0 <= answer <= 1.0:
            raise ValueError(f"the judge returned {answer}, which is not a probability")
    return tuple(None if answer is None else float(answer) for answer in answers)


def _spread(values: Sequence[Any], places: Sequence[int], count: int) -> list[Any]:
    """A list of this length with the values at their places, and `None` elsewhere."""
    result: list[Any] = [None] * count
    for place, value in zip(places, values, strict=True):
        result[place] = value
    return result


def _mean(answers: Sequence[float | None]) -> float | None:
    return fmean(answers) if answers and None not in answers else None
