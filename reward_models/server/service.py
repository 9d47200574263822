# SPDX-License-Identifier: Apache-2.0

"""What the reward server does with a request that has passed its limits: scoring and painting."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from fastapi import HTTPException
from PIL import Image

from alphagrpo_ext.openrlhf.group_rewards import exact_in_a_group
from reward_models.dvreward import DVReward, Score
from reward_models.files.image_decoding import EncodedImage
from reward_models.judges.openai import png_bytes
from reward_models.painters.base import ImageRequest, Painter, UnpaintableError
from reward_models.prompts.questions import PromptRecord
from reward_models.server.arguments import ServerArguments
from reward_models.server.protocol import (
    GenerateRequest,
    GenerateResponse,
    ItemScore,
    RemoteRewardRequest,
    RemoteRewardResponse,
    ScoreRequest,
    ScoreResponse,
)
from reward_models.server.request_log import ServerMetrics
from reward_models.server.requests import read_generate_request, read_reward_request, read_score_request


RequestT = TypeVar("RequestT")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_DETAIL = 1000


class RewardService:
    """
    Scores and paints. Every failure is raised as an [`~fastapi.HTTPException`].

    Args:
        reward ([`~reward_models.dvreward.DVReward`]): Scores images.
        painter ([`~reward_models.painters.base.Painter`], *optional*): Paints images.
        limits ([`~reward_models.server.arguments.ServerArguments`]): What one request may hold.
        metrics ([`~reward_models.server.request_log.ServerMetrics`]): Counts images.
    """

    def __init__(
        self, reward: DVReward, painter: Painter | None, limits: ServerArguments, metrics: ServerMetrics
    ) -> None:
        self.reward = reward
        self.painter = painter
        self.limits = limits
        self.metrics = metrics
        # Images wait for a slot undecoded, because a file of a few kilobytes can decode to megabytes.
        self._judge_slots = asyncio.Semaphore(reward.max_concurrency)
        self._painter_slots = asyncio.Semaphore(painter.max_calls if painter else 1)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Answer `POST /score`."""
        pairs = await self._read(read_score_request, request)
        scores = await _gather(
            [self._decode_and_judge(image, record, f"items[{i}].image") for i, (image, record) in enumerate(pairs)]
        )
        return ScoreResponse(scores=[ItemScore.model_validate(score) for score in scores])

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Answer `POST /generate`."""
        painter = self._require_painter()
        images = await self._paint(painter, await self._read(read_generate_request, request))
        return GenerateResponse(images=await asyncio.to_thread(lambda: [_encode(image) for image in images]))

    async def get_reward(self, request: RemoteRewardRequest) -> RemoteRewardResponse:
        """Answer `POST /get_reward`."""
        painter = self._require_painter()
        pairs = await self._read(read_reward_request, request)
        images = await self._paint(painter, [(image_request, None) for image_request, _ in pairs])
        scores = await _gather([self._judge(image, record) for image, (_, record) in zip(images, pairs, strict=True)])
        failed = [i for i, score in enumerate(scores) if score.reward is None]
        if failed:
            raise problem(
                503,
                f"the judge could not score the images of query {failed}, and a missing score must not become a reward: "
                "the server's log says why; try again",
            )
        rewards = [exact_in_a_group(score.reward) for score in scores]
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
        """Release resources of the judge and the painter."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.reward.aclose)
            if self.painter is not None:
                stack.push_async_callback(self.painter.aclose)

    def _require_painter(self) -> Painter:
        if self.painter is None:
            raise problem(501, "this server has no painter: start it with --painter policy or --painter openai")
        return self.painter

    async def _read(self, read: Callable[[RequestT, ServerArguments], list[T]], request: RequestT) -> list[T]:
        try:
            return await asyncio.to_thread(read, request, self.limits)
        except ValueError as error:
            raise problem(422, str(error)) from error

    async def _decode_and_judge(self, image: EncodedImage, record: PromptRecord, where: str) -> Score:
        async with self._judge_slots:
            return await self._judge(await _decode(image, where), record)

    async def _judge(self, image: Image.Image, record: PromptRecord) -> Score:
        try:
            (score,) = await self.reward.score([image], [record])
        except Exception as error:
            self.metrics.images_failed.inc()
            logger.warning(
                "%s failed: %s: %s", type(self.reward.judge).__name__, type(error).__name__, str(error)[:1000]
            )
            # A message of the judge's endpoint may hold paths and keys of others.
            raise problem(503, "the judge failed: the server's log says why; try again") from error
        (self.metrics.images_failed if score.reward is None else self.metrics.images_scored).inc()
        return score

    async def _paint(
        self, painter: Painter, pairs: Sequence[tuple[ImageRequest, EncodedImage | None]]
    ) -> list[Image.Image]:
        async with self._painter_slots:
            requests = [
                request if image is None else replace(request, image=await _decode(image, f"items[{i}].image"))
                for i, (request, image) in enumerate(pairs)
            ]
            try:
                return await painter.paint(requests)
            except UnpaintableError as error:
                if error.__cause__ is None:
                    raise problem(422, str(error)) from error
                # An endpoint refused the request, and its words are not for clients.
                logger.warning("%s: %s", type(painter).__name__, str(error)[:1000])
                place = str(error).partition(":")[0]
                raise problem(422, f"{place}: the painter's endpoint refused it, the server's log says why") from error
            except Exception as error:
                self.metrics.images_failed.inc(len(requests))
                logger.warning("%s failed: %s: %s", type(painter).__name__, type(error).__name__, str(error)[:1000])
                raise problem(503, "the painter failed: the server's log says why; try again") from error


def problem(status: int, detail: str) -> HTTPException:
    """An error whose message any client can read: it is valid Unicode and, as it may quote large input, not too long."""
    detail = detail.encode("utf-8", "backslashreplace").decode()
    return HTTPException(status, detail if len(detail) <= _MAX_DETAIL else detail[:_MAX_DETAIL] + "...")


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return results in order. On the first error or a cancellation, cancel all coroutines and wait for them."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _decode(image: EncodedImage, where: str) -> Image.Image:
    try:
        return await asyncio.to_thread(image.decode)
    except ValueError as error:
        raise problem(422, f"{where}: {error}") from error


def _encode(image: Image.Image) -> str:
    return base64.b64encode(png_bytes(image)).decode()


def _side_mean(answers: Sequence[float], score: Score) -> float:
    # OpenRLHF needs a number for every sample, also for a side without questions.
    return fmean(answers) if answers else score.reward
