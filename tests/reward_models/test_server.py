# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from trl import TrlParser

from alphagrpo_ext import __version__
from alphagrpo_ext.openrlhf.thought import thought_of
from alphagrpo_ext.shapes import (
    IMAGE_SIZE,
    parse_thought,
    quality_questions,
    render,
    sample_prompt,
    sample_scene,
    sample_spec,
    sample_violation,
    semantic_questions,
    thought,
)
from loopback import serve
from reward_models.dvreward import DVReward
from reward_models.image_decoding import EncodedImage, ImageLimits
from reward_models.judges import Judge
from reward_models.painters import Painter, PainterArguments, PaintError, PaintRequest, UnpaintableError
from reward_models.questions import from_row
from reward_models.server import KEY_VARIABLE, ServerArguments, create_app, is_loopback


KEY = "a-long-key"
JSON = {"content-type": "application/json"}
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Sample:
    """A prompt of the shapes world with its questions, a plan that fulfils it, and an image that does and one that does not."""

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
    """A PNG file with a header and pixel data of one's own, which need not fit each other."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class ScenePainter(Painter):
    """Draws the scene that a thought plans, and gray where it plans none; remembers what it was asked for."""

    max_calls = 4

    def __init__(self) -> None:
        self.requests: list[PaintRequest] = []
        self.closed = False

    @classmethod
    def from_arguments(cls, args: PainterArguments) -> ScenePainter:
        return cls()

    async def paint(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        self.requests += requests
        scenes = [parse_thought(request.thought or "") for request in requests]
        gray = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "gray")
        return [gray if scene is None else render(scene) for scene in scenes]

    async def aclose(self) -> None:
        self.closed = True


class FailingPainter(ScenePainter):
    """Fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def paint(self, requests: Sequence[PaintRequest]) -> list[Image.Image]:
        raise self.error


class GatedJudge(Judge):
    """Says yes once its gate is open; counts who waits."""

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
    """Has no answer to the last question."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [1.0] * (len(questions) - 1) + [None]


class YesJudge(Judge):
    """Says yes."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [1.0] * len(questions)


@contextmanager
def running(
    reward: DVReward | None = None, own_painter: Painter | None = None, /, **arguments: Any
) -> Iterator[httpx.Client]:
    """A server with these arguments, and perhaps a reward and a painter of the test's own."""
    with serve(create_app(ServerArguments(**arguments), reward, own_painter)) as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            yield client


@pytest.fixture(scope="module")
def shapes() -> Iterator[httpx.Client]:
    """A server with the real judge of the shapes world and the packaged model as its painter."""
    with running(judge="shapes", painter="policy", max_items=8, max_questions=16) as client:
        yield client


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx.Client]:
    """A server with the real judge and no painter, and small limits."""
    limits = {"max_items": 3, "max_questions": 8, "max_body_bytes": 200_000}
    with running(judge="shapes", max_image_side=300, max_image_pixels=40_000, **limits) as client:
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
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert isinstance(detail, str) and detail
    return detail


def test_score_is_that_of_the_reward_in_process(plain: httpx.Client) -> None:
    images = [SAMPLES[0].right, SAMPLES[1].wrong, SAMPLES[2].right]
    items = [sample.score_item(image) for sample, image in zip(SAMPLES, images, strict=False)]
    items[1]["image"] = "data:image/png;base64," + items[1]["image"]
    items[2]["image"] = encode(images[2], "WEBP", lossless=True)
    items[2]["semantic_questions"] = json.dumps(items[2]["semantic_questions"])
    response = plain.post("/score", json={"items": items})
    assert response.status_code == 200
    expected = asyncio.run(DVReward("shapes").score(images, [from_row(sample.record) for sample in SAMPLES[:3]]))
    assert response.json()["scores"] == [
        {
            "reward": score.reward,
            "semantic": list(score.semantic),
            "quality": list(score.quality),
            "strict_pass": score.strict_pass,
        }
        for score in expected
    ]
    assert [score.strict_pass for score in expected] == [True, False, True]


def test_jpeg_and_transparent_images_are_read_outside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decoding, judging = [], set(), set()
    decode = EncodedImage.decode

    def note_thread(image: EncodedImage) -> Image.Image:
        decoding.add(threading.get_ident())
        return decode(image)

    monkeypatch.setattr(EncodedImage, "decode", note_thread)

    class LookingJudge(YesJudge):
        async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
            judging.add(threading.get_ident())
            seen.append((image.mode, image.getpixel((0, 0))))
            return await super().answer(image, questions)

    with running(DVReward(LookingJudge(), max_concurrency=1)) as client:
        images = [
            encode(Image.new("RGB", (8, 8), (200, 0, 0)), "JPEG", quality=100),
            encode(Image.new("RGBA", (8, 8), (200, 0, 0, 0))),
            encode(Image.new("L", (8, 8), 7)),
        ]
        response = client.post("/score", json={"items": [{**SAMPLE.score_item(), "image": i} for i in images]})
    assert [score["reward"] for score in response.json()["scores"]] == [1.0] * 3
    assert decoding and not decoding & judging
    assert [mode for mode, _ in seen] == ["RGB"] * 3
    jpeg, transparent, gray = (pixel for _, pixel in seen)
    assert np.abs(np.subtract(jpeg, (200, 0, 0))).max() <= 3
    assert (transparent, gray) == ((255, 255, 255), (7, 7, 7))


