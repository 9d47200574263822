# SPDX-License-Identifier: Apache-2.0

"""What judges in this process share: they read yes and no from the next-token distribution over the whole vocabulary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from alphagrpo_ext.models.fingerprint import frozen_model_settings
from alphagrpo_ext.ranges import check_number
from reward_models.judges.base import Judge
from reward_models.judges.yes_no import (
    DEFAULT_MIN_ANSWER_MASS,
    YesNo,
    check_min_answer_mass,
    yes_no_of_logits,
    yes_no_token_ids,
)


class LocalJudge(Judge):
    """
    Base class of judges in this process.

    Args:
        model (`Any`):
            The model.
        processor (`Any`):
            Its processor, with a `tokenizer`.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of questions per forward.
        min_answer_mass (`float`, *optional*, defaults to `0.5`):
            Smallest probability that yes and no must hold together, in [0, 1]. With less, a question has no answer.

    Raises:
        `ValueError`: If an argument is out of range, or the vocabulary has no single token for yes or for no.
    """

    def __init__(
        self, model: Any, processor: Any, batch_size: int = 32, min_answer_mass: float = DEFAULT_MIN_ANSWER_MASS
    ) -> None:
        check_number("batch_size", batch_size, "[1, inf)")
        check_min_answer_mass(min_answer_mass)
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.min_answer_mass = min_answer_mass
        self.yes_ids, self.no_ids = yes_no_token_ids(processor.tokenizer)

    @property
    def run_settings(self) -> dict[str, Any]:
        return {**frozen_model_settings(self.model, self.processor), "min_answer_mass": self.min_answer_mass}

    @abstractmethod
    def readings(self, image: Image.Image, questions: Sequence[str]) -> list[YesNo]:
        """Read yes and no in the answer to each question, in the calling thread."""

    def probabilities(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        """Compute P(yes) of each question, in the calling thread; `None` for a question without an answer."""
        return self.accept(questions, self.readings(image, questions))

    def read_logits(self, logits: torch.Tensor) -> list[YesNo]:
        """Read logits of shape `(questions, vocabulary)`."""
        tokens = [self.processor.tokenizer.decode([token_id]) for token_id in logits.argmax(dim=-1).tolist()]
        readings = yes_no_of_logits(logits, self.yes_ids, self.no_ids)
        return [replace(reading, token=token) for reading, token in zip(readings, tokens, strict=True)]

    def accept(self, questions: Sequence[str], readings: Sequence[YesNo]) -> list[float | None]:
        """Return P(yes) of each question, `None` where yes and no hold too little of the probability or it is NaN."""
        answers = [reading.answer(self.min_answer_mass) for reading in readings]
        for question, reading, answer in zip(questions, readings, answers, strict=True):
            if answer is None:
                self.last_failure = (
                    f"no answer to {question!r}: yes and no hold {reading.mass:.3g} of the probability of the first word, but "
                    f"must hold judge_min_answer_mass={self.min_answer_mass:g}; the likeliest token is {reading.token!r}"
                )
            else:
                self._count_mass(reading.mass)
        return answers
