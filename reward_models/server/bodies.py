# SPDX-License-Identifier: Apache-2.0

"""
Bodies of requests: their size in bytes and in memory, and the number of values that their JSON holds.

Both are counted before anything is parsed; see [`~alphagrpo_ext.reward_client.json_values`].
"""

from __future__ import annotations

import codecs
import json
from typing import Any

from fastapi import HTTPException, Request
from pydantic_core import from_json
from starlette.types import Message

from alphagrpo_ext.reward_client.json_values import has_more_values, size_in_memory


class BoundedRequest(Request):
    """
    A request whose JSON is parsed only if it holds few enough values, in strings that take little memory.

    Args:
        scope, receive: As for Starlette's `Request`.
        max_bytes (`int`): Largest size in memory, where each character of a string that is not ASCII counts four bytes.
        max_values (`int`): Largest number of values.
    """

    def __init__(self, scope: Any, receive: Any, max_bytes: int, max_values: int) -> None:
        super().__init__(scope, receive)
        self._max_bytes = max_bytes
        self._max_values = max_values

    async def json(self) -> Any:
        """
        Parse the body.

        Raises:
            `fastapi.HTTPException`: If it is not in UTF-8 (422), or holds too many values or takes too much memory (413).
            `fastapi.HTTPException` or `ValueError`: If it is not JSON.
        """
        body = await self.body()
        if not json.detect_encoding(body).startswith("utf-8"):
            # In other encodings, bytes of a text look like quotation marks.
            raise HTTPException(422, "the body is not in UTF-8, in which JSON is sent")
        if has_more_values(body, self._max_values):
            raise HTTPException(
                413,
                f"the body has more than {self._max_values} values, which is more than max_items and max_questions of the "
                "server need: send fewer items, and only their fields",
            )
        if size_in_memory(body) > self._max_bytes:
            raise HTTPException(
                413,
                f"the body takes more than {self._max_bytes} bytes in memory, which is the server's max_body_bytes, because each "
                "character of a text that is not ASCII counts four: send fewer items",
            )
        if body.isascii():
            return json.loads(body)
        try:
            # `json.loads` would decode the whole body first, and one emoji in it makes four bytes of every byte.
            return from_json(body.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            raise HTTPException(422, f"the body is not JSON ({error})") from error


async def read_body(request: Request, max_bytes: int, max_values: int) -> BoundedRequest:
    """
    Return the request with its body in memory. A body is refused by its declared length, or as soon as it is too large.

    Raises:
        `fastapi.HTTPException`: If it has more than `max_bytes` bytes (413).
        `starlette.requests.ClientDisconnect`: If the client goes away.
    """
    too_large = HTTPException(
        413, f"the body has more than {max_bytes} bytes, which is the server's max_body_bytes: send fewer items"
    )
    # The HTTP parser accepts digits only.
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    # One buffer, because a list of parts takes many times their size if they are small.
    buffer = bytearray()
    async for part in request.stream():
        if len(buffer) + len(part) > max_bytes:
            raise too_large
        buffer += part
    body = bytes(buffer)
    del buffer

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    bounded = BoundedRequest(request.scope, receive, max_bytes, max_values)
    await bounded.body()
    return bounded
