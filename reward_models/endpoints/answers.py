# SPDX-License-Identifier: Apache-2.0

"""
What an endpoint sends, read strictly: the size of a body is bounded before and after decompression, and fields that are read
have the types of OpenAI's protocol. The official client bounds nothing and checks no type.

A value that may not matter, such as the log-probability of a token that is neither yes nor no, makes no answer unreadable. If
it has another type, it is read as a missing one, which is refused where it does matter.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterable, Callable, Coroutine
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from alphagrpo_ext.reward_client.compression import DecompressionError, OversizedBodyError, decompress
from alphagrpo_ext.reward_client.json_values import has_more_values
from alphagrpo_ext.reward_client.server_texts import shortened
from reward_models.endpoints.errors import InvalidAnswerError, describe_mismatch, server_message


MAX_VALUES = 100_000
"""Largest number of values in an answer. Parsed, a list of empty lists takes 30 times the memory of its text."""


class EndpointAnswer(BaseModel):
    """Base class of what an endpoint sends. Types are strict; fields that nobody reads are ignored."""

    model_config = ConfigDict(strict=True)


def _missing_if_mistyped(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


def _shortened(text: str | None) -> str | None:
    return None if text is None else shortened(text)


_Text = Annotated[str | None, WrapValidator(_missing_if_mistyped)]
_ShownText = Annotated[str | None, AfterValidator(_shortened), WrapValidator(_missing_if_mistyped)]
_Number = Annotated[float | None, WrapValidator(_missing_if_mistyped)]


class Candidate(EndpointAnswer):
    """A token and its log-probability. Both may be missing, and the number may be NaN or infinite."""

    token: _Text = None
    logprob: _Number = None


class AnswerToken(EndpointAnswer):
    """A token of an answer, with the likeliest candidates for its place."""

    token: str
    top_logprobs: list[Annotated[Candidate | None, WrapValidator(_missing_if_mistyped)]] | None = None


class LogProbabilities(EndpointAnswer):
    """Tokens of an answer."""

    content: list[AnswerToken] | None = None


def _joined_parts(content: Any) -> Any:
    """The text of a message, which some servers send in parts, as requests do. Other parts hold thoughts or images."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in parts if isinstance(text, str))


class ChatMessage(EndpointAnswer):
    """Text of an answer. Servers that take a thought out of it send that in a field of its own, which has two names."""

    content: Annotated[str | None, BeforeValidator(_joined_parts)] = None
    refusal: _ShownText = None
    reasoning_content: Any = None
    reasoning: Any = None


class ChatChoice(EndpointAnswer):
    """One answer of a chat completion."""

    message: ChatMessage
    finish_reason: _ShownText = None
    logprobs: LogProbabilities | None = None


class ChatAnswers(EndpointAnswer):
    """Body of a chat completion."""

    choices: list[ChatChoice] = Field(min_length=1)


class PaintedImage(EndpointAnswer):
    """An image, in base64."""

    b64_json: str | None = None


class PaintedImages(EndpointAnswer):
    """Body of the answer of an images endpoint."""

    data: list[PaintedImage] | None = None


class ServedModel(EndpointAnswer):
    """A model that an endpoint serves."""

    id: str


class ServedModels(EndpointAnswer):
    """Body of the list of models."""

    data: list[ServedModel]


AnswerBody = TypeVar("AnswerBody", bound=EndpointAnswer)


def parse_body(body: bytes, answer_type: type[AnswerBody]) -> AnswerBody:
    """
    Read the body of an answer.

    Raises:
        [`InvalidAnswerError`]: If it is not UTF-8, not JSON, or a field has another type. The message names it.
    """
    try:
        value = json.loads(body)
    except UnicodeDecodeError as error:
        raise InvalidAnswerError(f"the answer is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidAnswerError(f"the answer is not JSON: {body[:200]!r}") from error
    try:
        return answer_type.model_validate(value)
    except ValidationError as error:
        if isinstance(value, dict) and value.get("error"):
            raise InvalidAnswerError(f"the answer is an error: {server_message(value)[0]}") from error
        raise InvalidAnswerError(describe_mismatch(error)) from error


def bounded_body(max_bytes: int) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """
    Make a hook of httpx that reads the body of a response while bounding it.

    Args:
        max_bytes (`int`): Largest size of a body, as it is sent and after decompression.

    Returns:
        `Callable`: A response hook of an `httpx.AsyncClient`. It raises [`InvalidAnswerError`] for a body that is larger, that
        holds more than [`MAX_VALUES`], that is damaged, or that is compressed in a way that was not asked for.
    """

    async def read(response: Any) -> None:
        declared = response.headers.get("content-length", "")
        if re.fullmatch("[0-9]{1,20}", declared) and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        body = await _read_bounded(response.stream, max_bytes)
        if encoding := response.headers.get("content-encoding"):
            # Megabytes take milliseconds, which would block the event loop.
            body = await asyncio.to_thread(_decompress, body, encoding, max_bytes)
        if has_more_values(body, MAX_VALUES):
            raise InvalidAnswerError(f"the answer holds more than {MAX_VALUES} values")
        response.headers.pop("content-encoding", None)
        # The stream of a response that is complete, in whichever generation of httpx the official client uses.
        complete = type(response)(response.status_code, content=body).stream
        await response.stream.aclose()
        response.stream = complete

    async def hook(response: Any) -> None:
        try:
            await read(response)
        except InvalidAnswerError as error:
            # A redirect may have led to another address than the one asked.
            error.address = str(response.request.url)
            raise

    return hook


async def _read_bounded(stream: AsyncIterable[bytes], max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in stream:
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    try:
        return decompress(body, encoding, max_bytes)
    except OversizedBodyError as error:
        raise _too_large(max_bytes) from error
    except DecompressionError as error:
        raise InvalidAnswerError(f"the answer {error}") from error


def _too_large(max_bytes: int) -> InvalidAnswerError:
    return InvalidAnswerError(f"the answer is larger than {max_bytes} bytes (max_answer_bytes)")
