# SPDX-License-Identifier: Apache-2.0

"""Samples, painters, judges and helpers for tests of the reward server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from alphagrpo_ext.shapes.prompts import (
    quality_questions,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    semantic_questions,
)
from alphagrpo_ext.shapes.scene import IMAGE_SIZE, render
from alphagrpo_ext.shapes.text import parse_thought, thought
from reward_models.dvreward import DVReward
from reward_models.judges import Judge
from reward_models.painters.base import ImageRequest, Painter, PainterArguments
from reward_models.server.app import create_app
from reward_models.server.arguments import ServerArguments
from support.loopback import serve


KEY = "a-long-key"
JSON = {"content-type": "application/json"}
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Sample:
    """A prompt of the shapes world with its questions, a plan that fulfils it, a right image and a wrong one."""

    record: dict[str, Any]
    plan: str
    right: Image.Image
    wrong: Image.Image

    def score_item(self, image: Image.Image | None = None) -> dict[str, Any]:
        return {"image": encode(image or self.right), **self.record}

    def reward_body(self, completion: str | None = None) -> dict[str, Any]:
        prompt = TEMPLATE.format(self.record["prompt"])
        query = prompt + (self.plan if completion is None else completion) + "<|im_end|>"
        return {"query": [query], "prompts": [prompt], "labels": [json.dumps(self.record)]}


def make_sample(seed: int) -> Sample:
    rng = random.Random(seed)
    spec = sample_spec(rng, "train")
    scene = sample_scene(spec, rng)
    record = {
        "prompt": sample_prompt(spec, rng),
        "semantic_questions": semantic_questions(spec),
        "quality_questions": quality_questions(),
    }
    return Sample(record, thought(scene), render(scene), render(sample_violation(scene, spec, rng)))


SAMPLES = [make_sample(seed) for seed in range(6)]
SAMPLE = SAMPLES[0]


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def png_file(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file whose header and pixel data need not fit each other."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class ScenePainter(Painter):
    """Draws the scene that a thought plans, or gray if it plans none, and records its requests."""

    max_calls = 4

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []
        self.closed = False

    @classmethod
    def from_arguments(cls, args: PainterArguments) -> ScenePainter:
        return cls()

    async def paint(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        self.requests += requests
        scenes = [parse_thought(request.thought or "") for request in requests]
        gray = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "gray")
        return [gray if scene is None else render(scene) for scene in scenes]

    async def aclose(self) -> None:
        self.closed = True


class FailingPainter(ScenePainter):
    """Raises a given error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def paint(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        raise self.error


class GatedJudge(Judge):
    """Answers yes once its gate is open, and counts the waiting calls."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.waiting = self.cancelled = 0
        self.closed = False

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        self.waiting += 1
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return [1.0] * len(questions)

    async def aclose(self) -> None:
        self.closed = True


class ForgetfulJudge(Judge):
    """Leaves the last question without an answer."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [1.0] * (len(questions) - 1) + [None]


class YesJudge(Judge):
    """Answers every question with yes."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [1.0] * len(questions)


@contextmanager
def running(
    reward: DVReward | None = None, own_painter: Painter | None = None, /, **arguments: Any
) -> Iterator[httpx.Client]:
    """A server with these arguments, and optionally a reward and a painter of the test."""
    with serve(create_app(ServerArguments(**arguments), reward, own_painter)) as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            yield client


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.01)


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert isinstance(detail, str) and detail
    return detail
