# SPDX-License-Identifier: Apache-2.0

"""
Bodies of requests: their size in bytes, and the number of values that their JSON holds.

The values are counted before anything is parsed; see [`~alphagrpo_ext.reward_client.json_values`].
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException, Request
from starlette.types import Message

from alphagrpo_ext.reward_client.json_values import has_more_values


class BoundedRequest(Request):
    """
    A request whose JSON is parsed only if it holds few enough values.

    Args:
        scope, receive: As for Starlette's `Request`.
        max_values (`int`): Largest number of values.
    """

    def __init__(self, scope: Any, receive: Any, max_values: int) -> None:
        super().__init__(scope, receive)
        self._max_values = max_values

    async def json(self) -> Any:
        """
        Parse the body.

        Raises:
            `fastapi.HTTPException`: If it is not in UTF-8 (422), or holds too many values (413).
            `ValueError`: If it is not JSON.
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
        return json.loads(body)


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

    bounded = BoundedRequest(request.scope, receive, max_values)
    await bounded.body()
    return bounded
