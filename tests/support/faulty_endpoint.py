# SPDX-License-Identifier: Apache-2.0

"""A chat endpoint with deliberate faults, on loopback."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from support.loopback import LoopbackServer, serve


@dataclass
class Faults:
    """
    Faults of the endpoint.

    Args:
        error, hang, garbage, empty, trickle (`float`): Share of requests that get a 500, no answer, a body that is not JSON,
            an answer without log-probabilities, or an answer that is sent byte by byte.
        cursed (`float`): Share of questions that always get a 500.
        seconds (`float`): Seconds per answer.
        seed (`int`): Seed of the draw of faults.
    """

    error: float = 0.0
    hang: float = 0.0
    garbage: float = 0.0
    empty: float = 0.0
    trickle: float = 0.0
    cursed: float = 0.0
    seconds: float = 0.0
    seed: int = 0


@dataclass
class FaultyEndpoint:
    """
    State of the endpoint that a test can read.

    Args:
        url (`str`): Base URL for an OpenAI client.
        faults ([`Faults`]): They may be changed while it runs.
        asked (`dict[tuple[str, str], int]`): How often each question was asked about each image (by SHA-256 of the PNG).
        requests (`list[dict]`): Bodies of all requests.
        peak (`int`): Largest number of concurrent requests.
    """

    url: str
    faults: Faults
    asked: dict[tuple[str, str], int] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    running: int = 0

    def is_cursed(self, key: tuple[str, str]) -> bool:
        return _uniform("cursed", *key) < self.faults.cursed


def true_probability(digest: str, question: str) -> float:
    """P(yes) that the endpoint answers for a question about an image."""
    return 0.02 + 0.96 * _uniform("probability", digest, question)


def _uniform(*parts: str) -> float:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:7], "big") / 2**56


def read_request(body: dict[str, Any]) -> tuple[str, str]:
    """Digest of the image and text of the question."""
    image, text = body["messages"][0]["content"]
    png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"), validate=True)
    return hashlib.sha256(png).hexdigest(), re.search(r"Question: (.*)", text["text"])[1]


def completion(content: str, candidates: list[tuple[str, float]] | None) -> dict[str, Any]:
    """A chat completion whose first token has these candidates and probabilities."""
    entries = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in candidates or []]
    logprobs = {"content": [{**entries[0], "top_logprobs": entries}] if entries else [], "refusal": None}
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
    return {"id": "0", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


def build_app(endpoint: FaultyEndpoint) -> FastAPI:
    app = FastAPI()
    rng = random.Random(endpoint.faults.seed)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "tests"}],
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        endpoint.running += 1
        endpoint.peak = max(endpoint.peak, endpoint.running)
        try:
            return await respond(await request.json())
        finally:
            endpoint.running -= 1

    async def respond(body: dict[str, Any]) -> Response:
        faults = endpoint.faults
        key = read_request(body)
        endpoint.asked[key] = endpoint.asked.get(key, 0) + 1
        endpoint.requests.append(body)
        draw = rng.random()
        await asyncio.sleep(faults.seconds)
        if endpoint.is_cursed(key) or (draw := draw - faults.error) < 0:
            return JSONResponse({"error": {"message": "out of order"}}, status_code=500)
        if (draw := draw - faults.hang) < 0:
            await asyncio.sleep(3600)
        if (draw := draw - faults.garbage) < 0:
            return PlainTextResponse("{{{ <html>", media_type="application/json")
        p = true_probability(*key)
        # Several spellings, and a token that is neither yes nor no.
        candidates = [("Yes", 0.5 * p), (" yes", 0.4 * p), ("No", 0.9 * (1 - p)), ("Maybe", 0.1)]
        answer = completion("Yes" if p > 0.5 else "No", candidates)
        if (draw := draw - faults.empty) < 0:
            answer["choices"][0]["logprobs"] = None
        if draw >= 0 and draw - faults.trickle < 0:
            return StreamingResponse(trickle(json.dumps(answer)), media_type="application/json")
        return JSONResponse(answer)

    async def trickle(text: str) -> AsyncIterator[str]:
        for character in text:
            yield character
            await asyncio.sleep(0.5)

    return app


@contextmanager
def faulty_endpoint(faults: Faults) -> Iterator[tuple[FaultyEndpoint, LoopbackServer]]:
    """Run the endpoint. The server can stop and restart it."""
    endpoint = FaultyEndpoint("", faults)
    with serve(build_app(endpoint)) as server:
        endpoint.url = f"{server.url}/v1"
        yield endpoint, server
