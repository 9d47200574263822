# SPDX-License-Identifier: Apache-2.0

"""What stands before the routes of the reward server: log and metrics, key, queue, deadline, and size of the body."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger("reward_models.server.__main__")

CLIENT_CLOSED_REQUEST = 499
"""Logged where the client went away before there was an answer; nothing is sent."""
MAX_LOGGED_PATH = 200


class ServerMetrics:
    """
    Prometheus metrics of one server, in a registry of their own, so that a process may hold several servers.

    Args:
        paths (`Sequence[str]`): Paths that have series of their own; any other counts as `"other"`.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "alphagrpo_requests", "Requests that were answered.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "alphagrpo_request_seconds",
            "Seconds from the first byte of a request to its answer.",
            ["path"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
        )
        self.images_scored = Counter("alphagrpo_images_scored", "Images that have a score.", registry=self.registry)
        self.images_failed = Counter(
            "alphagrpo_images_failed", "Images that could not be scored or painted.", registry=self.registry
        )
        self.queue_length = Gauge(
            "alphagrpo_queue_length", "Requests that are processed or wait.", registry=self.registry
        )

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        # Strangers choose paths, and every label value costs memory for good.
        path = path if path in self.paths else "other"
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)


class RequestLog:
    """
    Logs every request as one line of JSON, and counts it. Bodies, headers and query strings are not logged.

    Args:
        app (`ASGIApp`): What answers.
        metrics ([`ServerMetrics`]): What counts.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = CLIENT_CLOSED_REQUEST
        state = scope.setdefault("state", {})
        start = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            # Who stands further out answers with 500.
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start
            self.metrics.observe(scope["path"], status, seconds)
            record = {
                "path": scope["path"][:MAX_LOGGED_PATH],
                "status": status,
                "seconds": round(seconds, 6),
                "items": state.get("num_items"),
                "client": scope["client"][0] if scope.get("client") else None,
            }
            logger.info("%s", json.dumps(record))


class BearerKey:
    """
    Refuses requests without the key, but for those of `open_paths`.

    Args:
        app (`ASGIApp`): What answers.
        key (`str`): The key.
        open_paths (`Sequence[str]`): Paths that need none.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: tuple[str, ...]) -> None:
        self.app = app
        self.open_paths = open_paths
        self._key = key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.open_paths or self._has_key(scope["headers"]):
            return await self.app(scope, receive, send)
        await refuse(
            send,
            401,
            "this server needs its key: send the header 'Authorization: Bearer <key>'",
            (b"www-authenticate", b"Bearer"),
        )

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        value = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, given = value.partition(b" ")
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"


class Queue:
    """
    Refuses POST requests beyond a number of those that are processed or wait.

    Args:
        app (`ASGIApp`): What answers.
        max_length (`int`): The number.
        length (`prometheus_client.Gauge`): Shows it.
    """

    def __init__(self, app: ASGIApp, max_length: int, length: Gauge) -> None:
        self.app = app
        self.max_length = max_length
        self.length = length
        self._count = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _is_post(scope):
            return await self.app(scope, receive, send)
        if self._count >= self.max_length:
            return await refuse(
                send,
                429,
                f"the server has {self.max_length} requests in hand, which is its max_queue: try again later",
                (b"retry-after", b"1"),
            )
        self._count += 1
        self.length.set(self._count)
        try:
            await self.app(scope, receive, send)
        finally:
            self._count -= 1
            self.length.set(self._count)


class Deadline:
    """
    Gives up on POST requests, the reading of their bodies included.

    Args:
        app (`ASGIApp`): What answers. It is cancelled.
        seconds (`float`): Time that it has.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _is_post(scope):
            return await self.app(scope, receive, send)
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as deadline:
                await self.app(scope, receive, send_and_note)
        except TimeoutError:
            if not deadline.expired() or started:
                raise
            await refuse(
                send,
                504,
                f"no answer within {self.seconds:g} s, which is the server's request_timeout: send fewer items at once",
            )


class BodyLimit:
    """
    Reads the body of a POST request before anything parses it, and refuses one that is too large: by its
    content-length, or in chunks as soon as it is.

    Args:
        app (`ASGIApp`): What answers.
        max_bytes (`int`): Largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _is_post(scope):
            return await self.app(scope, receive, send)
        body = bytearray()
        more = declared_length(scope["headers"]) <= self.max_bytes
        too_large = not more
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            too_large = len(body) > self.max_bytes
            more = message.get("more_body", False) and not too_large
        if too_large:
            return await refuse(
                send, 413, f"the body has more than {self.max_bytes} bytes, which is max_body_bytes: send fewer items"
            )
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}
        # The application's copy is enough.
        del body

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self.app(scope, receive_whole, send)


def declared_length(headers: list[tuple[bytes, bytes]]) -> int:
    """Value of the header content-length; 0 where there is none."""
    value = next((value for name, value in headers if name == b"content-length"), b"0")
    # The HTTP parser has let digits through and nothing else.
    return int(value)


async def refuse(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    """Answer with an error, in the form that the routes have."""
    body = json.dumps({"detail": detail}).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def _is_post(scope: Message) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST"
