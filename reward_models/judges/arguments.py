# SPDX-License-Identifier: Apache-2.0

"""The arguments of judges, the same in every recipe and in the reward server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class JudgeArguments:
    """
    Which judge, and what it needs. Keys of endpoints come from the environment alone.

    Args:
        judge (`str`, *optional*, defaults to `"shapes"`):
            Who answers the questions: `"openai"`, `"server"`, `"transformers"`, `"policy"`, `"shapes"`, or a judge that
            another package registers.
        judge_model (`str`, *optional*):
            Model of the judge: its name at the endpoint, or the name or folder of a local one.
        judge_base_url (`str`, *optional*):
            OpenAI-compatible endpoint of the judge `"openai"`, or the reward server of the judge `"server"`.
        judge_max_concurrency (`int`, *optional*, defaults to `64`):
            Questions that are with the endpoint at once.
        judge_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try of a question.
        judge_max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a question.
        judge_binary (`bool`, *optional*, defaults to `False`):
            Whether a yes or no counts as it is, for endpoints without log-probabilities.
        judge_image_first (`bool`, *optional*, defaults to `False`):
            Whether one question about an image goes ahead of the others, to fill the server's prefix cache.
        judge_extra_body (`dict`, *optional*):
            Further fields of a request to the endpoint, as JSON.
        judge_batch_size (`int`, *optional*, defaults to `32`):
            Questions that a local judge answers at once.
    """

    judge: str = field(
        default="shapes",
        metadata={
            "help": "Who answers the questions: 'openai', 'server', 'transformers', 'policy', 'shapes' or a registered one."
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Model of the judge: its name at the endpoint, or the name or folder of a local one."},
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Endpoint of the judge 'openai', e.g. http://localhost:8000/v1, or of the judge 'server', e.g. "
            "http://localhost:8001."
        },
    )
    judge_max_concurrency: int = field(
        default=64, metadata={"help": "Questions that are with the judge's endpoint at once."}
    )
    judge_timeout: float = field(default=60.0, metadata={"help": "Seconds for one try of a question."})
    judge_max_retries: int = field(default=8, metadata={"help": "Further tries of a question."})
    judge_binary: bool = field(
        default=False, metadata={"help": "Take yes or no as they are, for endpoints without log-probabilities."}
    )
    judge_image_first: bool = field(
        default=False,
        metadata={
            "help": "Let one question about an image go ahead of the others, to fill the server's prefix cache."
        },
    )
    # As TRL types its dictionaries, which the parser takes for strings.
    judge_extra_body: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of a request to the judge's endpoint, as JSON."}
    )
    judge_batch_size: int = field(default=32, metadata={"help": "Questions that a local judge answers at once."})

    def __post_init__(self) -> None:
        if isinstance(self.judge_extra_body, str):
            try:
                self.judge_extra_body = json.loads(self.judge_extra_body)
            except json.JSONDecodeError as error:
                raise ValueError(f"judge_extra_body must be a JSON object, but is not JSON ({error})") from error
        if self.judge_extra_body is not None and not isinstance(self.judge_extra_body, dict):
            raise ValueError(f"judge_extra_body must be a JSON object, but is {self.judge_extra_body!r}")
