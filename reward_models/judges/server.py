# SPDX-License-Identifier: Apache-2.0

"""The judge behind a reward server: `python -m reward_models.server` on a machine with resources of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from alphagrpo_ext.openrlhf.environment import PluginConfig, variable
from alphagrpo_ext.reward_client.client import AsyncRewardClient, Label
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, Judge
from reward_models.prompts.questions import SEMANTIC_TAGS


# The server asks its judge the questions alone; prompt and tag only have to be well-formed.
PROMPT, TAG = "an image", SEMANTIC_TAGS[0]


@JUDGES.register("server")
class ServerJudge(Judge):
    """
    Has the judge of a reward server answer. Images travel as PNG, which loses nothing; one image is one request, with all its
    questions. If one of them has no answer, the server scores none of the image, and it has no reward here either. The server's
    key comes from the environment variable `ALPHAGRPO_SERVER_KEY`.

    Args:
        base_url (`str`):
            Where the server is, e.g. `"http://localhost:8001"`.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests that are with the server at once; it takes `max_queue` of them, of all processes together.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try of a request.
        max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a request.

    Raises:
        `ValueError`: If an argument is out of range.
        `ImportError`: If `httpx` is not installed.
    """

    def __init__(self, base_url: str, max_concurrency: int = 64, timeout: float = 60.0, max_retries: int = 8) -> None:
        config = PluginConfig(
            server_url=base_url.rstrip("/"),
            server_key=os.environ.get(variable("server_key"), "").strip() or None,
            timeout=timeout,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
        )
        self.client = AsyncRewardClient(config)

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> ServerJudge:
        if not args.judge_base_url:
            raise ValueError("the judge 'server' needs judge_base_url, e.g. http://localhost:8001")
        return cls(args.judge_base_url, args.judge_max_concurrency, args.judge_timeout, args.judge_max_retries)

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        label = Label(PROMPT, [{"question": question, "tag": TAG} for question in questions], [])
        (score,) = await self.client.score([image], [label])
        return list(score.semantic)

    async def aclose(self) -> None:
        await self.client.aclose()
