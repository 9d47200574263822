# SPDX-License-Identifier: Apache-2.0

"""The judge of a reward server (`python -m reward_models.server`), which may run on another machine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from PIL import Image

from alphagrpo_ext.reward_client.addresses import without_password
from alphagrpo_ext.reward_client.client import AsyncRewardClient, Label, RewardServerError
from alphagrpo_ext.reward_client.settings import ClientSettings
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, PREFLIGHT_QUESTION, Judge
from reward_models.prompts.tags import SEMANTIC_TAGS


# The server passes only the questions to its judge. Prompt and tag have to be valid, but do not matter.
_PROMPT, _TAG = "an image", SEMANTIC_TAGS[0]
_PREFLIGHT_RETRIES = 2
_ARGUMENTS = {
    "server_url": "judge_base_url",
    "timeout": "judge_timeout",
    "max_retries": "judge_max_retries",
    "max_concurrency": "judge_max_concurrency",
    "max_answer_bytes": "judge_max_answer_bytes",
}


class JudgeClientSettings(ClientSettings):
    """Settings of the client of a judge, which come from the judge's arguments."""

    @classmethod
    def setting_name(cls, field: str) -> str:
        return _ARGUMENTS.get(field) or super().setting_name(field)


@JUDGES.register("server")
class ServerJudge(Judge):
    """
    Asks the judge of a reward server. One request holds one image, as lossless PNG, and all questions about it. If one of
    them has no answer, the server does not score the image, and the image has no reward here either. The key of the server
    comes from the environment variable `ALPHAGRPO_SERVER_KEY`.

    Args:
        base_url (`str`):
            URL of the server, e.g. `"http://localhost:8001"`.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Largest number of concurrent requests. The server accepts `max_queue` requests from all processes together.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try of a request.
        max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a request.
        max_answer_bytes (`int`, *optional*, defaults to `1048576`):
            Largest size of an answer, as it is sent and after decompression.

    Raises:
        `ValueError`: If an argument is out of range.
        `ImportError`: If `httpx` is not installed.
    """

    is_light = True

    def __init__(
        self,
        base_url: str,
        max_concurrency: int = 64,
        timeout: float = 60.0,
        max_retries: int = 8,
        max_answer_bytes: int = 2**20,
    ) -> None:
        config = JudgeClientSettings(
            server_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
            max_answer_bytes=max_answer_bytes,
        )
        self.client = AsyncRewardClient(config)

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> ServerJudge:
        if not args.judge_base_url:
            raise ValueError("the judge 'server' needs judge_base_url, e.g. http://localhost:8001")
        return cls(
            args.judge_base_url,
            args.judge_max_concurrency,
            args.judge_timeout,
            args.judge_max_retries,
            args.judge_max_answer_bytes,
        )

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        label = Label(_PROMPT, [{"question": question, "tag": _TAG} for question in questions], [])
        try:
            (score,) = await self.client.score([image], [label])
        except RewardServerError as error:
            self.last_failure = str(error)
            raise
        return list(score.semantic)

    async def preflight(self, image: Image.Image, seconds: float) -> None:
        # Few tries, so that the time is enough for all of them where the server refuses or is out of reach.
        settings = self.client.config.model_copy(update={"timeout": seconds, "max_retries": _PREFLIGHT_RETRIES})
        client = AsyncRewardClient(settings, max_seconds=seconds)
        label = Label(_PROMPT, [{"question": PREFLIGHT_QUESTION, "tag": _TAG}], [])
        try:
            async with asyncio.timeout(seconds):
                await client.score([image], [label])
        except TimeoutError as error:
            raise RewardServerError(
                f"the reward server at {without_password(settings.server_url)} (judge_base_url) did not answer in {seconds} s"
            ) from error
        finally:
            await client.aclose()

    async def aclose(self) -> None:
        await self.client.aclose()
