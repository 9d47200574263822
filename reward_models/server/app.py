# SPDX-License-Identifier: Apache-2.0

"""The routes of the reward server."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware import Middleware

from alphagrpo_ext import __version__
from reward_models.dvreward import DVReward, Score
from reward_models.judges.openai import png_bytes
from reward_models.painters.policy import Painter, PaintRequest, UnpaintableError
from reward_models.prompts.questions import PromptRecord
from reward_models.server.middleware import BearerKey, BodyLimit, Deadline, Queue, RequestLog, ServerMetrics
from reward_models.server.protocol import (
    GenerateRequest,
    GenerateResponse,
    RemoteRewardRequest,
    RemoteRewardResponse,
    ScoreRequest,
    ScoreResponse,
    describe_errors,
    printable,
    to_item_score,
)
from reward_models.server.requests import (
    PaintTask,
    RequestLimits,
    ScoreTask,
    read_generate_request,
    read_reward_request,
    read_score_request,
)


T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

PATHS = ("/score", "/generate", "/get_reward", "/health", "/metrics")
NO_PAINTER = "this server has no painter: start it with --painter policy or --painter openai"


@dataclass(frozen=True)
class ServerLimits:
    """
    What a server takes.

    Args:
        request ([`~reward_models.server.requests.RequestLimits`]): What one request may hold.
        max_body_bytes (`int`): Largest body.
        max_queue (`int`): Most requests that are processed or wait.
        request_timeout (`float`): Seconds for a request.

    Raises:
        `ValueError`: If a limit is not positive.
    """

    request: RequestLimits
    max_body_bytes: int
    max_queue: int
    request_timeout: float

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if not self.request_timeout > 0:
            raise ValueError(f"request_timeout must be positive, but is {self.request_timeout}")


class RewardService:
    """
    Scores and paints.

    Args:
        reward ([`~reward_models.dvreward.DVReward`]): Scores.
        painter ([`~reward_models.painters.policy.Painter`], *optional*): Paints.
        limits ([`~reward_models.server.requests.RequestLimits`]): What one request may hold.
        metrics ([`~reward_models.server.middleware.ServerMetrics`]): What counts images.
    """

    def __init__(
        self, reward: DVReward, painter: Painter | None, limits: RequestLimits, metrics: ServerMetrics
    ) -> None:
        self.reward = reward
        self.painter = painter
        self.limits = limits
        self.metrics = metrics
        # A file of a few kilobytes can decode to megabytes, so images wait for the judge undecoded.
        self._judge_slots = asyncio.Semaphore(reward.max_concurrency)
        self._painter_slots = asyncio.Semaphore(painter.max_calls if painter else 1)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Answer `POST /score`."""
        tasks = await self._read(read_score_request, request)
        scores = await gather([self._decode_and_judge(task, f"items[{i}]") for i, task in enumerate(tasks)])
        return ScoreResponse(scores=[to_item_score(score) for score in scores])

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Answer `POST /generate`."""
        self._require_painter()
        images = await self._paint(await self._read(read_generate_request, request))
        return GenerateResponse(images=await asyncio.to_thread(lambda: [_encode(image) for image in images]))

    async def get_reward(self, request: RemoteRewardRequest) -> RemoteRewardResponse:
        """Answer `POST /get_reward`."""
        self._require_painter()
        tasks = await self._read(read_reward_request, request)
        images = await self._paint([PaintTask(task.request, None) for task in tasks])
        scores = await gather([self._judge(image, task.record) for image, task in zip(images, tasks, strict=True)])
        failed = [i for i, score in enumerate(scores) if score.reward is None]
        if failed:
            raise problem(
                503,
                f"the judge could not score the images of query {failed}, and a missing score must not become a reward: "
                "the server's log says why; try again",
            )
        rewards = [score.reward for score in scores]
        return RemoteRewardResponse(
            rewards=rewards,
            scores=rewards,
            extra_logs={
                "dvreward_semantic": [_side_mean(score.semantic, score) for score in scores],
                "dvreward_quality": [_side_mean(score.quality, score) for score in scores],
                "strict_pass": [float(score.strict_pass) for score in scores],
            },
        )

    async def aclose(self) -> None:
        """Release what judge and painter hold."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.reward.aclose)
            if self.painter is not None:
                stack.push_async_callback(self.painter.aclose)

    def _require_painter(self) -> None:
        if self.painter is None:
            raise problem(501, NO_PAINTER)

    async def _read(self, read: Callable[[T, RequestLimits], R], request: T) -> R:
        try:
            return await asyncio.to_thread(read, request, self.limits)
        except ValueError as error:
            raise problem(422, str(error)) from error

    async def _decode_and_judge(self, task: ScoreTask, where: str) -> Score:
        async with self._judge_slots:
            try:
                image = await asyncio.to_thread(task.image.decode)
            except ValueError as error:
                raise problem(422, f"{where}.image: {error}") from error
            return await self._judge(image, task.record)

    async def _judge(self, image: Image.Image, record: PromptRecord) -> Score:
        (score,) = await self.reward.score([image], [record])
        (self.metrics.images_failed if score.reward is None else self.metrics.images_scored).inc()
        return score

    async def _paint(self, tasks: Sequence[PaintTask]) -> list[Image.Image]:
        async with self._painter_slots:
            requests = await self._decode_given(tasks)
            try:
                return await self.painter.paint(requests)
            except UnpaintableError as error:
                raise problem(422, str(error)) from error
            except Exception as error:
                self.metrics.images_failed.inc(len(requests))
                logger.warning("%s: %s: %s", type(self.painter).__name__, type(error).__name__, str(error)[:300])
                raise problem(503, f"the painter failed ({type(error).__name__}: {error}): try again") from error

    async def _decode_given(self, tasks: Sequence[PaintTask]) -> list[PaintRequest]:
        requests = []
        for i, task in enumerate(tasks):
            try:
                image = None if task.image is None else await asyncio.to_thread(task.image.decode)
            except ValueError as error:
                raise problem(422, f"items[{i}].image: {error}") from error
            requests.append(replace(task.request, image=image))
        return requests