def test_an_image_that_could_not_be_scored_has_no_reward_and_is_counted() -> None:
    large = SAMPLE.right.resize((32, 32))
    with running(judge="shapes") as client:
        response = client.post("/score", json={"items": [SAMPLE.score_item(large), SAMPLE.score_item()]})
        failed, scored = response.json()["scores"]
        assert failed["reward"] is None and failed["strict_pass"] is None
        assert set(failed["semantic"] + failed["quality"]) == {None}
        assert scored["reward"] > 0.9
        assert metric(client, "alphagrpo_images_failed_total") == 1
        assert metric(client, "alphagrpo_images_scored_total") == 1


def test_no_items_are_no_scores(plain: httpx.Client) -> None:
    assert plain.post("/score", json={"items": []}).json() == {"scores": []}


def test_generate_paints_with_the_policy(shapes: httpx.Client) -> None:
    requests = [
        PaintRequest(SAMPLE.record["prompt"], SAMPLE.plan, seed=3),
        PaintRequest(SAMPLE.record["prompt"], seed=3),
        PaintRequest(SAMPLE.record["prompt"], SAMPLE.plan, SAMPLE.wrong, seed=2**63 - 1),
    ]
    items = [vars(request) | {"image": request.image and encode(request.image)} for request in requests]
    responses = [shapes.post("/generate", json={"items": items}) for _ in range(2)]
    assert responses[0].status_code == 200
    assert responses[0].json() == responses[1].json()
    painter = ServerArguments(painter="policy").make_painter()

    async def paint() -> list[Image.Image]:
        images = await painter.paint(requests)
        await painter.aclose()
        return images

    files = [base64.b64decode(image, validate=True) for image in responses[0].json()["images"]]
    for file, expected in zip(files, asyncio.run(paint()), strict=True):
        image = Image.open(io.BytesIO(file))
        assert image.format == "PNG"
        assert (np.asarray(image) == np.asarray(expected)).all()


def test_painted_plans_are_what_the_judge_wants_to_see(shapes: httpx.Client) -> None:
    items = [{"prompt": s.record["prompt"], "thought": s.plan, "seed": 0} for s in SAMPLES]
    images = shapes.post("/generate", json={"items": items}).json()["images"]
    scored = [{**sample.record, "image": image} for sample, image in zip(SAMPLES, images, strict=True)]
    shifted = [
        {**sample.record, "image": image} for sample, image in zip(SAMPLES, images[1:] + images[:1], strict=True)
    ]
    right, wrong = (shapes.post("/score", json={"items": i}).json()["scores"] for i in (scored, shifted))
    assert np.mean([s["reward"] for s in right]) > np.mean([s["reward"] for s in wrong]) + 0.1


def test_openrlhf_gets_rewards_from_policy_and_judge(shapes: httpx.Client) -> None:
    bodies = [sample.reward_body() for sample in SAMPLES]
    body = {name: [entry for one in bodies for entry in one[name]] for name in ("query", "prompts", "labels")}
    response = shapes.post("/get_reward", json={**body, "unknown": 1})
    assert response.status_code == 200
    answer = response.json()
    assert answer["scores"] == answer["rewards"] and len(answer["rewards"]) == len(SAMPLES)
    logs = answer["extra_logs"]
    assert sorted(logs) == ["dvreward_quality", "dvreward_semantic", "strict_pass"]
    products = np.multiply(logs["dvreward_semantic"], logs["dvreward_quality"])
    assert answer["rewards"] == pytest.approx(list(products**0.5))
    assert set(logs["strict_pass"]) <= {0.0, 1.0}
    assert [isinstance(value, float) for value in logs["strict_pass"]] == [True] * len(SAMPLES)


def test_openrlhf_client_itself_gets_its_reward() -> None:
    agent = pytest.importorskip("openrlhf.utils.agent")
    body = SAMPLE.reward_body()
    with running(None, ScenePainter(), judge="shapes") as client:
        executor = agent.SingleTurnAgentExecutor(f"{client.base_url}/get_reward")
        (answer,) = asyncio.run(executor._fetch_rewards_via_http(body["query"], body["prompts"], body["labels"]))
        assert answer["rewards"][0] > 0.9 and answer["extra_logs"]["strict_pass"] == [1.0]


def test_reward_is_that_of_the_image_that_the_thought_stands_for() -> None:
    painter = ScenePainter()
    body = SAMPLE.reward_body()
    other = next(sample for sample in SAMPLES if sample.plan != SAMPLE.plan)
    completions = [SAMPLE.plan, f"  {SAMPLE.plan}\n<|im_end|>\n<|endoftext|>", other.plan, ""]
    body["query"] = [body["prompts"][0] + completion + "<|im_end|>" for completion in completions]
    body["prompts"], body["labels"] = body["prompts"] * 4, body["labels"] * 4
    with running(None, painter, judge="shapes") as client:
        rewards = client.post("/get_reward", json=body).json()["rewards"]
    assert [request.thought for request in painter.requests] == [SAMPLE.plan, SAMPLE.plan, other.plan, ""]
    assert {request.prompt for request in painter.requests} == {SAMPLE.record["prompt"]}
    assert {(request.image, request.seed) for request in painter.requests} == {(None, None)}
    assert rewards[0] == rewards[1] > 0.9 > max(rewards[2:])


