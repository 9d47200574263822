# SPDX-License-Identifier: Apache-2.0

"""The first question of a run to an endpoint, which fails in seconds and not after all retries."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections.abc import Awaitable, Callable

from reward_models.endpoints.endpoint import OpenAIEndpoint, is_transient, requested_wait
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError


PAUSES = (0.5, 1.0, 2.0)
"""Seconds between the tries of a question whose failure may pass. Where the server asks to wait longer, that is the pause."""


async def ask_in_time(endpoint: OpenAIEndpoint, ask: Callable[[], Awaitable[object]], seconds: float) -> None:
    """
    Ask until there is an answer, but not longer than some seconds. A refusal is final at once, and so is a wait that the server
    asks for and that does not fit into this time.

    Args:
        endpoint ([`OpenAIEndpoint`]): The endpoint. While it is asked, its tries are neither repeated nor longer than `seconds`.
        ask (`Callable[[], Awaitable]`): Asks through the endpoint.
        seconds (`float`): Time for all tries.

    Raises:
        `ValueError`: If the endpoint has neither an address nor a key.
        `RuntimeError`: If there is no answer. The message is that of the last error, how often it was asked, and what to change.
    """
    address = endpoint.base_url or os.environ.get("OPENAI_BASE_URL", "")
    key = endpoint.api_key or os.environ.get("OPENAI_API_KEY", "")
    if not address.strip() and not key.strip():
        raise ValueError(
            "there is neither an address nor a key: set judge_base_url (or the environment variable OPENAI_BASE_URL) to an "
            "endpoint, e.g. http://localhost:8000/v1, or OPENAI_API_KEY to a key of OpenAI"
        )
    end = time.monotonic() + seconds
    # The endpoint itself and not a copy, so that what it learns about the server is kept.
    max_retries, timeout, max_wait = endpoint.max_retries, endpoint.timeout, endpoint.max_wait
    try:
        # Waits are bounded here, by the time for all tries.
        endpoint.max_retries, endpoint.max_wait = 0, math.inf
        for num_asked in itertools.count(1):
            endpoint.timeout = max(round(end - time.monotonic(), 1), 0.1)
            try:
                await ask()
                return
            except Exception as error:
                cause = error.__cause__ or error
                wait = requested_wait(cause) if is_transient(cause) else None
                pause = _pause(num_asked, wait)
                if time.monotonic() + pause >= end or not is_transient(cause):
                    times = f" It was asked {num_asked} times." if num_asked > 1 else ""
                    message = f"{str(error).removesuffix('.')}.{_named(wait, seconds)}{times}{_advice(error)}"
                    # These say all that is known, and their own causes are hundreds of lines long.
                    is_explained = isinstance(error, EndpointError | InvalidAnswerError)
                    raise RuntimeError(message) from (None if is_explained else error)
            await asyncio.sleep(pause)
    finally:
        endpoint.max_retries, endpoint.timeout, endpoint.max_wait = max_retries, timeout, max_wait


def _pause(num_asked: int, wait: float | None) -> float:
    """Seconds before the next try; infinite without one. `wait` is what the server asks for."""
    if wait is None:
        return PAUSES[num_asked - 1] if num_asked <= len(PAUSES) else math.inf
    return max(wait, PAUSES[min(num_asked, len(PAUSES)) - 1])


def _named(wait: float | None, seconds: float) -> str:
    """Say which wait the server asks for, if any."""
    if wait is None:
        return ""
    return (
        f" It asks to wait {wait:.0f} s, which does not fit into the {seconds:g} s of this check: start again later."
    )


def _advice(error: Exception) -> str:
    """What to change where there was no answer at all. A refusal comes with its own advice."""
    if getattr(error, "status_code", None) is not None or isinstance(error, InvalidAnswerError):
        return ""
    if getattr(error, "reason", None) in ("malformed key", "malformed environment"):
        return ""
    if "WRONG_VERSION_NUMBER" in str(error):
        return " The server does not speak HTTPS: begin judge_base_url with http://."
    return " Check judge_base_url, and that the server runs and has loaded its model."
