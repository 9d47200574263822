# SPDX-License-Identifier: Apache-2.0

"""Errors of an endpoint, in words that say what was asked, what came back, and what to change."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from alphagrpo_ext.reward_client.server_texts import shortened


if TYPE_CHECKING:
    from openai import APIStatusError


class InvalidAnswerError(ValueError):
    """
    The endpoint answered, but not with what was asked for. Another try may succeed.

    Attributes:
        address (`str`, *optional*): Where the answer came from. `None` stands for the route of the request.
    """

    address: str | None = None


class EndpointError(RuntimeError):
    """
    A request to an endpoint failed for good.

    Args:
        message (`str`): What was asked, how often, what came back, and what to change.
        reason (`str`): Kind of the failure in a few words, the same for all failures of the kind.
        status_code (`int`, *optional*): Status code of the answer; `None` if there was none.
    """

    def __init__(self, message: str, reason: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status_code = status_code


@dataclass
class ThrottledWarning:
    """
    Logs a warning at most once per minute. The next one says how many were left out.

    Args:
        logger (`logging.Logger`): The logger.
        seconds (`float`, *optional*, defaults to `60.0`): Smallest time between two warnings.
    """

    logger: logging.Logger
    seconds: float = 60.0
    _num_left_out: int = field(default=0, init=False)
    _silent_until: float = field(default=float("-inf"), init=False)

    def warn(self, text: str) -> None:
        """Log a text, or count it."""
        now = time.monotonic()
        if now < self._silent_until:
            self._num_left_out += 1
            return
        count = f" ({self._num_left_out} more since the last such warning)" if self._num_left_out else ""
        self.logger.warning("%s%s", text, count)
        self._num_left_out, self._silent_until = 0, now + self.seconds


def describe_mismatch(error: ValidationError) -> str:
    """Say which field of an answer is not as it must be."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"the answer, field '{place}': {first['msg']}, but is {ascii(first['input'])[:200]}"


def server_message(body: Any) -> tuple[str, str | None]:
    """
    Return the message in the body of a refusal, and the name of the parameter that it is about.

    Args:
        body (`Any`): The body as parsed JSON or as text. Servers nest the message in various ways.

    Returns:
        `tuple[str, str | None]`: The message, at most 500 characters long, and the parameter if the server names one.
    """
    if isinstance(body, list) and body:
        parts = [server_message(part) for part in body[:8]]
        return shortened("; ".join(text for text, _ in parts)), next((name for _, name in parts if name), None)
    if not isinstance(body, dict):
        return shortened(str(body or "")), None
    # The body of a FastAPI server names the place of an error as a list. What it repeats of the request is left out.
    place = body.get("loc")
    if isinstance(place, list | tuple) and place:
        return shortened(f"{'.'.join(map(str, place))}: {body.get('msg')}"), str(place[-1])
    param = body.get("param")
    for name in ("error", "message", "detail", "msg"):
        if body.get(name):
            text, inner = server_message(body[name])
            return text, param if isinstance(param, str) and param else inner
    return shortened(str(body)), None


def status_hint(
    status_code: int, message: str, base_url: str, route: str, served_models: list[str] | None = None
) -> str:
    """
    Say what to change after a refusal, or nothing.

    Args:
        status_code (`int`): Status code of the refusal.
        message (`str`): The server's message.
        base_url (`str`): The address of the endpoint.
        route (`str`): The route that was asked, e.g. `"/chat/completions"`.
        served_models (`list[str]`, *optional*): Models that the endpoint serves if the asked one is not among them.
    """
    if served_models is not None:
        return f". It serves {listed_models(served_models) or 'no model'}: name one of them"
    if status_code in (401, 403):
        return ". Set the environment variable OPENAI_API_KEY to a key of this endpoint"
    if status_code in (404, 405) and "/v1" not in urlsplit(base_url).path:
        return f". The address has no /v1: try {base_url.rstrip('/')}/v1"
    if status_code in (404, 405) and "model" not in message.lower():
        return f". Check the address: it must end where {route} begins"
    return ""


def listed_models(names: Sequence[str]) -> str:
    """The first 20 names of models that an endpoint serves, each shortened."""
    return ", ".join(shortened(name, 100) for name in names[:20])


def status_message(error: APIStatusError) -> str:
    """Return what the server said with a status code."""
    message = server_message(error.body)[0] or shortened(error.response.text) or error.response.reason_phrase
    return f"{error.status_code} {message}".strip()


def innermost_message(error: BaseException) -> str:
    """Describe a failed connection by the error that caused it. The official client says only `Connection error.`"""
    texts = []
    current: BaseException | None = error.__cause__ or error.__context__ or error
    while current is not None and len(texts) < 8:
        text = f"{type(current).__name__}: {current}".strip().removesuffix(":")
        if text not in texts:
            texts.append(text)
        current = current.__cause__ or current.__context__
    # Between the first and the last are copies of either.
    return texts[0] if len(texts) == 1 else f"{texts[0]} ({texts[-1]})"
