# SPDX-License-Identifier: Apache-2.0

"""Arguments of judges, the same in every recipe and in the reward server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from alphagrpo_ext.ranges import NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat, check_ranges
from reward_models.endpoints.endpoint import parse_extra_body


@dataclass
class JudgeArguments:
    """
    Which judge to use, and its settings; the help text of a field describes it. Keys of endpoints come from the environment
    alone.
    """

    judge: str = field(
        default="shapes",
        metadata={
            "help": "Judge that answers the questions: 'openai', 'server', 'transformers', 'policy', 'shapes' or a "
            "registered one."
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={
            "help": "Model of the judge: its name at the endpoint, or the name or folder of a local model. For 'policy', a "
            "frozen unified model in the place of the one that is trained."
        },
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Endpoint of the judge 'openai', e.g. http://localhost:8000/v1, or reward server of the judge 'server', "
            "e.g. http://localhost:8001."
        },
    )
    judge_max_concurrency: PositiveInt = field(
        default=64, metadata={"help": "Largest number of questions that the endpoint answers concurrently."}
    )
    judge_timeout: PositiveFloat = field(default=60.0, metadata={"help": "Seconds for one try of a question."})
    judge_max_retries: NonNegativeInt = field(default=8, metadata={"help": "Further tries of a question."})
    judge_max_answer_bytes: PositiveInt = field(
        default=2**20, metadata={"help": "Largest size of the endpoint's answer, before and after decompression."}
    )
    judge_min_answer_mass: UnitFloat = field(
        default=0.5,
        metadata={
            "help": "Smallest probability that yes and no must hold together, in [0, 1]. With less there is no answer."
        },
    )
    judge_binary: bool = field(
        default=False,
        metadata={"help": "Count the yes or no of the answer itself, for endpoints without log-probabilities."},
    )
    judge_image_first: bool = field(
        default=False,
        metadata={
            "help": "Ask one question about an image before the others, so that they find it in the server's prefix cache."
        },
    )
    # A union with str, as in TRL's own dictionaries: the argument parser passes a string.
    judge_extra_body: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further fields of a request to the judge's endpoint, as JSON. A field that is null is left out, e.g. "
            '{"temperature": null}.'
        },
    )
    judge_batch_size: PositiveInt = field(default=32, metadata={"help": "Questions per batch of a local judge."})

    def __post_init__(self) -> None:
        if not 0 <= self.judge_min_answer_mass <= 1:
            raise ValueError(f"judge_min_answer_mass must be in [0, 1], but is {self.judge_min_answer_mass}")
        self.judge_extra_body = parse_extra_body("judge_extra_body", self.judge_extra_body)
        check_ranges(self)
