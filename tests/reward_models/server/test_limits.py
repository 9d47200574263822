# SPDX-License-Identifier: Apache-2.0

"""Limits: bodies, images, waiting requests, time."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from PIL import Image

from reward_models.dvreward import DVReward
from reward_models.files.image_decoding import EncodedImage, ImageLimits
from support.server_samples import (
    JSON,
    SAMPLE,
    GatedJudge,
    YesJudge,
    encode,
    metric,
    png_file,
    refusal,
    running,
    wait_until,
)


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
        if status == 422:
            for part in (f"{size[0]} x {size[1]} pixels", "--max_image_side", "--max_image_pixels"):
                assert part in response.json()["detail"]


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
        # The place in the queue comes before the body.
        assert client.post("/score", content=b"{", headers=JSON).status_code == 429
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