def test_label_may_hold_a_conversation_and_questions_of_one_side_alone() -> None:
    painter = ScenePainter()
    messages = [{"role": "system", "content": "draw"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    record = {**SAMPLE.record, "prompt": messages, "semantic_questions": []}
    body = {**SAMPLE.reward_body(), "labels": [json.dumps(record)]}
    with running(None, painter, judge="shapes") as client:
        answer = client.post("/get_reward", json=body).json()
    assert painter.requests[0].prompt == "a"
    assert answer["extra_logs"]["dvreward_semantic"] == answer["rewards"] == answer["extra_logs"]["dvreward_quality"]


@pytest.mark.parametrize(
    ("query", "prompt", "expected"),
    [
        ("paint a cat: a black cat", "paint a cat:", "a black cat"),
        (
            "<|im_start|>user\nx<|im_end|>\n  <think> y </think><|im_end|>\n",
            "<|im_start|>user\nx<|im_end|>",
            "<think> y </think>",
        ),
        ("<s> [x] a cat</s>", "[x]", "a cat"),
        ("<bos>x y<end_of_turn>\n<pad><pad>", "x", "y"),
        ("x<|im_end|>", "x", ""),
        ("a <|vision_start|>b", "", "a b"),
    ],
)
def test_thought_is_what_follows_the_prompt(query: str, prompt: str, expected: str) -> None:
    assert thought_of(query, prompt) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ["something else"]}, r"query[0] does not begin with the prompt"),
        ({"labels": []}, "must be of one length"),
        ({"labels": ["{"]}, "labels[0] must be the JSON of a record"),
        ({"labels": ["[]"]}, "labels[0]: expected a mapping, got list"),
        ({"labels": [json.dumps({"prompt": "x"})]}, "labels[0] has no 'semantic_questions'"),
        ({"labels": [json.dumps({**SAMPLE.record, "prompt": [1]})]}, "labels[0]: prompt must be a text"),
        (
            {"labels": [json.dumps({**SAMPLE.record, "prompt": "\ud800"})]},
            "labels[0]: prompt: the text is not valid Unicode",
        ),
        ({"labels": [None]}, "labels.0: Input should be a valid string"),
        ({"prompts": "x"}, "prompts: Input should be a valid list"),
        ({"query": ["x"] * 9, "prompts": ["x"] * 9, "labels": ["{}"] * 9}, "query has 9 entries, more than the 8"),
    ],
)
def test_malformed_reward_requests_are_explained(shapes: httpx.Client, changes: dict[str, Any], message: str) -> None:
    response = shapes.post("/get_reward", content=json.dumps({**SAMPLE.reward_body(), **changes}), headers=JSON)
    assert message in refusal(response, 422)


def test_an_image_without_a_score_is_never_a_reward() -> None:
    with running(DVReward(ForgetfulJudge()), ScenePainter()) as client:
        detail = refusal(client.post("/get_reward", json=SAMPLE.reward_body()), 503)
        assert "query [0]" in detail and "must not become a reward" in detail
        assert metric(client, "alphagrpo_images_failed_total") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UnpaintableError("request 0: too long"), 422, "request 0: too long"),
        (PaintError("request 0: out of paint"), 503, "out of paint"),
        (ZeroDivisionError("oops"), 503, "ZeroDivisionError: oops"),
    ],
)
def test_a_painter_that_fails_is_reported(error: Exception, status: int, message: str) -> None:
    with running(None, FailingPainter(error), judge="shapes") as client:
        for path, body in (("/generate", {"items": [{"prompt": "x"}]}), ("/get_reward", SAMPLE.reward_body())):
            assert message in refusal(client.post(path, json=body), status)
        assert metric(client, "alphagrpo_images_failed_total") == (2 if status == 503 else 0)


def test_thought_that_is_too_long_for_the_policy_is_refused(shapes: httpx.Client) -> None:
    response = shapes.post("/generate", json={"items": [{"prompt": "x", "thought": "red " * 600}]})
    assert "request 0" in refusal(response, 422)


