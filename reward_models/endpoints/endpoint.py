# SPDX-License-Identifier: Apache-2.0

"""An endpoint that speaks OpenAI's protocol (vLLM, SGLang, OpenAI itself), asked patiently."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from alphagrpo_ext.files import require_extra


if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from tenacity import RetryCallState


T = TypeVar("T")

RETRIED_STATUS_CODES = (408, 409, 429)
"""Beside those from 500 on."""
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 4.0
"""Seconds; the server may ask for more."""
MAX_RETRY_AFTER = 60.0


class InvalidAnswerError(ValueError):
    """The endpoint answered, but not with what was asked for; another try may."""


class OpenAIEndpoint:
    """
    An OpenAI-compatible endpoint, by the official asynchronous client.

    A request is tried again after timeouts, refused and broken connections, the status codes 408, 409, 429 and from 500
    on, and answers that are not what was asked for, with exponential back-off and jitter, or after the time that the
    server names. Any other error of the 4xx kind is the request's own fault and is raised at once.

    It may be used from several event loops: each gets a connection pool of its own.

    Args:
        base_url (`str`, *optional*):
            Where the endpoint is, e.g. `"http://localhost:8000/v1"`. `None` takes the environment variable
            `OPENAI_BASE_URL`, or OpenAI itself.
        model (`str`, *optional*):
            Name of the model.
        api_key (`str`, *optional*):
            Key of the endpoint. `None` takes the environment variable `OPENAI_API_KEY`; servers of one's own often need
            none.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try, from connecting to the last byte.
        max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a request.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 60.0,
        max_retries: int = 8,
    ) -> None:
        require_extra("openai", "judge")
        require_extra("tenacity", "judge")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, but is {max_concurrency}")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, but is {timeout}")
        if max_retries < 0:
            raise ValueError(f"max_retries must not be negative, but is {max_retries}")
        self.base_url = base_url
        self.model = model
        self._api_key = api_key
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.base_url!r}, model={self.model!r})"

    async def request(self, attempt: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        """
        Make a request until it succeeds, has failed too often, or cannot succeed.

        Args:
            attempt (`Callable[[AsyncOpenAI], Awaitable[T]]`):
                One try, with the client. What it raises as [`InvalidAnswerError`] counts as a fault of the endpoint.

        Raises:
            `openai.OpenAIError`, `TimeoutError` or [`InvalidAnswerError`]: The error of the last try.
        """
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        client, slots = self._connection()
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=_seconds_to_wait,
            stop=stop_after_attempt(self.max_retries + 1),
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                # A request that waits for its next try holds no slot.
                async with slots, asyncio.timeout(self.timeout):
                    result = await attempt(client)
        return result

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection[0].close()

    def _connection(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        from openai import AsyncOpenAI

        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            client = AsyncOpenAI(
                base_url=self.base_url,
                # The client insists on a key.
                api_key=self._api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY",
                timeout=self.timeout,
                # Its own retries know neither a deadline for a whole try nor answers that cannot be read.
                max_retries=0,
            )
            self._connections[loop] = (client, asyncio.Semaphore(self.max_concurrency))
        return self._connections[loop]


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed."""
    from openai import APIConnectionError, APIResponseValidationError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code in RETRIED_STATUS_CODES or error.status_code >= 500
    faults = (TimeoutError, APIConnectionError, APIResponseValidationError, InvalidAnswerError, json.JSONDecodeError)
    return isinstance(error, faults)


def _seconds_to_wait(state: RetryCallState) -> float:
    response = getattr(state.outcome.exception(), "response", None)
    try:
        asked_for = float(response.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        asked_for = 0.0
    backoff = min(INITIAL_BACKOFF * 2 ** (state.attempt_number - 1), MAX_BACKOFF) + random.uniform(0, INITIAL_BACKOFF)
    return max(backoff, min(asked_for, MAX_RETRY_AFTER))
