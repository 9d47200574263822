# SPDX-License-Identifier: Apache-2.0

"""
Client of an endpoint that speaks OpenAI's protocol: vLLM, SGLang, or OpenAI itself.

The retries are one policy of `tenacity` around the official client, whose own retries are switched off. Those have no
deadline for a whole try, so a server that answers byte by byte would hold a request for ever, and they accept an answer
that cannot be read as final.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from alphagrpo_ext.files import require_extra
from alphagrpo_ext.ranges import NonNegativeInt, PositiveFloat, PositiveInt, check_ranges


if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState


T = TypeVar("T")


class InvalidAnswerError(ValueError):
    """The endpoint answered, but not with what was asked for. Another try may succeed."""


@dataclass(eq=False)
class OpenAIEndpoint:
    """
    An OpenAI-compatible endpoint, reached through the official asynchronous client.

    A request is retried after a timeout, a refused or broken connection, a status code of 408, 409, 429 or at least 500,
    and an answer that is not what was asked for. The wait between two tries grows exponentially with jitter, or is the
    time that the server names. Any other 4xx status code is an error of the request and is raised at once.

    One object can be used from several event loops: each gets its own connection pool.

    Args:
        base_url (`str`, *optional*):
            URL of the endpoint, e.g. `"http://localhost:8000/v1"`. `None` takes the environment variable
            `OPENAI_BASE_URL`, or OpenAI itself.
        model (`str`, *optional*):
            Name of the model. A chat completion without it asks the only model that the endpoint serves.
        api_key (`str`, *optional*):
            Key of the endpoint. `None` takes the environment variable `OPENAI_API_KEY`. A local server often needs no key.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Largest number of concurrent requests.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try, from connecting to the last byte.
        max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a request.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    base_url: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_concurrency: PositiveInt = field(default=64, repr=False)
    timeout: PositiveFloat = field(default=60.0, repr=False)
    max_retries: NonNegativeInt = field(default=8, repr=False)

    def __post_init__(self) -> None:
        require_extra("openai", "judge")
        require_extra("tenacity", "judge")
        check_ranges(self)
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    async def request(self, attempt: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        """
        Make a request, with retries.

        Args:
            attempt (`Callable[[AsyncOpenAI], Awaitable[T]]`):
                Makes one try with the client. An [`InvalidAnswerError`] that it raises is retried.

        Raises:
            `openai.OpenAIError`, `TimeoutError` or [`InvalidAnswerError`]: The error of the last try.
        """
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        client, slots = self._connection()

        async def attempt_in_time() -> T:
            # A request that waits for its next try holds no slot.
            async with slots, asyncio.timeout(self.timeout):
                return await attempt(client)

        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            wait=_seconds_to_wait,
            stop=stop_after_attempt(self.max_retries + 1),
            reraise=True,
        )
        return await retrying(attempt_in_time)

    async def complete_chat(self, read: Callable[[ChatCompletion], T], **arguments: Any) -> T:
        """
        Ask for a chat completion and read the answer, with retries.

        Args:
            read (`Callable[[ChatCompletion], T]`):
                Extracts the result from the completion. An [`InvalidAnswerError`] that it raises is retried.
            arguments:
                Arguments of OpenAI's `chat.completions.create` except for `model`, e.g. `messages` and `max_tokens`.

        Raises:
            `openai.OpenAIError`, `TimeoutError` or [`InvalidAnswerError`]: The error of the last try.
        """
        from openai.types.chat import ChatCompletion

        async def attempt(client: AsyncOpenAI) -> T:
            completion = await client.chat.completions.create(model=await self._chat_model(client), **arguments)
            # The client returns a body that is not declared as JSON as a plain string.
            if not isinstance(completion, ChatCompletion) or not completion.choices:
                raise InvalidAnswerError(f"expected a chat completion, got {str(completion)[:200]!r}")
            return read(completion)

        return await self.request(attempt)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection[0].close()

    async def _chat_model(self, client: AsyncOpenAI) -> str:
        if self.model is None:
            names = [model.id async for model in client.models.list()]
            if len(names) != 1:
                raise ValueError(
                    f"{client.base_url} serves {len(names)} models ({', '.join(names)}): name one of them"
                )
            self.model = names[0]
        return self.model

    def _connection(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        from openai import AsyncOpenAI

        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            # The client insists on a key.
            api_key = self.api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
            client = AsyncOpenAI(base_url=self.base_url, api_key=api_key, timeout=self.timeout, max_retries=0)
            self._connections[loop] = (client, asyncio.Semaphore(self.max_concurrency))
        return self._connections[loop]


def parse_extra_body(argument: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    Return further fields of a request, from a command line's JSON or as they are.

    Raises:
        `ValueError`: If the value is not a JSON object. The message names the argument.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{argument} must be a JSON object, but is not JSON ({error})") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{argument} must be a JSON object, but is {value!r}")
    return value


def _is_transient(error: BaseException) -> bool:
    """Whether another try may succeed."""
    from openai import APIConnectionError, APIResponseValidationError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    faults = (TimeoutError, APIConnectionError, APIResponseValidationError, InvalidAnswerError, json.JSONDecodeError)
    return isinstance(error, faults)


def _seconds_to_wait(state: RetryCallState) -> float:
    """Exponential backoff with jitter, or the time in the header `Retry-After` if that is longer, up to a minute."""
    from tenacity import wait_exponential, wait_random

    backoff = wait_exponential(multiplier=0.5, max=4.0) + wait_random(0.0, 0.5)
    response = getattr(state.outcome.exception(), "response", None)
    try:
        retry_after = float(response.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        retry_after = 0.0
    return max(backoff(state), min(retry_after, 60.0))
