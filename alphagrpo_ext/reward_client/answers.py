# SPDX-License-Identifier: Apache-2.0

"""Answers of the reward server, read with bounds on their size, as they are sent and after decompression, and on time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from alphagrpo_ext.reward_client.addresses import without_password
from alphagrpo_ext.reward_client.compression import DecompressionError, OversizedBodyError, decompress
from alphagrpo_ext.reward_client.settings import ClientSettings


if TYPE_CHECKING:
    import httpx


class RewardServerError(RuntimeError):
    """The reward server did not return what was asked for. The message says why and what to do."""


class UnreadableAnswerError(RewardServerError):
    """An answer is damaged or cut off. Another try may succeed."""


class BoundedAnswer:
    """
    The body of an answer while it arrives.

    Args:
        response (`httpx.Response`): The answer, of which only the head has been read.
        config ([`ClientSettings`]): Its `max_answer_bytes` is the bound.
    """

    def __init__(self, response: httpx.Response, config: ClientSettings) -> None:
        self._response = response
        self._config = config
        self._body = bytearray()

    def add(self, part: bytes) -> None:
        """
        Add a part of the body.

        Raises:
            [`RewardServerError`]: If the body is too large.
        """
        self._body += part
        if len(self._body) > self._config.max_answer_bytes:
            raise self._too_large()

    def complete(self) -> httpx.Response:
        """
        Return the answer with its decompressed body.

        Raises:
            [`UnreadableAnswerError`]: If the body cannot be decompressed.
            [`RewardServerError`]: If it is too large.
        """
        import httpx

        encoding = self._response.headers.get("content-encoding", "")
        try:
            body = decompress(bytes(self._body), encoding, self._config.max_answer_bytes)
        except OversizedBodyError as error:
            raise self._too_large() from error
        except DecompressionError as error:
            raise UnreadableAnswerError(
                f"{without_password(str(self._response.url))} sent an answer that {error}: a proxy may be in between"
            ) from error
        headers = [(name, value) for name, value in self._response.headers.items() if name not in _BODY_HEADERS]
        return httpx.Response(
            self._response.status_code, headers=headers, content=body, request=self._response.request
        )

    def _too_large(self) -> RewardServerError:
        return RewardServerError(
            f"{without_password(str(self._response.url))} sent an answer (status {self._response.status_code}) of more than "
            f"{self._config.max_answer_bytes} bytes: raise {self._config.setting_name('max_answer_bytes')}, or ask for fewer images at once"
        )


_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


async def send(http: httpx.AsyncClient, config: ClientSettings, path: str, body: dict[str, Any]) -> httpx.Response:
    """
    Send a request and read its answer.

    Args:
        http (`httpx.AsyncClient`): The connections.
        config ([`ClientSettings`]): The bounds. `timeout` is that of the whole try, from connecting to the last byte.
        path (`str`): The route.
        body (`dict[str, Any]`): The body, which is sent as JSON.

    Raises:
        `httpx.TransportError`: If there is no answer in time.
        [`RewardServerError`]: If the answer is too large or cannot be decompressed.
    """
    import httpx

    try:
        # The limits of httpx begin anew at every byte, also at those of a header.
        async with asyncio.timeout(config.timeout), http.stream("POST", path, json=body) as response:
            answer = BoundedAnswer(response, config)
            async for part in response.aiter_raw():
                answer.add(part)
    except TimeoutError as error:
        raise httpx.ReadTimeout("the answer arrives too slowly") from error
    # Megabytes take milliseconds, which would block the event loop.
    return await asyncio.to_thread(answer.complete)
