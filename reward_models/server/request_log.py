# SPDX-License-Identifier: Apache-2.0

"""The log and the Prometheus metrics of the reward server."""

from __future__ import annotations

import json
import logging
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send


logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status in log and metrics of a request whose client disconnected before the answer."""

_MAX_LOGGED_PATH = 200
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """
    Prometheus metrics of one server. They have their own registry, so that a process can run several servers.

    Args:
        paths (`tuple[str, ...]`): Paths with their own series. All other paths count as `"other"`.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("alphagrpo_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "alphagrpo_request_seconds",
            "Seconds from the first byte of a request to its answer.",
            ["path"],
            registry=registry,
            buckets=_BUCKETS,
        )
        self.images_scored = Counter("alphagrpo_images_scored", "Images with a score.", registry=registry)
        self.images_failed = Counter(
            "alphagrpo_images_failed", "Images that could not be scored or painted.", registry=registry
        )
        self.queue_length = Gauge("alphagrpo_queue_length", "Requests that run or wait.", registry=registry)

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        # A client can choose any path, and each new label value would take memory for good.
        path = path if path in self.paths else "other"
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)


class RequestLog:
    """
    ASGI middleware that logs each request as one line of JSON and counts it. Bodies, headers and query strings are not
    logged.

    Args:
        app (`ASGIApp`): The wrapped application.
        metrics ([`ServerMetrics`]): Counts the requests.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = CLIENT_CLOSED_REQUEST
        state = scope.setdefault("state", {})
        start = time.perf_counter()

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except Exception:
            # Starlette's outermost middleware answers with 500.
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start
            self.metrics.observe(scope["path"], status, seconds)
            record = {
                "path": scope["path"][:_MAX_LOGGED_PATH],
                "status": status,
                "seconds": round(seconds, 6),
                "items": state.get("num_items"),
                "client": scope["client"][0] if scope.get("client") else None,
            }
            logger.info("%s", json.dumps(record))