def build_app(
    reward: DVReward,
    painter: Painter | None,
    limits: ServerLimits,
    key: str | None,
    judge_name: str,
    painter_name: str,
) -> FastAPI:
    """
    The server as an ASGI application.

    Args:
        reward ([`~reward_models.dvreward.DVReward`]): Scores. Closed when the application shuts down.
        painter ([`~reward_models.painters.policy.Painter`], *optional*): Paints. Closed likewise.
        limits ([`ServerLimits`]): What is taken.
        key (`str`, *optional*): Key that every request but `GET /health` needs.
        judge_name, painter_name (`str`): What `GET /health` calls them.
    """
    metrics = ServerMetrics(PATHS)
    service = RewardService(reward, painter, limits.request, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.aclose()

    # The first one is the outermost.
    middleware = [
        Middleware(RequestLog, metrics=metrics),
        *([Middleware(BearerKey, key=key, open_paths=("/health",))] if key else []),
        Middleware(Queue, max_length=limits.max_queue, length=metrics.queue_length),
        Middleware(Deadline, seconds=limits.request_timeout),
        Middleware(BodyLimit, max_bytes=limits.max_body_bytes),
    ]
    app = FastAPI(
        title="alphagrpo-ext reward server",
        version=__version__,
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,
        redoc_url=None,
    )

    @app.exception_handler(RequestValidationError)
    async def explain(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": printable(describe_errors(error.errors()))}, status_code=422)

    @app.post("/score")
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        request.state.num_items = len(body.items)
        return await service.score(body)

    @app.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> GenerateResponse:
        request.state.num_items = len(body.items)
        return await service.generate(body)

    @app.post("/get_reward")
    async def get_reward(request: Request, body: RemoteRewardRequest) -> RemoteRewardResponse:
        request.state.num_items = len(body.query)
        return await service.get_reward(body)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__, "judge": judge_name, "painter": painter_name}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; at the first error, or if the caller is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def problem(status: int, detail: str) -> HTTPException:
    """An answer that says what is wrong."""
    return HTTPException(status, printable(detail))


def _encode(image: Image.Image) -> str:
    return base64.b64encode(png_bytes(image)).decode()


def _side_mean(answers: Sequence[float], score: Score) -> float:
    # OpenRLHF wants a number for every sample; a side without questions has none but the reward.
    return fmean(answers) if answers else score.reward
