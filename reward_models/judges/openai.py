# SPDX-License-Identifier: Apache-2.0

"""
A judge behind an OpenAI-compatible endpoint: a vision-language model that vLLM or SGLang serves, or OpenAI's own.

The judge never falls back from probabilities to a plain yes or no. An endpoint that loses its log-probabilities now and
then would change the scale of the rewards in the middle of a run. `judge_binary` asks for plain answers explicitly.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from reward_models.endpoints.endpoint import InvalidAnswerError, OpenAIEndpoint
from reward_models.endpoints.preflight import ask_in_time
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, PREFLIGHT_QUESTION, Judge
from reward_models.judges.yes_no import QUESTION_PROMPT, read_plain_answer, yes_probability


if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


logger = logging.getLogger(__name__)

_ImageQuestion = tuple[bytes, str]


@JUDGES.register("openai")
@dataclass(eq=False)
class OpenAIJudge(Judge):
    """
    Asks a vision-language model one question per request. P(yes) comes from the log-probabilities of the first token.

    Images are sent as PNG, which is lossless. The image precedes the question, so that a server with a prefix cache encodes
    it once. Equal questions about equal images are asked once, also if they are asked concurrently.

    Args:
        endpoint ([`OpenAIEndpoint`]):
            The endpoint. Its `max_concurrency` counts questions.
        binary (`bool`, *optional*, defaults to `False`):
            Whether to count the answer itself, as 0 or 1, for an endpoint without log-probabilities.
        image_first (`bool`, *optional*, defaults to `False`):
            Whether to wait for the answer to the first question about an image before asking the others. They then find the
            image in the server's prefix cache. If all were sent at the same time, all would miss it.
        cache_size (`int`, *optional*, defaults to `65536`):
            Answers that are cached. 0 caches none.
        extra_body (`dict`, *optional*):
            Further fields of a request, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}` for a model that
            otherwise thinks before it answers.
    """

    is_light = True

    endpoint: OpenAIEndpoint
    binary: bool = False
    image_first: bool = False
    cache_size: int = 65536
    extra_body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._answers: OrderedDict[_ImageQuestion, float] = OrderedDict()
        self._asking: dict[tuple[asyncio.AbstractEventLoop, _ImageQuestion], asyncio.Task] = {}

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> OpenAIJudge:
        endpoint = OpenAIEndpoint(
            args.judge_base_url,
            args.judge_model,
            max_concurrency=args.judge_max_concurrency,
            timeout=args.judge_timeout,
            max_retries=args.judge_max_retries,
        )
        return cls(endpoint, args.judge_binary, args.judge_image_first, extra_body=args.judge_extra_body)

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        # Compression takes milliseconds, which would block the event loop.
        png = await asyncio.to_thread(png_bytes, image)
        digest, url = hashlib.sha256(png).digest(), _png_url(png)
        first: list[float | None] = []
        if self.image_first:
            first = [await self._answer_one(url, digest, questions[0])]
        rest = await asyncio.gather(*(self._answer_one(url, digest, question) for question in questions[len(first) :]))
        return first + rest

    async def preflight(self, image: Image.Image, seconds: float) -> None:
        # Not through the cache, which a blank image has no place in.
        await ask_in_time(self.endpoint, lambda: self._ask(_png_url(png_bytes(image)), PREFLIGHT_QUESTION), seconds)

    async def aclose(self) -> None:
        loop = asyncio.get_running_loop()
        running = [task for (task_loop, _), task in self._asking.items() if task_loop is loop]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.endpoint.aclose()

    async def _answer_one(self, url: str, digest: bytes, question: str) -> float | None:
        key = (digest, question)
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key]
        slot = (asyncio.get_running_loop(), key)
        if slot not in self._asking:
            task = asyncio.create_task(self._ask(url, question))
            self._asking[slot] = task
            task.add_done_callback(lambda _: self._asking.pop(slot, None))
        try:
            # If this caller is cancelled, other callers still get the answer.
            probability = await asyncio.shield(self._asking[slot])
        except Exception as error:
            self.last_failure = f"{self.endpoint.base_url}: {type(error).__name__}: {error}"
            logger.warning("no answer to %r: %s: %s", question, type(error).__name__, str(error)[:300])
            return None
        self._answers[key] = probability
        while len(self._answers) > self.cache_size:
            self._answers.popitem(last=False)
        return probability

    async def _ask(self, url: str, question: str) -> float:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION_PROMPT.format(question=question)},
        ]
        if self.binary:
            # A quotation mark or a line break may precede the yes or no.
            read, settings = self._read_binary, {"max_tokens": 8}
        else:
            # OpenAI and vLLM list at most 20 candidates per token.
            read, settings = self._read_probability, {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return await self.endpoint.complete_chat(
            read,
            messages=[{"role": "user", "content": content}],
            temperature=0.0,
            extra_body=self.extra_body,
            **settings,
        )

    @staticmethod
    def _read_binary(completion: ChatCompletion) -> float:
        text = completion.choices[0].message.content or ""
        answer = read_plain_answer(text)
        if answer is None:
            raise InvalidAnswerError(f"the answer is neither yes nor no: {text[:100]!r}")
        return answer

    @staticmethod
    def _read_probability(completion: ChatCompletion) -> float:
        logprobs = completion.choices[0].logprobs
        if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
            raise InvalidAnswerError(
                "the endpoint sent no log-probabilities; if it never does, count its plain yes or no instead (judge_binary)"
            )
        candidates = logprobs.content[0].top_logprobs
        probability = yes_probability((candidate.token, candidate.logprob) for candidate in candidates)
        if probability is None:
            raise InvalidAnswerError(
                f"neither yes nor no is among the {len(candidates)} likeliest first tokens, e.g. "
                f"{candidates[0].token!r}: a model that thinks first must be told not to (judge_extra_body)"
            )
        return probability


def _png_url(png: bytes) -> str:
    """A PNG file as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG, without transparency."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
