# SPDX-License-Identifier: Apache-2.0

"""`POST /generate`: images of prompts."""

from __future__ import annotations

import asyncio
import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_models.painters.base import ImageRequest, PaintError, UnpaintableError
from reward_models.server.arguments import ServerArguments
from support.server_samples import SAMPLE, SAMPLES, FailingPainter, encode, metric, refusal, running


def test_generate_paints_with_the_policy(shapes: httpx.Client) -> None:
    requests = [
        ImageRequest(SAMPLE.record["prompt"], SAMPLE.plan, seed=3),
        ImageRequest(SAMPLE.record["prompt"], seed=3),
        ImageRequest(SAMPLE.record["prompt"], SAMPLE.plan, SAMPLE.wrong, seed=2**63 - 1),
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


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UnpaintableError("request 0: too long"), 422, "request 0: too long"),
        (PaintError("request 0: key sk-123 at http://10.0.0.7"), 503, "the painter failed: the server's log says why"),
        (ZeroDivisionError("sk-123"), 503, "the painter failed: the server's log says why"),
    ],
)
def test_a_painter_that_fails_is_reported(
    error: Exception, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(None, FailingPainter(error), judge="shapes") as client:
        for path, body in (("/generate", {"items": [{"prompt": "x"}]}), ("/get_reward", SAMPLE.reward_body())):
            detail = refusal(client.post(path, json=body), status)
            assert message in detail and "sk-123" not in detail
        assert metric(client, "alphagrpo_images_failed_total") == (2 if status == 503 else 0)
    assert status == 422 or str(error) in caplog.text


def test_what_an_endpoint_says_about_a_request_is_logged_and_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    error = UnpaintableError("request 0: the images endpoint refused it: key sk-123")
    error.__cause__ = RuntimeError("400 Bad Request")
    with running(None, FailingPainter(error), judge="shapes") as client:
        detail = refusal(client.post("/generate", json={"items": [{"prompt": "x"}]}), 422)
    assert detail == "request 0: the painter's endpoint refused it, the server's log says why"
    assert "sk-123" in caplog.text


def test_thought_that_is_too_long_for_the_policy_is_refused(shapes: httpx.Client) -> None:
    response = shapes.post("/generate", json={"items": [{"prompt": "x", "thought": "red " * 600}]})
    assert "request 0" in refusal(response, 422)


@pytest.mark.parametrize("path", ["/generate", "/get_reward"])
def test_without_a_painter_the_answer_says_how_to_get_one(plain: httpx.Client, path: str) -> None:
    body = {"items": [{"prompt": "x"}]} if path == "/generate" else SAMPLE.reward_body()
    assert "--painter policy" in refusal(plain.post(path, json=body), 501)
