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
from itertools import accumulate
from typing import Any

from PIL import Image

from alphagrpo_ext.images import to_rgb
from reward_models.endpoints.answers import ChatChoice
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError, ThrottledWarning
from reward_models.endpoints.kept_settings import kept_settings
from reward_models.endpoints.preflight import ask_in_time
from reward_models.endpoints.thoughts import begins_with_thought
from reward_models.judges.arguments import JudgeArguments
from reward_models.judges.base import JUDGES, PREFLIGHT_QUESTION, Judge
from reward_models.judges.yes_no import (
    DEFAULT_MIN_ANSWER_MASS,
    QUESTION_PROMPT,
    YesNo,
    answer_start,
    check_min_answer_mass,
    is_other_than_its_token,
    read_plain_answer,
    read_word,
    read_yes_no,
)


logger = logging.getLogger(__name__)

ANSWER_TOKENS = 16
"""Longest answer, in tokens. Tags, a box, a label or a line break may precede the yes or no."""

_NO_LOG_PROBS = "if it never does, count its plain yes or no instead (judge_binary)"
_THINKING = "a model that thinks first must be told not to (judge_extra_body)"

_ImageQuestion = tuple[bytes, str]


@JUDGES.register("openai")
class OpenAIJudge(Judge):
    """
    Asks a vision-language model one question per request. P(yes) comes from the log-probabilities of the first word.

    Images are sent as PNG, which is lossless. The image precedes the question, so that a server with a prefix cache encodes
    it once. Equal questions about equal images are asked once, also if they are asked concurrently.

    Args:
        endpoint ([`OpenAIEndpoint`] or `str`, *optional*):
            The endpoint, or its URL. Its `max_concurrency` counts questions.
        model (`str`, *optional*):
            Name of the model, for an endpoint that is given by its URL.
        base_url (`str`, *optional*):
            The URL of the endpoint by name, instead of `endpoint`.
        binary (`bool`, *optional*, defaults to `False`):
            Whether to count the answer itself, as 0 or 1, for an endpoint without log-probabilities.
        image_first (`bool`, *optional*, defaults to `False`):
            Whether to wait for the answer to the first question about an image before asking the others. They then find the
            image in the server's prefix cache. If all were sent at the same time, all would miss it.
        cache_size (`int`, *optional*, defaults to `65536`):
            Answers that are cached. 0 caches none.
        extra_body (`dict`, *optional*):
            Further fields of a request, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}` for a model that
            otherwise thinks before it answers. They have precedence, and `None` as a value leaves a field out, e.g.
            `{"temperature": None}`.
        min_answer_mass (`float`, *optional*, defaults to `0.5`):
            Smallest probability that yes and no must hold together, in [0, 1]. With less, the question is asked again.
        endpoint_settings:
            Further arguments of [`OpenAIEndpoint`], for one that is given by its URL.

    Raises:
        `ValueError`: If an argument is out of range.

    Example:

    ```python
    >>> judge = OpenAIJudge("http://localhost:8000/v1", "Qwen/Qwen3-VL-8B-Instruct", max_retries=2)
    ```
    """

    is_light = True

    def __init__(
        self,
        endpoint: OpenAIEndpoint | str | None = None,
        model: str | None = None,
        *,
        base_url: str | None = None,
        binary: bool = False,
        image_first: bool = False,
        cache_size: int = 65536,
        extra_body: dict[str, Any] | None = None,
        min_answer_mass: float = DEFAULT_MIN_ANSWER_MASS,
        **endpoint_settings: Any,
    ) -> None:
        if base_url is not None:
            if endpoint is not None:
                raise ValueError(f"endpoint and base_url={base_url!r} both say where the judge is: give one of them")
            endpoint = base_url
        if not isinstance(endpoint, OpenAIEndpoint):
            endpoint = OpenAIEndpoint(endpoint, model, **endpoint_settings)
        elif model is not None or endpoint_settings:
            settings = ", ".join([*(["model"] if model is not None else []), *endpoint_settings])
            raise ValueError(f"{settings} must be set on the endpoint, since an OpenAIEndpoint is given")
        check_min_answer_mass(min_answer_mass)
        self.endpoint = endpoint
        self.binary = binary
        self.image_first = image_first
        self.cache_size = cache_size
        self.extra_body = extra_body
        self.min_answer_mass = min_answer_mass
        self._failure_log = ThrottledWarning(logger)
        self._answers: OrderedDict[_ImageQuestion, YesNo] = OrderedDict()
        self._asking: dict[tuple[asyncio.AbstractEventLoop, _ImageQuestion], asyncio.Task] = {}

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> OpenAIJudge:
        return cls(
            args.judge_base_url,
            args.judge_model,
            binary=args.judge_binary,
            image_first=args.judge_image_first,
            extra_body=args.judge_extra_body,
            min_answer_mass=args.judge_min_answer_mass,
            max_concurrency=args.judge_max_concurrency,
            timeout=args.judge_timeout,
            max_retries=args.judge_max_retries,
            max_answer_bytes=args.judge_max_answer_bytes,
        )

    @property
    def run_settings(self) -> dict[str, Any]:
        return kept_settings(
            self.endpoint.model,
            self.extra_body,
            prompt=QUESTION_PROMPT,
            binary=self.binary,
            min_answer_mass=self.min_answer_mass,
        )

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
            return self._counted(self._answers[key])
        slot = (asyncio.get_running_loop(), key)
        if slot not in self._asking:
            task = asyncio.create_task(self._ask(url, question))
            self._asking[slot] = task
            task.add_done_callback(lambda _: self._asking.pop(slot, None))
        try:
            # If this caller is cancelled, other callers still get the answer.
            reading = await asyncio.shield(self._asking[slot])
        except Exception as error:
            self.last_failure = f"no answer to {question!r}: {type(error).__name__}: {str(error)[:1500]}"
            self._failure_log.warn(self.last_failure)
            return None
        self._answers[key] = reading
        while len(self._answers) > self.cache_size:
            self._answers.popitem(last=False)
        return self._counted(reading)

    def _counted(self, reading: YesNo) -> float:
        if not self.binary:
            self._count_mass(reading.mass)
        return reading.p_yes

    async def _ask(self, url: str, question: str) -> YesNo:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION_PROMPT.format(question=question)},
        ]
        if self.binary:
            read, settings = _read_binary, {}
        else:
            # OpenAI and vLLM list at most 20 candidates per token.
            read, settings = self._read_probability, {"logprobs": True, "top_logprobs": 20}
        try:
            return await self.endpoint.complete_chat(
                read,
                self.extra_body,
                messages=[{"role": "user", "content": content}],
                temperature=0.0,
                max_tokens=ANSWER_TOKENS,
                **settings,
            )
        except EndpointError as error:
            if error.status_code in (400, 403, 422) and "logprobs" in str(error) and not self.binary:
                hint = "an endpoint without log-probabilities needs judge_binary, which counts its plain yes or no"
                raise EndpointError(f"{error}; {hint}", error.reason, error.status_code) from error
            raise

    def _read_probability(self, choice: ChatChoice) -> YesNo:
        message = choice.message
        if not (message.content or "").strip() and (message.reasoning_content or message.reasoning):
            raise InvalidAnswerError(f"the answer is a thought without a text ({choice.finish_reason}); {_THINKING}")
        tokens = (choice.logprobs.content if choice.logprobs is not None else None) or []
        if not tokens:
            raise InvalidAnswerError(f"the endpoint sent no log-probabilities; {_NO_LOG_PROBS}")
        text = "".join(token.token for token in tokens)
        start = answer_start(text)
        # The token that holds the first character of the answer.
        ends = accumulate(len(token.token) for token in tokens)
        first = next((token for token, end in zip(tokens, ends, strict=True) if start < end), None)
        if first is None:
            raise InvalidAnswerError(f"the answer holds no word: {text[:100]!r}; {_THINKING}")
        if not first.top_logprobs:
            raise InvalidAnswerError(
                f"the endpoint sent no candidates (top_logprobs) for {first.token!r}; {_NO_LOG_PROBS}"
            )
        try:
            reading = read_yes_no(
                (candidate.token or "", candidate.logprob) for candidate in first.top_logprobs if candidate
            )
        except ValueError as error:
            raise InvalidAnswerError(f"{error}; an endpoint that sends no sound ones needs judge_binary") from error
        if begins_with_thought(text) or reading.answer(self.min_answer_mass) is None:
            raise InvalidAnswerError(
                f"yes and no hold {reading.mass:.2g} of the probability of the first word, but must hold "
                f"judge_min_answer_mass={self.min_answer_mass:g}: the answer is {text[:100]!r}; {_THINKING}"
            )
        # The text and not the tokens, which some engines list without the spaces between them.
        written = message.content or text
        if read_word(first.token) is not None and is_other_than_its_token(written):
            raise InvalidAnswerError(
                f"the answer begins with {first.token!r}, but is neither yes nor no: {written[:100]!r}"
            )
        return reading


def _read_binary(choice: ChatChoice) -> YesNo:
    text = choice.message.content or ""
    answer = read_plain_answer(text)
    if answer is None:
        reason = choice.message.refusal or choice.finish_reason
        cut = f"; it ended at {ANSWER_TOKENS} tokens: {_THINKING}" if reason == "length" else ""
        raise InvalidAnswerError(f"the answer is neither yes nor no: {text[:100]!r} ({reason}){cut}")
    return YesNo(answer, 1.0)


def _png_url(png: bytes) -> str:
    """A PNG file as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG, without transparency."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
