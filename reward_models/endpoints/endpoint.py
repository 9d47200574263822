# SPDX-License-Identifier: Apache-2.0

"""
Client of an endpoint that speaks OpenAI's protocol: vLLM, SGLang, or OpenAI itself.

The retries are one policy of `tenacity` around the official client, whose own retries are switched off. Those have no
deadline for a whole try, so a server that answers byte by byte would hold a request for ever, and they accept an answer
that cannot be read as final. Bodies are read by [`bounded_body`] and [`parse_body`].
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from alphagrpo_ext.files import require_extra
from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_ranges
from alphagrpo_ext.reward_client.addresses import is_header_text, is_http_address, without_password
from alphagrpo_ext.reward_client.compression import ACCEPTED_ENCODINGS
from alphagrpo_ext.reward_client.connection_variables import describe_unmade_client, proxy_hint
from alphagrpo_ext.reward_client.retry_after import retry_after_seconds
from reward_models.endpoints.answers import (
    ChatAnswers,
    ChatChoice,
    PaintedImages,
    ServedModels,
    bounded_body,
    parse_body,
)
from reward_models.endpoints.dialects import CHAT_OPTIONS, IMAGE_OPTIONS, Dialect, request_fields
from reward_models.endpoints.errors import (
    EndpointError,
    InvalidAnswerError,
    ThrottledWarning,
    innermost_message,
    listed_models,
    server_message,
    status_hint,
    status_message,
)


if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient
    from tenacity import RetryCallState


T = TypeVar("T")

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
_TRANSIENT_STATUS_CODES = (408, 409, 425, 429)
_REFUSED_FIELD_STATUS_CODES = (400, 422)
# Some servers answer with these where they should refuse a field.
_MISTAKEN_STATUS_CODES = (403, 413, 500)
# A list of models only improves a message.
_SECONDS_FOR_MODELS = 5.0


@dataclass(eq=False, repr=False)
class OpenAIEndpoint:
    """
    An OpenAI-compatible endpoint, reached through the official asynchronous client.

    A request is retried after a timeout, a refused or broken connection, a status code of 408, 409, 425, 429 or at least 500,
    and an answer that is not what was asked for. The wait between two tries grows exponentially with jitter, or is the
    time that the server names. Any other 4xx status code is an error of the request and is raised at once, but for a refused
    field that has another form: it is sent in that form from then on. See [`Dialect`].

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
        max_wait (`float`, *optional*, defaults to `300.0`):
            Seconds that a request waits in all because the server asks for it by `Retry-After`. A request that would have to
            wait longer fails at once. So a request ends after at most `(max_retries + 1) * timeout + max_wait` seconds and
            the back-off, which is at most 4.5 seconds per retry.
        max_answer_bytes (`int`, *optional*, defaults to `1048576`):
            Largest size of an answer, as it is sent and after decompression.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    base_url: str | None = None
    model: str | None = None
    api_key: str | None = None
    max_concurrency: PositiveInt = 64
    timeout: PositiveFloat = 60.0
    max_retries: NonNegativeInt = 8
    max_wait: NonNegativeFloat = 300.0
    max_answer_bytes: PositiveInt = 2**20

    def __post_init__(self) -> None:
        require_extra("openai", "judge")
        require_extra("tenacity", "judge")
        check_ranges(self)
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )
        self._dialect = Dialect()
        self._retry_log = ThrottledWarning(logger)

    def __repr__(self) -> str:
        url = without_password(self.base_url) if self.base_url else None
        return f"OpenAIEndpoint(base_url={url!r}, model={self.model!r})"

    async def complete_chat(
        self, read: Callable[[ChatChoice], T], extra_body: Mapping[str, Any] | None = None, **fields: Any
    ) -> T:
        """
        Ask for a chat completion and read the answer, with retries.

        Args:
            read (`Callable[[ChatChoice], T]`):
                Extracts the result from the first choice. An [`InvalidAnswerError`] that it raises is retried.
            extra_body (`Mapping[str, Any]`, *optional*):
                Further fields, which have precedence. `None` as a value leaves a field out.
            fields:
                Fields of OpenAI's chat completions, e.g. `messages` and `max_tokens`.

        Raises:
            [`EndpointError`]: If the endpoint refuses the request or cannot be reached.
            [`InvalidAnswerError`]: If the last answer could not be read.
        """

        async def send(client: AsyncOpenAI, sent: dict[str, Any]) -> bytes:
            model = sent.pop("model", None) or await self._chat_model(client)
            messages = sent.pop("messages")
            raw = await client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_body=sent
            )
            return raw.content

        async def read_body(body: bytes) -> T:
            return read(parse_body(body, ChatAnswers).choices[0])

        return await self._request("/chat/completions", send, read_body, request_fields(fields, extra_body))

    async def paint(
        self,
        read: Callable[[PaintedImages], T],
        prompt: str,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> T:
        """
        Ask for an image and read the answer, with retries.

        Args:
            read (`Callable[[PaintedImages], T]`):
                Extracts the result, in a thread. An [`InvalidAnswerError`] that it raises is retried.
            prompt (`str`):
                Text of the request.
            extra_body (`Mapping[str, Any]`, *optional*):
                Further fields, as in [`~OpenAIEndpoint.complete_chat`].
            fields:
                Fields of OpenAI's image generation, e.g. `size`.

        Raises:
            [`EndpointError`] or [`InvalidAnswerError`]: As in [`~OpenAIEndpoint.complete_chat`].
        """

        async def send(client: AsyncOpenAI, sent: dict[str, Any]) -> bytes:
            raw = await client.images.with_raw_response.generate(prompt=prompt, extra_body=sent)
            return raw.content

        async def read_body(body: bytes) -> T:
            # Megabytes take a while to parse and decode, which would block the event loop.
            return await asyncio.to_thread(lambda: read(parse_body(body, PaintedImages)))

        return await self._request(
            "/images/generations", send, read_body, request_fields({"model": self.model, **fields}, extra_body)
        )

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection[0].close()

    async def _request(
        self,
        route: str,
        send: Callable[[AsyncOpenAI, dict[str, Any]], Awaitable[bytes]],
        read: Callable[[bytes], Awaitable[T]],
        fields: dict[str, Any],
    ) -> T:
        """Send the fields to a route and read the body of the answer, with retries."""
        from openai import APIConnectionError, APIStatusError
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, stop_any

        client, slots = self._connection()
        options = IMAGE_OPTIONS if route.startswith("/images") else CHAT_OPTIONS
        waits = _Waits(self.max_wait)
        learned = Dialect()

        async def attempt() -> T:
            nonlocal learned
            # A request that waits for its next try holds no slot.
            async with slots, asyncio.timeout(self.timeout):
                while True:
                    dialect = self._dialect.union(learned)
                    sent = dialect.apply(fields)
                    try:
                        body = await send(client, dict(sent))
                    except APIStatusError as error:
                        learned = self._learned(dialect, sent, error, options)
                        continue
                    except APIConnectionError as error:
                        if isinstance(error.__cause__, InvalidAnswerError):
                            raise error.__cause__ from None
                        raise
                    # An answer shows that the endpoint had refused the field and not the rest of the request.
                    self._adopt(dialect)
                    return await read(body)

        retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=waits,
            stop=stop_any(stop_after_attempt(self.max_retries + 1), waits.are_too_long),
            before_sleep=lambda state: self._log_retry(route, state),
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except Exception as error:
            tries = retrying.statistics["attempt_number"]
            explained = await self._explained(error, client, route, tries, waits.refused)
            if explained is error:
                raise
            raise explained from error

    def _learned(
        self, dialect: Dialect, sent: dict[str, Any], error: APIStatusError, options: frozenset[str]
    ) -> Dialect:
        if error.status_code in _REFUSED_FIELD_STATUS_CODES + _MISTAKEN_STATUS_CODES:
            message, param = server_message(error.body)
            if error.status_code in _MISTAKEN_STATUS_CODES:
                learned = dialect.learn_stated_limit(sent, message, param)
            else:
                learned = dialect.learn(sent, message, param, options)
            if learned is not None:
                return learned
        raise error

    def _adopt(self, dialect: Dialect) -> None:
        known, self._dialect = self._dialect, self._dialect.union(dialect)
        if self._dialect != known:
            logger.warning("%r refused a field; requests are now sent %s", self, self._dialect.describe())

    def _log_retry(self, route: str, state: RetryCallState) -> None:
        error = state.outcome.exception()
        text = f"timeout after {self.timeout} s" if isinstance(error, TimeoutError) else _cause(error)
        self._retry_log.warn(self._without_key(f"{self!r}: a try of {route} failed and is repeated: {text}"))

    async def _explained(
        self, error: Exception, client: AsyncOpenAI, route: str, tries: int, refused_wait: float | None
    ) -> Exception:
        """The error that says what was asked, how often, what came back, and what to change."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        base_url = without_password(str(client.base_url)).rstrip("/")
        asked = _asked_url(error)
        address = base_url + route if asked is None else without_password(asked)
        times = "1 try" if tries == 1 else f"{tries} tries"
        wait = "" if refused_wait is None else f". It asks to wait {refused_wait:.0f} s, more than max_wait allows"
        if isinstance(error, APIStatusError):
            message = status_message(error)
            served = await self._other_models(client, error.status_code, message)
            hint = wait or status_hint(error.status_code, message, base_url, route, served)
            text = self._without_key(f"{address} answered {message} ({times}){hint}")
            return EndpointError(text, f"HTTP status {error.status_code}", error.status_code)
        if isinstance(error, TimeoutError | APITimeoutError):
            text = f"{address} did not answer in {self.timeout} s ({times}){proxy_hint(address)}"
            return EndpointError(text, "timeout")
        if isinstance(error, APIConnectionError):
            text = f"{address} cannot be reached ({times}): {innermost_message(error)}{proxy_hint(address)}"
            return EndpointError(self._without_key(text), type(error).__name__)
        if isinstance(error, InvalidAnswerError):
            # A web page is what another address of the server answers.
            hint = status_hint(404, "", base_url, route) if "is not JSON" in str(error) else ""
            return InvalidAnswerError(self._without_key(f"{address} ({times}): {error}{hint}"))
        return error

    async def _chat_model(self, client: AsyncOpenAI) -> str:
        if self.model is None:
            names = await _served_models(client)
            if len(names) != 1:
                raise EndpointError(
                    f"{without_password(str(client.base_url))} serves {len(names)} models ({listed_models(names)}): "
                    "name one of them",
                    "no model named",
                )
            self.model = names[0]
        return self.model

    async def _other_models(self, client: AsyncOpenAI, status_code: int, message: str) -> list[str] | None:
        """The models that the endpoint serves if that may be why it refused; `None` if not, or if it does not say."""
        if self.model is None or status_code not in (400, 404, 422) or "model" not in message.lower():
            return None
        try:
            async with asyncio.timeout(min(self.timeout, _SECONDS_FOR_MODELS)):
                names = await _served_models(client)
        except Exception:
            return None
        return None if self.model in names else names

    def _connection(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        from openai import AsyncOpenAI

        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            client = AsyncOpenAI(
                base_url=_checked_url((self.base_url or os.environ.get("OPENAI_BASE_URL", "")).strip() or OPENAI_URL),
                api_key=self._checked_key() or "EMPTY",  # The client insists on a key.
                timeout=self.timeout,
                max_retries=0,
                default_headers={"Accept-Encoding": ACCEPTED_ENCODINGS},
                http_client=_http_client(self.max_answer_bytes),
            )
            self._connections[loop] = (client, asyncio.Semaphore(self.max_concurrency))
        return self._connections[loop]

    def _key(self) -> str:
        return (self.api_key or os.environ.get("OPENAI_API_KEY") or "").strip()

    def _checked_key(self) -> str:
        key = self._key()
        if not is_header_text(key):
            source = "api_key" if self.api_key else "the environment variable OPENAI_API_KEY"
            raise EndpointError(
                f"{source} must consist of printable ASCII characters, since it is sent in a header", "malformed key"
            )
        return key

    def _without_key(self, text: str) -> str:
        """Servers repeat a wrong key in their messages, and messages may quote it as Python does."""
        key = self._key()
        for form in (key, repr(key)[1:-1]) if len(key) > 4 else ():
            text = text.replace(form, "***")
        return text


class _Waits:
    """Wait of tenacity: exponential backoff with jitter, or the time that the server names, up to a limit in all."""

    def __init__(self, max_wait: float) -> None:
        from tenacity import wait_exponential, wait_random

        self._backoff = wait_exponential(multiplier=0.5, max=4.0) + wait_random(0.0, 0.5)
        self._left = max_wait
        self.refused: float | None = None
        """The wait that the server named and that was too long."""

    def __call__(self, state: RetryCallState) -> float:
        backoff = self._backoff(state)
        named = requested_wait(state.outcome.exception())
        if named is None or named <= backoff:
            return backoff
        if named > self._left:
            self.refused = named
            return backoff
        self._left -= named
        # Without jitter, all requests that were turned away would come back at the same moment.
        return named + random.uniform(0.0, 0.5)

    def are_too_long(self, state: RetryCallState) -> bool:
        """Whether the server named a wait that is too long."""
        return self.refused is not None


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


async def _served_models(client: AsyncOpenAI) -> list[str]:
    try:
        raw = await client.models.with_raw_response.list()
        return [model.id for model in parse_body(raw.content, ServedModels).data]
    except InvalidAnswerError as error:
        error.address = f"{str(client.base_url).rstrip('/')}/models"
        raise


def _http_client(max_bytes: int) -> DefaultAsyncHttpxClient:
    from openai import DefaultAsyncHttpxClient

    try:
        return DefaultAsyncHttpxClient(event_hooks={"response": [bounded_body(max_bytes)]})
    except Exception as error:
        text = f"no endpoint can be asked: {describe_unmade_client(error)}"
        raise EndpointError(text, "malformed environment") from error


def _asked_url(error: Exception) -> str | None:
    """The address that was asked last, which a redirect may have named; `None` if the error does not say."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIConnectionError):
        # Its own request is the first one.
        with contextlib.suppress(AttributeError, RuntimeError):
            return str(error.__cause__.request.url)
    if isinstance(error, APIConnectionError | APIStatusError):
        return str(error.request.url)
    return getattr(error, "address", None)


def _checked_url(url: str) -> str:
    if not is_http_address(url):
        url = re.sub(r"[^/@]*@", "", url)
        advice = " (a port is a number from 1 to 65535)" if "://" in url else f": try http://{url}"
        raise EndpointError(
            f"the address of the endpoint must begin with the scheme http:// or https:// and a host, but is {url!r}{advice}",
            "malformed address",
        )
    return url


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        # Not a limit per minute: the account has no money left.
        if error.code == "insufficient_quota":
            return False
        return error.status_code in _TRANSIENT_STATUS_CODES or error.status_code >= 500
    return isinstance(error, TimeoutError | APIConnectionError | InvalidAnswerError)


def requested_wait(error: BaseException | None) -> float | None:
    """Seconds that the server asks to wait before another try, by `Retry-After` of the response that is the error."""
    response = getattr(error, "response", None)
    return None if response is None else retry_after_seconds(response.headers, time.time())


def _cause(error: BaseException) -> str:
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        return status_message(error)
    return innermost_message(error) if isinstance(error, APIConnectionError) else str(error)