@pytest.mark.parametrize("path", ["/generate", "/get_reward"])
def test_without_a_painter_the_answer_says_how_to_get_one(plain: httpx.Client, path: str) -> None:
    body = {"items": [{"prompt": "x"}]} if path == "/generate" else SAMPLE.reward_body()
    assert "--painter policy" in refusal(plain.post(path, json=body), 501)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "items.0.image: Input should be a valid string"),
        ({"image": ""}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": "?"}, "items[0].image: the image is not base64"),
        ({"image": "data:image/png,x"}, "items[0].image: the data URL must hold base64"),
        ({"image": encode(SAMPLE.right, "GIF")}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": encode(SAMPLE.right, "BMP")}, "items[0].image: the image is not a readable PNG, JPEG, WEBP file"),
        ({"image": encode(SAMPLE.right)[:80]}, "items[0].image: the image cannot be decoded"),
        ({"prompt": 3}, "items.0.prompt: Input should be a valid string"),
        ({"prompt": " "}, "items[0]: prompt is empty"),
        ({"semantic_questions": 3}, "items[0]: semantic_questions must be a list of questions, got int"),
        ({"semantic_questions": "["}, "items[0]: semantic_questions is a string but not valid JSON"),
        ({"semantic_questions": [{"tag": "Count"}]}, "items[0]: semantic_questions[0] has no 'question'"),
        ({"quality_questions": [{"question": "x", "tag": "Count"}]}, "unknown tag 'Count'"),
        (
            {"semantic_questions": [{"question": "\ud800", "tag": "Count"}]},
            "items[0]: a question: the text is not valid Unicode",
        ),
        ({"semantic_questions": [{"question": "x", "tag": "\ud800"}]}, "unknown tag '\\ud800'"),
        ({"semantic_questions": [], "quality_questions": []}, "no valid question between them"),
        ({"semantic_question": []}, "items.0.semantic_question: Extra inputs are not permitted"),
        ({"semantic_questions": [{"question": "x", "tag": "Count"}] * 6}, "more than the 8"),
    ],
)
def test_malformed_items_are_named_by_field(plain: httpx.Client, changes: dict[str, Any], message: str) -> None:
    body = json.dumps({"items": [{**SAMPLE.score_item(), **changes}]})
    assert message in refusal(plain.post("/score", content=body, headers=JSON), 422)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "items.0.prompt"),
        ({"seed": -1}, "items.0.seed"),
        ({"seed": 2**63}, "items.0.seed"),
        ({"seed": 1.5}, "items.0.seed"),
        ({"seed": "1"}, "items.0.seed"),
        ({"thougth": "x"}, "items.0.thougth"),
        ({"prompt": "\ud800"}, "items.0.prompt"),
        ({"image": "?"}, "items[0].image: the image is not base64"),
        ({"image": encode(SAMPLE.right)[:80]}, "items[0].image: the image cannot be decoded"),
    ],
)
def test_malformed_paint_requests_are_named_by_field(
    shapes: httpx.Client, changes: dict[str, Any], message: str
) -> None:
    body = json.dumps({"items": [{"prompt": "x", **changes}]})
    assert message in refusal(shapes.post("/generate", content=body, headers=JSON), 422)


def test_number_of_items_is_bounded(plain: httpx.Client, shapes: httpx.Client) -> None:
    response = plain.post("/score", json={"items": [SAMPLE.score_item()] * 4})
    assert "items has 4 entries, more than the 3" in refusal(response, 422)
    response = shapes.post("/generate", json={"items": [{"prompt": "x"}] * 9})
    assert "items has 9 entries, more than the 8" in refusal(response, 422)


