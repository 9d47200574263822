# SPDX-License-Identifier: Apache-2.0

"""
The reward server as an ASGI application.

- `POST /score` scores images by their questions.
- `POST /generate` paints images for prompts, optionally with given thoughts.
- `POST /get_reward` is OpenRLHF's remote reward (`--reward.remote_url`): it paints the image for each completion and scores
  it.
- `GET /health` and `GET /metrics` (Prometheus) are for operation.

A request passes these checks in order. If the environment variable `ALPHAGRPO_SERVER_KEY` is set, every request except
`GET /health` must send that key as `Authorization: Bearer <key>` (else 401). A `POST` then needs a place in the queue (429),
must finish before the deadline (504), and may have neither too many bytes, also as texts in memory, nor too many JSON values (413). Only then is the
body parsed (422). What a judge's or painter's endpoint says is logged and not sent to clients.
[`~reward_models.server.arguments.ServerArguments`] holds the limits. An error has the form `{"detail": "..."}`.

OpenRLHF sends no key with its remote reward. If the server has one, give OpenRLHF the file `alphagrpo_ext/openrlhf/reward_file.py`
instead of the URL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware

from alphagrpo_ext import __version__
from reward_models.dvreward import DVReward
from reward_models.painters.base import Painter
from reward_models.server.arguments import ServerArguments, server_key
from reward_models.server.limits import KeyCheck, QueuedRoute, RequestQueue, refuse_without_key
from reward_models.server.protocol import (
    GenerateRequest,
    GenerateResponse,
    RemoteRewardRequest,
    RemoteRewardResponse,
    ScoreRequest,
    ScoreResponse,
)
from reward_models.server.request_log import RequestLog, ServerMetrics
from reward_models.server.service import RewardService, problem


_MAX_DESCRIBED_ERRORS = 100


def create_app(args: ServerArguments, reward: DVReward | None = None, painter: Painter | None = None) -> FastAPI:
    """
    Create the application, for `uvicorn` or another ASGI server. It closes the reward and the painter when it shuts down.

    Args:
        args ([`ServerArguments`]):
            The arguments.
        reward ([`DVReward`], *optional*):
            Scores images, instead of the judge that `args` name.
        painter ([`Painter`], *optional*):
            Paints images, instead of the painter that `args` name.

    Raises:
        `ValueError`: If an argument is out of range, the judge cannot read the painter's images, or other machines could reach
            the server without a key.
    """
    key = server_key(args.host)
    painter = painter or args.make_painter()
    reward = reward or args.make_reward(painter.policy if painter else None)
    if painter is not None:
        reward.validate_image_size(args.image_height, args.image_width)

    metrics = ServerMetrics(("/score", "/generate", "/get_reward", "/health", "/metrics"))
    service = RewardService(reward, painter, args, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.aclose()

    # The first middleware is the outermost.
    middleware = [Middleware(RequestLog, metrics=metrics)]
    if key is not None:
        middleware.append(Middleware(AuthenticationMiddleware, backend=KeyCheck(key), on_error=refuse_without_key))
    app = FastAPI(
        title="alphagrpo-ext reward server",
        version=__version__,
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={RequestValidationError: _explain_validation_error, Exception: _hide_error},
        # Without a key the server listens on loopback alone.
        docs_url="/docs" if key is None else None,
        redoc_url=None,
    )
    app.state.queue = RequestQueue(args, metrics.queue_length)
    app.include_router(_reward_routes(service))
    app.include_router(_operation_routes(metrics, judge=args.judge, painter=args.painter))
    return app


def _reward_routes(service: RewardService) -> APIRouter:
    router = APIRouter(route_class=QueuedRoute)

    @router.post("/score")
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        request.state.num_items = len(body.items)
        return await service.score(body)

    @router.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> GenerateResponse:
        request.state.num_items = len(body.items)
        return await service.generate(body)

    @router.post("/get_reward")
    async def get_reward(request: Request, body: RemoteRewardRequest) -> RemoteRewardResponse:
        request.state.num_items = len(body.query)
        return await service.get_reward(body)

    return router


def _operation_routes(metrics: ServerMetrics, **names: str) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__, **names}

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _hide_error(request: Request, _: Exception) -> Response:
    """Answer a request that the server failed at. Uvicorn logs the error."""
    return await http_exception_handler(request, problem(500, "the server failed, see its log"))


async def _explain_validation_error(request: Request, error: RequestValidationError) -> Response:
    """Answer with the fields that are wrong, without repeating what was sent."""
    # The first part of a location is "body".
    errors = error.errors()[:_MAX_DESCRIBED_ERRORS]
    described = [f"{'.'.join(map(str, part['loc'][1:])) or 'the body'}: {part['msg']}" for part in errors]
    return await http_exception_handler(request, problem(422, "; ".join(described)))
