# SPDX-License-Identifier: Apache-2.0

"""What a request must pass before its body is parsed: the key, a place in the queue, the deadline and the size of the body."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import Gauge
from starlette.authentication import AuthenticationBackend, AuthenticationError
from starlette.requests import ClientDisconnect, HTTPConnection

from reward_models.server.arguments import ServerArguments
from reward_models.server.bodies import read_body
from reward_models.server.request_log import CLIENT_CLOSED_REQUEST


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class KeyCheck(AuthenticationBackend):
    """
    Backend of Starlette's `AuthenticationMiddleware` that requires a key for every path except `/health`. A dependency of
    FastAPI would run only after the body has been read.

    Args:
        key (`str`): The key.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def authenticate(self, conn: HTTPConnection) -> None:
        if conn.scope["path"] == "/health":
            return
        scheme, _, given = conn.headers.get("authorization", "").partition(" ")
        # As bytes, because `compare_digest` takes strings of ASCII only. Starlette decodes headers as Latin-1.
        is_right = secrets.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not is_right:
            raise AuthenticationError("this server needs its key: send the header 'Authorization: Bearer <key>'")


def refuse_without_key(_: HTTPConnection, error: AuthenticationError) -> JSONResponse:
    """Answer a request that has no key or a wrong one."""
    return JSONResponse({"detail": str(error)}, 401, {"www-authenticate": "Bearer"})


class RequestQueue:
    """
    Runs requests within the limits of a server: a bounded queue (429), a deadline (504) and a bounded body (413).

    Args:
        args ([`ServerArguments`]): The limits.
        length (`prometheus_client.Gauge`): Shows the number of requests that run or wait.
    """

    def __init__(self, args: ServerArguments, length: Gauge) -> None:
        self.args = args
        self.length = length
        self._num_requests = 0

    async def run(self, request: Request, handle: Handler) -> Response:
        """
        Read the body of a request and handle it.

        Raises:
            `fastapi.HTTPException`: If the request exceeds a limit.
        """
        if self._num_requests >= self.args.max_queue:
            raise HTTPException(
                429,
                f"the server already has {self.args.max_queue} requests, which is its max_queue: try again later",
                {"retry-after": "1"},
            )
        self._num_requests += 1
        self.length.inc()
        try:
            async with asyncio.timeout(self.args.request_timeout) as deadline:
                bounded = await read_body(request, self.args.max_body_bytes, self.args.max_body_values)
                return await handle(bounded)
        except ClientDisconnect:
            # Nobody receives this answer, but the log shows its status.
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise HTTPException(
                504,
                f"no answer within {self.args.request_timeout:g} s, which is the server's request_timeout: send fewer items "
                "per request",
            ) from error
        finally:
            self._num_requests -= 1
            self.length.dec()


class QueuedRoute(APIRoute):
    """A route whose requests pass the [`RequestQueue`] in `app.state.queue`."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_in_queue(request: Request) -> Response:
            return await request.app.state.queue.run(request, handle)

        return handle_in_queue