def test_body_that_calls_itself_large_is_not_waited_for(plain: httpx.Client) -> None:
    with socket.create_connection((plain.base_url.host, plain.base_url.port), timeout=60) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 200001\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_large_bodies_are_refused_whether_or_not_they_say_so(plain: httpx.Client) -> None:
    large = json.dumps({"items": [], "padding": "x" * 400_000}).encode()
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for start in range(0, len(large), 10_000):
            sent += 1
            yield large[start : start + 10_000]

    for content in (large, chunks()):
        response = plain.post("/score", content=content, headers=JSON)
        assert "max_body_bytes" in refusal(response, 413)
    small = json.dumps({"items": [SAMPLE.score_item()]}).encode()
    response = plain.post("/score", content=iter([small[:50], small[50:]]), headers=JSON)
    assert response.status_code == 200
    padded = small + b" " * (200_000 - len(small))
    assert plain.post("/score", content=padded, headers=JSON).status_code == 200
    assert plain.post("/score", content=padded + b" ", headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("size", "status"), [((300, 100), 200), ((301, 1), 422), ((200, 200), 200), ((201, 200), 422)]
)
def test_image_size_is_bounded(plain: httpx.Client, size: tuple[int, int], status: int) -> None:
    for file_format in ("PNG", "JPEG", "WEBP"):
        item = {**SAMPLE.score_item(), "image": encode(Image.new("RGB", size), file_format)}
        response = plain.post("/score", json={"items": [item]})
        assert response.status_code == status
        assert status == 200 or f"{size[0]} x {size[1]} pixels" in response.json()["detail"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_defused_by_their_header(plain: httpx.Client) -> None:
    huge = png_file(60_000, 60_000, zlib.compress(bytes(1000)))
    # A gigabyte of zeros, had anybody tried to decode it.
    flat = encode(Image.new("1", (30_000, 5_000)))
    # What does not decompress at all shows that nobody tried.
    undecodable = png_file(400, 400, b"no pixels at all")
    for image, size in (
        (base64.b64encode(huge).decode(), ""),
        (flat, "30000 x 5000 pixels"),
        (base64.b64encode(undecodable).decode(), "400 x 400 pixels"),
    ):
        response = plain.post("/score", json={"items": [{**SAMPLE.score_item(), "image": image}]})
        detail = refusal(response, 422)
        assert "items[0].image: the image" in detail and "send a smaller one" in detail and size in detail


def test_many_compressible_images_are_never_in_memory_at_once() -> None:
    process, peak = psutil.Process(), 0

    class WeighingJudge(YesJudge):
        async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
            nonlocal peak
            await asyncio.sleep(0.01)
            peak = max(peak, process.memory_info().rss)
            return await super().answer(image, questions)

    item = {**SAMPLE.score_item(), "image": encode(Image.new("RGB", (500, 500)))}
    with running(DVReward(WeighingJudge(), max_concurrency=2), max_items=400) as client:
        client.post("/score", json={"items": [item] * 4})
        before, peak = process.memory_info().rss, 0
        assert client.post("/score", json={"items": [item] * 400}).status_code == 200
    # All of them together are 300 MB.
    assert peak - before < 100e6


def test_damaged_image_files_are_refused(plain: httpx.Client) -> None:
    rng = random.Random(0)
    for file_format in ("PNG", "JPEG", "WEBP"):
        file = base64.b64decode(encode(SAMPLE.right, file_format))
        for _ in range(25):
            damaged = bytearray(file)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            item = {**SAMPLE.score_item(), "image": base64.b64encode(damaged[: rng.randint(20, 10_000)]).decode()}
            assert plain.post("/score", json={"items": [item]}).status_code in (200, 422)


@pytest.mark.parametrize("sides", [(0, 9), (9, 0)])
def test_image_limits_must_be_positive(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, but is 0"):
        ImageLimits(*sides)


def test_an_image_is_read_within_its_limits() -> None:
    data = encode(Image.new("RGB", (8, 4), "red"))
    image = EncodedImage.from_base64(data, ImageLimits(8, 32)).decode()
    assert (image.size, image.mode, image.getpixel((7, 3))) == ((8, 4), "RGB", (255, 0, 0))
    for limits in (ImageLimits(7, 32), ImageLimits(8, 31)):
        with pytest.raises(ValueError, match="8 x 4 pixels"):
            EncodedImage.from_base64(data, limits)


def test_full_queue_turns_requests_away_and_recovers() -> None:
    judge, body = GatedJudge(), {"items": [SAMPLE.score_item()]}
    with running(DVReward(judge), max_queue=3) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, "/score", json=body) for _ in range(3)]
        wait_until(lambda: judge.waiting == 3)
        response = client.post("/score", json=body)
        assert "max_queue" in refusal(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        assert metric(client, "alphagrpo_queue_length") == 3
        judge.gate.set()
        assert [task.result().status_code for task in waiting] == [200] * 3
        assert client.post("/score", json=body).status_code == 200
        assert metric(client, "alphagrpo_queue_length") == 0


def test_request_that_takes_too_long_is_given_up() -> None:
    judge, body = GatedJudge(), {"items": [SAMPLE.score_item()] * 2}
    with running(DVReward(judge), request_timeout=0.5, max_queue=1) as client:
        assert "request_timeout" in refusal(client.post("/score", json=body), 504)
        wait_until(lambda: judge.cancelled == 2)
        judge.gate.set()
        assert client.post("/score", json=body).status_code == 200


def test_body_that_does_not_come_frees_its_place() -> None:
    with running(judge="shapes", request_timeout=0.5, max_queue=1) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 504")
        assert client.post("/score", json={"items": [SAMPLE.score_item()]}).status_code == 200


def test_client_that_goes_away_frees_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with running(judge="shapes", max_queue=1) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            wait_until(lambda: metric(client, "alphagrpo_queue_length") == 1)
        wait_until(lambda: metric(client, "alphagrpo_queue_length") == 0)
        assert client.post("/score", json={"items": [SAMPLE.score_item()]}).status_code == 200
        assert metric(client, "alphagrpo_requests_total", path="/score", status="499") == 1


ROUTES = [("POST", "/score"), ("POST", "/generate"), ("POST", "/get_reward"), ("GET", "/metrics")]


def test_key_is_wanted_everywhere_but_for_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    wrong = ["", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "Bearer x y", f"bearer x{KEY}"]
    with running(None, ScenePainter(), judge="shapes") as client:
        for method, path in [*ROUTES, ("GET", "/openapi.json"), ("GET", "/nothing")]:
            assert "Bearer <key>" in refusal(client.request(method, path), 401)
            for value in wrong:
                response = client.request(method, path, headers={"authorization": value})
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            bytes_key = {b"authorization": b"Bearer \xff\xfe"}
            assert client.request(method, path, headers=bytes_key).status_code == 401
        assert client.get("/health").status_code == 200
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {KEY}"}
            assert client.post("/score", json={"items": [SAMPLE.score_item()]}, headers=headers).status_code == 200
            assert client.get("/metrics", headers=headers).status_code == 200


def test_without_a_key_nobody_is_asked_for_one(plain: httpx.Client) -> None:
    assert plain.get("/metrics", headers={"authorization": "Bearer x"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_server_that_others_reach_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in (None, "", " \n"):
        if empty is not None:
            monkeypatch.setenv(KEY_VARIABLE, empty)
        with pytest.raises(ValueError, match=f"set {KEY_VARIABLE}"):
            create_app(ServerArguments(host=host))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    create_app(ServerArguments(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    create_app(ServerArguments(host=host))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_items": 0}, "max_items must be at least 1, but is 0"),
        ({"max_questions": 0}, "max_questions must be at least 1"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"max_image_side": 0}, "max_side must be at least 1"),
        ({"request_timeout": 0.0}, "request_timeout must be positive"),
        ({"judge": "shape"}, "unknown judge 'shape'. Did you mean 'shapes'"),
        ({"painter": "policy", "image_height": 20}, "the judge 'shapes' reads images of 24 x 24 pixels"),
    ],
)
def test_bad_arguments_are_named_at_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_app(ServerArguments(**changes))


def test_command_line_has_every_argument() -> None:
    command = "--judge shapes --painter policy --port 9000 --max_queue 5 --request_timeout 7.5 --cfg_interval 0.1 0.9"
    (args,) = TrlParser((ServerArguments,)).parse_args_and_config(command.split())
    assert (args.port, args.host, args.max_queue, args.request_timeout) == (9000, "127.0.0.1", 5, 7.5)
    assert (args.judge, args.painter, args.painter_model, args.cfg_interval) == (
        "shapes",
        "policy",
        "bagel-shapes",
        [0.1, 0.9],
    )


def test_policy_can_be_painter_and_judge_at_once() -> None:
    with running(judge="policy", painter="policy") as client:
        answer = client.post("/get_reward", json=SAMPLE.reward_body()).json()
        assert 0.0 <= answer["rewards"][0] <= 1.0


def test_health_says_what_is_running(shapes: httpx.Client, plain: httpx.Client) -> None:
    expected = {"status": "ok", "version": __version__, "judge": "shapes"}
    assert shapes.get("/health").json() == {**expected, "painter": "policy"}
    assert plain.get("/health").json() == {**expected, "painter": "none"}


def test_protocol_is_described(plain: httpx.Client) -> None:
    paths = plain.get("/openapi.json").json()["paths"]
    assert sorted(paths) == ["/generate", "/get_reward", "/health", "/metrics", "/score"]
    assert plain.get("/docs").status_code == 404


def test_metrics_count_what_happened() -> None:
    with running(judge="shapes") as client, running(judge="shapes") as other:
        client.post("/score", json={"items": [SAMPLE.score_item()] * 3})
        client.post("/score", json={})
        client.post("/generate", json={"items": []})
        for name in ("a", "b"):
            client.get(f"/{name}")
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert metric(client, "alphagrpo_requests_total", path="/score", status="200") == 1
        assert metric(client, "alphagrpo_requests_total", path="/score", status="422") == 1
        assert metric(client, "alphagrpo_requests_total", path="/generate", status="501") == 1
        assert metric(client, "alphagrpo_requests_total", path="other", status="404") == 2
        assert metric(client, "alphagrpo_request_seconds_count", path="/score") == 2
        assert metric(client, "alphagrpo_request_seconds_sum", path="/score") > 0
        assert metric(client, "alphagrpo_images_scored_total") == 3
        assert metric(client, "alphagrpo_images_failed_total") == 0
        assert metric(client, "alphagrpo_queue_length") == 0
        # Two servers of one process do not share their metrics.
        assert metric(other, "alphagrpo_images_scored_total") == 0


def test_every_request_is_one_line_without_secrets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level(logging.INFO)
    item, headers = SAMPLE.score_item(), {"authorization": f"Bearer {KEY}"}
    with running(None, ScenePainter(), judge="shapes") as client:
        client.post("/score?secret=query", json={"items": [item] * 2}, headers=headers)
        client.post("/generate", json={"items": [{"prompt": item["prompt"]}]}, headers=headers)
        client.post("/get_reward", json=SAMPLE.reward_body(), headers=headers)
        client.post("/score", json={"items": [{**item, "image": "?"}]}, headers=headers)
        client.post("/score", json={"items": 3}, headers=headers)
        client.get("/" + "x" * 300 + "%0A", headers={"authorization": "Bearer wrong-key"})
        client.get("/health")
        wait_until(lambda: len([r for r in caplog.records if r.name == "reward_models.server"]) == 7)
    lines = [record.getMessage() for record in caplog.records if record.name == "reward_models.server"]
    records = [json.loads(line) for line in lines]
    assert not any("\n" in line for line in lines)
    assert [(r["path"], r["status"], r["items"]) for r in records] == [
        ("/score", 200, 2),
        ("/generate", 200, 1),
        ("/get_reward", 200, 1),
        ("/score", 422, 1),
        ("/score", 422, None),
        ("/" + "x" * 199, 401, None),
        ("/health", 200, None),
    ]
    assert all(sorted(r) == ["client", "items", "path", "seconds", "status"] for r in records)
    assert all(r["client"] == "127.0.0.1" and 0 < r["seconds"] < 60 for r in records)
    everything = "\n".join(lines)
    for secret in (KEY, "wrong-key", "secret", item["prompt"], item["image"][:40], SAMPLE.plan):
        assert secret not in everything


def test_requests_under_way_are_finished_before_judge_and_painter_are_closed() -> None:
    judge, painter = GatedJudge(), ScenePainter()
    app = create_app(ServerArguments(), DVReward(judge), painter)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        body = {"items": [SAMPLE.score_item()]}
        under_way = pool.submit(httpx.post, f"{url}/score", json=body, timeout=60)
        wait_until(lambda: judge.waiting == 1)
        server.should_exit = True
        with pytest.raises(httpx.TransportError):
            # What was accepted before the port closed may still be answered.
            while httpx.get(f"{url}/health", timeout=60):
                time.sleep(0.01)
        assert not judge.closed and not painter.closed
        judge.gate.set()
        assert under_way.result().json()["scores"][0]["reward"] == 1.0
    thread.join(60)
    assert not thread.is_alive()
    assert judge.closed and painter.closed


def test_wrong_methods_and_types_are_refused(plain: httpx.Client) -> None:
    assert plain.get("/score").status_code == 405
    assert plain.put("/score", json={}).status_code == 405
    assert plain.post("/health").status_code == 405
    assert plain.get("/").status_code == 404
    body = json.dumps({"items": [SAMPLE.score_item()]}).encode()
    for content_type in ("text/plain", "image/png", "application/x-www-form-urlencoded", ""):
        response = plain.post("/score", content=body, headers={"content-type": content_type})
        assert response.status_code == 422


def test_answers_to_malformed_bodies_do_not_repeat_them(plain: httpx.Client) -> None:
    body = json.dumps({"items": [{"image": ["x" * 50_000], "prompt": [7] * 1000}] * 2})
    response = plain.post("/score", content=body, headers=JSON)
    assert len(refusal(response, 422)) < 1100 and "xxx" not in response.text


NESTED = (10, 200, 800, 900, 940, 960, 980, 1000, 5000, 50_000)
BROKEN = [
    b"",
    b"null",
    b"nul",
    b"NaN",
    b'{"items": NaN}',
    b'{"items": [-Infinity]}',
    b"1" * 5000,
    b"-1e999999",
    b'{"items": [%s]}' % (b"9" * 5000),
    b'"\\ud800"',
    b'{"\\udfff": 1}',
    b"\xff\xfe\x00",
    b'{"items": [{"prompt": "\xff"}]}',
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"items":' * 20_000,
    b"[1" + b",1" * 50_000 + b"]",
    b'{"items": [1' + b",1" * 50_000 + b"]}",
]


@pytest.mark.parametrize("path", ["/score", "/generate", "/get_reward"])
def test_bodies_that_are_no_request_are_4xx(shapes: httpx.Client, path: str) -> None:
    for body in BROKEN:
        status = shapes.post(path, content=body, headers=JSON).status_code
        assert 400 <= status < 500, (status, body[:40])


@pytest.mark.parametrize("depth", NESTED)
def test_deep_nesting_is_4xx_wherever_it_stands(shapes: httpx.Client, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    item, question = SAMPLE.score_item(), {"question": "x", "tag": "Count"}
    score_items = [
        item | {"prompt": 0},
        item | {"semantic_questions": 0},
        item | {"semantic_questions": [0]},
        item | {"semantic_questions": [question | {"question": 0}]},
        item | {"semantic_questions": [question | {"tag": 0}]},
        item | {"semantic_questions": [question | {"is_valid": 0}]},
    ]
    for score_item in score_items:
        body = json.dumps({"items": [score_item]}).replace(": 0", f": {nested}").replace("[0]", f"[{nested}]")
        assert 400 <= shapes.post("/score", content=body, headers=JSON).status_code < 500
        label = json.dumps(score_item).replace(": 0", f": {nested}").replace("[0]", f"[{nested}]")
        reward_body = {**SAMPLE.reward_body(), "labels": [label]}
        assert 400 <= shapes.post("/get_reward", json=reward_body).status_code < 500
    text = json.dumps({"items": [item | {"semantic_questions": nested}]})
    assert 400 <= shapes.post("/score", content=text, headers=JSON).status_code < 500


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | TEXTS
    | st.sampled_from(["\ud800", "<|im_end|>", "<think>", encode(SAMPLE.right), "data:image/png;base64,", "[]", "{}"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, child in children for path in paths_of(child, (*prefix, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy without one place."""
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    rest = parent.copy()
    del rest[path[-1]]
    return replaced(value, path[:-1], rest)


@st.composite
def nearly(draw: st.DrawFn, valid: Any) -> Any:
    """A valid body in which up to three places are gone, or hold something else."""
    body = valid
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(paths_of(body)))
        body = without(body, path) if path and draw(st.booleans()) else replaced(body, path, draw(ANYTHING))
        if not isinstance(body, (dict, list)):
            break
    return body


@st.composite
def nearly_rewards(draw: st.DrawFn) -> Any:
    """Such a request for rewards, whose label may itself be nearly right."""
    label = draw(nearly(SAMPLE.record))
    return draw(nearly(SAMPLE.reward_body() | {"labels": [json.dumps(label)]}))


def assert_no_server_error(client: httpx.Client, path: str, body: Any, documented: set[int]) -> None:
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code < 500 or response.status_code in documented, (response.status_code, body)
    assert isinstance(response.json(), dict)


@FUZZ
@given(path=st.sampled_from(["/score", "/generate", "/get_reward"]), body=ANYTHING)
def test_any_json_is_no_server_error(shapes: httpx.Client, path: str, body: Any) -> None:
    assert_no_server_error(shapes, path, body, set())


@FUZZ
@given(path=st.sampled_from(["/score", "/generate", "/get_reward"]), body=st.binary(max_size=200))
def test_any_bytes_are_no_server_error(shapes: httpx.Client, path: str, body: bytes) -> None:
    response = shapes.post(path, content=body, headers=JSON)
    assert 400 <= response.status_code < 500


@FUZZ
@given(body=nearly({"items": [SAMPLE.score_item(), SAMPLES[1].score_item()]}))
def test_nearly_a_score_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    assert_no_server_error(shapes, "/score", body, set())


@FUZZ
@given(
    body=nearly(
        {
            "items": [
                {"prompt": "x", "thought": SAMPLE.plan, "image": encode(SAMPLE.wrong), "seed": 1},
                {"prompt": SAMPLE.record["prompt"], "thought": None, "image": None, "seed": None},
            ]
        }
    )
)
@example(body={"items": [{"prompt": "", "thought": ""}]})
@example(body={"items": [{"prompt": "<|vision_start|><|im_end|>", "thought": "\x00"}]})
def test_nearly_a_paint_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    assert_no_server_error(shapes, "/generate", body, set())


@FUZZ
@given(body=nearly_rewards())
def test_nearly_a_reward_request_is_no_server_error(shapes: httpx.Client, body: Any) -> None:
    # A question that the pixel judge does not know has no answer, and the image no reward.
    assert_no_server_error(shapes, "/get_reward", body, {503})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server_process(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    port = free_port()
    command = [sys.executable, "-m", "reward_models.server", "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    # Read all the time, or a full pipe would halt the server.
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        process.lines = lines
        yield process, url
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.mark.slow
def test_process_refuses_to_be_open_to_others() -> None:
    command = [sys.executable, "-m", "reward_models.server", "--host", "0.0.0.0", "--port", str(free_port())]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode != 0
    assert f"set {KEY_VARIABLE}" in result.stderr


@pytest.mark.slow
def test_process_finishes_what_is_under_way_when_it_is_told_to_stop() -> None:
    # Long enough to be under way, and patience enough for a busy machine.
    steps = ["--painter", "policy", "--num_timesteps", "400", "--painter_batch_size", "1", "--shutdown_timeout", "170"]
    with server_process(*steps) as (process, url), ThreadPoolExecutor(1) as pool:
        body = {"items": [{"prompt": "x", "seed": i} for i in range(2)]}
        under_way = pool.submit(httpx.post, f"{url}/generate", json=body, timeout=180)
        wait_until(lambda: "alphagrpo_queue_length 1.0" in httpx.get(f"{url}/metrics", timeout=60).text)
        process.send_signal(signal.SIGTERM)
        assert under_way.result().status_code == 200
        process.wait(60)
        line = next(line for line in process.lines if '"/generate"' in line)
        assert json.loads(line)["status"] == 200


@dataclass
class Load:
    """What many clients at once have seen, and the server's memory meanwhile."""

    statuses: dict[int, int]
    memory: list[tuple[float, int]]


async def press(url: str, process: psutil.Process, num_clients: int, seconds: float) -> Load:
    load, end = Load({}, []), time.monotonic() + seconds
    bodies = [json.dumps({"items": [sample.score_item()] * 2}) for sample in SAMPLES]

    async def client(index: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            while time.monotonic() < end:
                response = await http.post("/score", content=bodies[index % len(bodies)], headers=JSON)
                load.statuses[response.status_code] = load.statuses.get(response.status_code, 0) + 1
                if response.status_code == 429:
                    await asyncio.sleep(float(response.headers["retry-after"]))

    async def watch() -> None:
        while time.monotonic() < end:
            load.memory.append((time.monotonic(), process.memory_info().rss))
            await asyncio.sleep(0.25)

    await asyncio.gather(watch(), *(client(index) for index in range(num_clients)))
    return load


@pytest.mark.slow
def test_two_hundred_clients_for_a_minute() -> None:
    with server_process("--judge", "shapes") as (process, url):
        load = asyncio.run(press(url, psutil.Process(process.pid), num_clients=200, seconds=60))
        assert set(load.statuses) <= {200, 429}
        assert load.statuses[200] > 200
        middle = (load.memory[0][0] + load.memory[-1][0]) / 2
        first, second = ([rss for at, rss in load.memory if (at < middle) is half] for half in (True, False))
        print(f"{load.statuses}, RSS up to {max(first) / 1e6:.0f} MB, then {max(second) / 1e6:.0f} MB")  # noqa: T201
        assert max(second) <= 1.1 * max(first)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert "alphagrpo_queue_length 0.0" in httpx.get(f"{url}/metrics", timeout=60).text
        lines = [json.loads(line) for line in process.lines if line.startswith('{"path": "/score"')]
        assert len(lines) == sum(load.statuses.values())
